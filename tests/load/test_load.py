"""The load test itself: its figures are right, a short run finds nothing wrong. How fast is for `make load-test`."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from tests.load.__main__ import Load, put_under
from tests.load.bitmaps import Outcome, due_times, quantile
from tests.load.histograms import COMMITS, LAG, between, bucket_quantile, buckets

READING = """\
# HELP subpage_event_loop_lag_seconds How late.
# TYPE subpage_event_loop_lag_seconds histogram
subpage_event_loop_lag_seconds_bucket{{le="0.01"}} {0}
subpage_event_loop_lag_seconds_bucket{{le="0.05"}} {1}
subpage_event_loop_lag_seconds_bucket{{le="+Inf"}} {2}
subpage_event_loop_lag_seconds_count {2}
subpage_event_loop_lag_seconds_sum 1.5
"""


@pytest.mark.parametrize(
    ("later", "q", "expected"),
    [
        ((110, 110, 110), 0.99, 0.0099),
        ((110, 110, 110), 0.5, 0.005),
        ((60, 110, 110), 0.5, 0.01),
        ((60, 110, 110), 0.75, 0.03),
        ((60, 100, 110), 0.99, 0.05),
        ((10, 10, 110), 0.01, 0.05),
    ],
)
def test_quantiles_of_what_came_between(later: tuple[int, int, int], q: float, expected: float) -> None:
    before, after = (buckets(READING.format(*counts)) for counts in ((10, 10, 10), later))
    assert bucket_quantile(between(before, after), q) == pytest.approx(expected)


def test_quantiles_of_nothing() -> None:
    assert buckets(READING.format(1, 1, 1), COMMITS) == []
    same = buckets(READING.format(1, 2, 3), LAG)
    assert math.isnan(bucket_quantile(between(same, same), 0.99))
    assert math.isnan(quantile([], 0.99)) and Outcome().all == []


def test_arrivals_do_not_wait_for_answers() -> None:
    times = due_times(200, 50, random.Random(1))
    assert times == sorted(times) and times[0] > 0 and times[-1] < 50
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # Independent clients: exponential gaps, whose deviation is their mean.
    assert len(times) == pytest.approx(10_000, rel=0.05)
    deviation = math.sqrt(sum((gap - 0.005) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(0.005, rel=0.1)


def test_a_short_run(tmp_path: Path) -> None:
    report = put_under(Load(seconds=1, rate=50, replays=2, limit=500), f"sqlite:///{tmp_path / 'subpage.db'}")
    assert report.errors == [] and report.replays >= 2
    assert report.calls.reads and report.calls.changes and report.commits[-1][1] > 0 and report.lag[-1][1] > 0
    assert "errors: 0" in str(report)
    assert report.good(math.inf) and not report.good(0)
