"""The short version of the kill test; `make kill-test` is the long one."""

from __future__ import annotations

import pytest

from tests.faults.clients import Client
from tests.faults.kill import empty_store, kill_test
from tests.support.postgres import MISSING, binaries


@pytest.mark.jit
@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_kill_at_a_random_instant(store: str) -> None:
    if store == "postgres" and binaries() is None:
        pytest.skip(MISSING)
    with empty_store(store) as url:
        tally = kill_test(5, url)
    assert (tally.rounds, tally.lost, tally.half_applied) == (5, 0, 0)
    assert tally.acknowledged and tally.in_flight >= 4
    assert tally.replay_commits, "the server's log tells when a replay is being committed"


STATE = {"a": 1, "b": [1, 2], "c": "x"}


@pytest.mark.parametrize(
    ("pending", "observed", "verdict"),
    [
        (None, STATE, (0, 0)),
        (None, {**STATE, "a": 0}, (1, 0)),
        ({**STATE, "a": 2, "b": [3, 4]}, STATE, (0, 0)),
        ({**STATE, "a": 2, "b": [3, 4]}, {**STATE, "a": 2, "b": [3, 4]}, (0, 0)),
        ({**STATE, "a": 2, "b": [3, 4]}, {**STATE, "a": 2}, (0, 1)),
        ({**STATE, "a": 2, "b": [3, 4]}, {**STATE, "a": 2, "b": [3, 2]}, (0, 1)),
        ({**STATE, "a": 2}, {**STATE, "a": 2, "c": "y"}, (1, 0)),
    ],
)
def test_the_verdict(pending: dict | None, observed: dict, verdict: tuple[int, int]) -> None:
    client = Client(0, 0)
    client.state, client.pending = dict(STATE), pending
    client.listed = lambda observed: {}  # type: ignore[method-assign]
    assert client.accept(dict(observed)) == verdict
    assert client.state == observed and client.pending is None
