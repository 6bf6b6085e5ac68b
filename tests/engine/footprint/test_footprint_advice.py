"""Advice keeps its word: the edited policy costs what it promised, replayed on a guest that was changed so."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.arch import access as acc
from engine.errors import InvalidValue
from engine.footprint.advice import MOVE, NARROW, advise, applied, by_objects, free_place, moved
from engine.footprint.costs import Costs
from engine.footprint.places import BYTES, SPANS
from engine.footprint.question import Question
from engine.kvm.protections import ProtectedObject, Protection
from engine.kvm.slots import SlotSpec
from tests.engine.footprint.asking import answers, footprint_of, records_moved, replayed, said, scene

SLOTS = Question((SlotSpec(0, 0, 1 << 22),))


def writes(*rows: tuple[int, int, int]) -> np.ndarray:
    """Records of (gpa, size, how often)."""
    return np.array([(gpa, size | acc.WRITE << 16) for gpa, size, count in rows for _ in range(count)], dtype=np.uint64)


POLICY = Protection(
    "p",
    (
        ProtectedObject("hot beside", 0x1040, 8),
        ProtectedObject("quiet", 0x3000, 128),
        ProtectedObject("whole page", 0x5100, 64, "page"),
    ),
)
TRACE = writes(
    (0x1040, 8, 2), (0x1000, 8, 5), (0x1048, 4, 1), (0x1020, 64, 1), (0x3000, 8, 1), (0x5100, 8, 1), (0x5800, 8, 7)
)


def test_neighbours_are_named_with_what_they_cost() -> None:
    report = advise(footprint_of(TRACE, BYTES), POLICY, SLOTS)
    assert report.neighbours == {
        "hot beside": ((0x1000, 8, 5), (0x1048, 4, 1)),
        "whole page": ((0x5800, 8, 7),),
    }
    assert said(report.cost) == answers(replayed(SLOTS, POLICY, TRACE))


def test_edits_are_ranked_and_save_what_they_say() -> None:
    report = advise(footprint_of(TRACE, BYTES), POLICY, SLOTS)
    assert [(item.object, item.action, item.saves) for item in report.advice] == [
        ("whole page", NARROW, 7),
        ("whole page", MOVE, 7),
        ("hot beside", MOVE, 6),
    ]
    assert report.together is not None and report.together.violations == report.cost.violations - 13
    for item in report.advice:
        trace = TRACE
        if item.action == MOVE:
            assert item.to is not None and item.to % 128 == 0
            old = next(object_ for object_ in POLICY.objects if object_.name == item.object)
            trace = records_moved(TRACE, old, item.to)
        assert said(item.cost) == answers(replayed(SLOTS, applied(POLICY, item), trace))


@pytest.mark.parametrize("seed", range(6))
def test_a_moved_object_takes_its_accesses_along(seed: int) -> None:
    made = scene(seed, "kvm-latest", 60)
    fine = footprint_of(made.records, BYTES)
    names = [item.name for item in made.policy.objects]
    for item in made.policy.objects:
        to = free_place(fine, made.question, made.policy, item) if names.count(item.name) == 1 else None
        if to is None:
            continue
        trace = records_moved(made.records, item, to)
        again = footprint_of(trace, BYTES)
        for name, column in moved(fine, item, to).columns().items():
            assert np.array_equal(column, again.columns()[name])


@pytest.mark.parametrize("profile", ["kvm-2019", "kvm-latest"])
def test_what_is_far_from_a_policy_is_not_forgotten(profile: str) -> None:
    """Edits are costed with the places alone that touch its pages: as with all of them, MMIO elsewhere among these."""
    edits = far = 0
    for seed in range(20):
        made = scene(seed, profile)
        fine = footprint_of(made.records, BYTES)
        report = advise(fine, made.policy, made.question)
        assert report.cost == Costs(fine, made.question).of([by_objects(made.policy)])[0]
        for edit in report.advice:
            item = next(item for item in made.policy.objects if item.name == edit.object)
            guest = moved(fine, item, edit.to) if edit.to is not None else fine
            assert edit.cost == Costs(guest, made.question).of([applied(made.policy, edit)])[0]
            if edit.to is not None:
                assert edit.to == free_place(fine, made.question, made.policy, item)
            edits, far = edits + 1, far + edit.cost.mmio
    assert edits and far


def test_advice_asks_whether_it_may_go_on() -> None:
    sizes: list[int] = []
    advise(footprint_of(TRACE, BYTES), POLICY, SLOTS, 0, sizes.append)
    assert 0 in sizes and max(sizes) > 0

    def stop(size: int) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        advise(footprint_of(TRACE, BYTES), POLICY, SLOTS, check=stop)
    with pytest.raises(InvalidValue, match="at least one byte"):
        advise(footprint_of(TRACE, BYTES), Protection("p", (ProtectedObject("o", 0, 0),)))


def test_an_object_is_not_moved_where_there_is_no_room() -> None:
    small = Question((SlotSpec(0, 0x1000, 0x1000), SlotSpec(1, 0x3000, 0x1000), SlotSpec(2, 0x5000, 0x1000)))
    report = advise(footprint_of(TRACE, BYTES), POLICY, small)
    assert [item.action for item in report.advice] == [NARROW]
    read_only = Question((*small.memory_slots, SlotSpec(3, 0x10000, 0x10000, read_only=True)))  # type: ignore[misc]
    assert [item.action for item in advise(footprint_of(TRACE, BYTES), POLICY, read_only).advice] == [NARROW]


@pytest.mark.parametrize(
    ("budget", "dropped"), [(20, ()), (17, ("hot beside",)), (9, ("hot beside",)), (1, ("hot beside", "whole page"))]
)
def test_a_budget_drops_the_dearest_objects_first(budget: int, dropped: tuple[str, ...]) -> None:
    report = advise(footprint_of(TRACE, BYTES), POLICY, SLOTS, budget)
    assert report.cut is not None and report.cut.dropped == dropped
    left = Protection("p", tuple(item for item in POLICY.objects if item.name not in dropped))
    assert said(report.cut.cost) == answers(replayed(SLOTS, left, TRACE))


def test_a_budget_of_nothing_may_leave_nothing() -> None:
    report = advise(footprint_of(TRACE, BYTES), POLICY, SLOTS, 0)
    assert report.cut is not None and set(report.cut.dropped) == {item.name for item in POLICY.objects}
    assert report.cut.cost.violations == 0


def test_advice_needs_bytes() -> None:
    with pytest.raises(InvalidValue, match="must be bytes"):
        advise(footprint_of(TRACE, SPANS), POLICY)


def test_without_slots_there_is_room_behind_everything() -> None:
    draw = random.Random(1)
    trace = writes(*((draw.randrange(1 << 20), 8, 1) for _ in range(200)))
    item = ProtectedObject("o", 0x1000, 64)
    to = free_place(footprint_of(trace, BYTES), Question(), Protection("p", (item,)), item)
    assert to is not None and to >= 1 << 20
