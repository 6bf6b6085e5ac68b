"""Pages, buckets and writers of a footprint count what the records of its trace do."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidValue
from engine.footprint.build import Builder
from engine.footprint.costs import outcome, refused_places
from engine.footprint.places import BYTES, LEVELS, By, Footprint, Origin
from engine.footprint.question import Question
from engine.footprint.summaries import Counts, costs_over_time, pages, timeline, writers
from engine.kvm.protections import ProtectedObject, Protection
from engine.kvm.slots import SlotSpec
from engine.trace.columns import TraceChunk
from tests.engine.footprint.asking import footprint_of, replayed, scene

RECORDS = np.array(
    [(0x1000, 8 | 1 << 16), (0x1FFC, 8 | 1 << 16), (0x1000, 8), (0x2080, 8 | 1 << 16), (0x2080, 8 | 1 << 16)],
    dtype=np.uint64,
)
POLICY = Protection("p", (ProtectedObject("o", 0x2080, 8),))


def apart(level: str = BYTES) -> Footprint:
    builder = Builder(level, By(time=10, pc=True))
    times, pcs = (np.array(column, dtype=np.uint64) for column in ([0, 5, 10, 30, 31], [7, 7, 8, 9, 7]))
    builder.feed(TraceChunk(RECORDS, None, {"time": times, "pc": pcs}))
    return builder.finish(Origin("", 0, "", ()))


def rows(counts: Counts) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in counts[:4]), strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_by_page_an_access_counts_in_each_that_it_touches(level: str) -> None:
    found = apart(level)
    counts = pages(found, refused_places(found, POLICY))
    assert rows(counts) == [(1, 3, 2, 0), (2, 3, 3, 2)]
    assert counts.subpages.tolist() == [1 | 1 << 31, 3]
    assert counts.most(1) == [1]


def test_by_bucket_and_by_writer() -> None:
    found = apart()
    refused = refused_places(found, POLICY)
    assert rows(timeline(found, refused)) == [(0, 2, 2, 0), (1, 1, 0, 0), (3, 2, 2, 2)]
    assert rows(writers(found, refused)) == [(7, 3, 3, 1), (8, 1, 0, 0), (9, 1, 1, 1)]
    assert rows(writers(found))[0] == (7, 3, 3, 0)


def test_costs_by_bucket() -> None:
    """The second record comes to a page that whole pages would guard."""
    found = apart()
    assert costs_over_time(found, outcome(found, POLICY)) == [(0, 0, 1), (3, 2, 2)]
    with pytest.raises(InvalidValue, match="must have been made by"):
        costs_over_time(footprint_of(RECORDS, BYTES), outcome(footprint_of(RECORDS, BYTES), POLICY))


@pytest.mark.parametrize("counted", [timeline, writers])
def test_what_places_are_not_apart_by_cannot_be_told(counted: object) -> None:
    with pytest.raises(InvalidValue, match="must have been made by"):
        counted(footprint_of(RECORDS, BYTES))  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(12))
def test_what_becomes_of_places_is_what_a_replay_counts(seed: int) -> None:
    made = scene(seed, "kvm-2019")
    found = footprint_of(made.records, BYTES)
    sums = [int(found.count[mask].sum()) for mask in outcome(found, made.policy, made.question)]
    result = replayed(made.question, made.policy, made.records)
    assert sums == [result.violations, result.page_granular_violations]


def test_a_question_that_cannot_be_answered_is_refused_with_the_reason() -> None:
    found = footprint_of(RECORDS, BYTES)
    for slot, field, rule in (
        (SlotSpec(0, 0, 4096, log_dirty=True), "log_dirty", "what was written before"),
        (SlotSpec(0, 0, 4096, address_space=1), "address_space", "what was before"),
        (SlotSpec(0, 1, 4096), "gpa", "multiple of 4096"),
    ):
        with pytest.raises(InvalidValue, match=rule) as caught:
            refused_places(found, POLICY, Question((slot,)))
        assert caught.value.field == f"memory_slots[0].{field}"
    with pytest.raises(InvalidValue, match="overlap"):
        refused_places(found, POLICY, Question((SlotSpec(0, 0, 8192), SlotSpec(1, 4096, 4096))))
    with pytest.raises(InvalidValue, match="profile is one of"):
        refused_places(found, POLICY, Question(profile="kvm-1999"))
    with pytest.raises(InvalidValue, match="GFN 0x2 has none") as caught:
        refused_places(found, POLICY, Question((SlotSpec(0, 0, 8192),)))
    assert caught.value.field == "objects[0].gpa"
