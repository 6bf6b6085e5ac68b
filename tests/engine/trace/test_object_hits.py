"""Which objects a violation counts for, and when it is collateral."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from engine.errors import LimitExceeded
from engine.kvm.protections import ProtectedObject, ProtectedPages
from engine.kvm.vcpu_run import MAX_EXITS
from engine.trace import object_hits, session
from engine.trace.object_hits import Targets, objects_of, targets_of
from tests.engine.builders import machine, maps, replay, set_map, store_leaf, unchanged


def targets(*ranges: tuple[str, int, int]) -> Targets:
    return targets_of([ProtectedObject(*item) for item in ranges])


def touched(ranges: list[tuple[str, int, int]], *accesses: tuple[int, int]) -> list[set[str]]:
    index, names = (made := targets(*ranges)).index, made.names
    gpas = np.array([gpa for gpa, _ in accesses], dtype=np.uint64)
    sizes = np.array([size for _, size in accesses], dtype=np.uint16)
    offsets, positions = objects_of(index, gpas, sizes)
    found = [[names[i] for i in positions[a:b]] for a, b in pairwise(offsets)]
    assert all(len(set(part)) == len(part) for part in found), "each name once"
    return [set(part) for part in found]


def test_access_touches_objects_by_sub_page() -> None:
    ranges = [("a", 0x1010, 8), ("b", 0x1080, 0x100), ("c", 0x9000, 1)]
    rows = [(0x1000, 1), (0x107F, 1), (0x107F, 2), (0x1180, 1), (0xFFF, 1), (0xFFF, 2), (0x1000, 0x9000), (1 << 40, 8)]
    assert touched(ranges, *rows) == [{"a"}, {"a"}, {"a", "b"}, set(), set(), {"a"}, {"a", "b", "c"}, set()]


def test_overlapping_nested_and_equal_objects() -> None:
    ranges = [("outer", 0x1000, 0x1000), ("inner", 0x1400, 0x80), ("same", 0x1400, 0x80), ("cross", 0x1F80, 0x100)]
    assert touched(ranges, (0x1400, 1), (0x1480, 1), (0x1FFF, 1), (0x2000, 1)) == [
        {"outer", "inner", "same"},
        {"outer"},
        {"outer", "cross"},
        {"cross"},
    ]


def test_ranges_of_one_name_are_one_object() -> None:
    made = targets(("a", 0x1000, 8), ("b", 0x2000, 8), ("a", 0x3000, 0x100))
    assert (made.names, made.subpages) == (("a", "b"), (3, 1))
    assert touched([("a", 0x1000, 8), ("a", 0x1040, 8)], (0x1000, 8)) == [{"a"}]


def test_no_objects() -> None:
    assert touched([], (0, 8), (1 << 40, 8)) == [set(), set()]


def test_answer_longer_than_its_first_guess() -> None:
    ranges = [(f"o{i}", 0x1000, 8) for i in range(200)]
    assert touched(ranges, (0x1000, 8), (0x1000, 8)) == [{f"o{i}" for i in range(200)}] * 2


def test_ranges_piled_up_without_measure_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_hits, "MAX_MEMBERS", 10)
    ranges = [(f"o{i}", 0x1000 + 0x80 * i, 0x1000) for i in range(6)]
    with pytest.raises(LimitExceeded, match="share 10 pieces at most") as caught:
        targets(*ranges)
    assert caught.value.field == "objects" and caught.value.value > 10


def test_protection_that_piles_up_too_much_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = machine()
    with unchanged(vm):
        monkeypatch.setattr(object_hits, "MAX_MEMBERS", 10)
        with pytest.raises(LimitExceeded):
            vm.protect("p", [ProtectedObject(f"o{i}", 0x1000 + 0x80 * i, 0x1000) for i in range(6)])
        monkeypatch.undo()
    set_map(vm, 9, 0)
    assert maps(vm, 0, 4, "protected") == [0] * 4, "nor does the next change bring it"


# ---- counted in a replay

HITS = [
    # objects, accesses, {name: (violations, collateral, first)}
    ("own byte", [("a", 0x1010, 8)], [(0x1010, 8)], {"a": (1, 0, 0)}),
    ("neighbour in the same sub-page", [("a", 0x1010, 8)], [(0x1018, 8)], {"a": (1, 1, 0)}),
    ("just before", [("a", 0x1010, 8)], [(0x1008, 8)], {"a": (1, 1, 0)}),
    ("last own byte", [("a", 0x1010, 8)], [(0x1017, 1)], {"a": (1, 0, 0)}),
    ("allowed", [("a", 0x1010, 8)], [(0x1080, 8)], {"a": (0, 0, None)}),
    ("first index", [("a", 0x1010, 8)], [(0x1080, 8), (0x1000, 1), (0x1010, 1)], {"a": (2, 1, 1)}),
    ("two objects share one", [("a", 0x1000, 8), ("b", 0x1008, 8)], [(0x1008, 8)], {"a": (1, 1, 0), "b": (1, 0, 0)}),
    ("both objects", [("a", 0x1000, 8), ("b", 0x1008, 8)], [(0x1004, 8)], {"a": (1, 0, 0), "b": (1, 0, 0)}),
    ("two ranges of a name, one own", [("a", 0x1000, 8), ("a", 0x1040, 8)], [(0x1040, 8)], {"a": (1, 0, 0)}),
    ("the other way round", [("a", 0x1040, 8), ("a", 0x1000, 8)], [(0x1040, 8)], {"a": (1, 0, 0)}),
    ("two ranges of a name, both own", [("a", 0x1000, 8), ("a", 0x1008, 8)], [(0x1004, 8)], {"a": (1, 0, 0)}),
    ("two ranges of a name, none own", [("a", 0x1000, 8), ("a", 0x1040, 8)], [(0x1020, 8)], {"a": (1, 1, 0)}),
    ("over two pages", [("a", 0x1FFC, 8)], [(0x1FFE, 4)], {"a": (1, 0, 0)}),
    ("second page counts too", [("a", 0x1FFC, 4), ("b", 0x2000, 8)], [(0x1FFC, 8)], {"a": (1, 0, 0), "b": (1, 0, 0)}),
    ("nested", [("a", 0x1000, 0x1000), ("b", 0x1100, 8)], [(0x1108, 8), (0x1100, 1)], {"a": (2, 0, 0), "b": (2, 1, 0)}),
]  # fmt: skip


@pytest.mark.parametrize(("ranges", "accesses", "wanted"), [row[1:] for row in HITS], ids=[row[0] for row in HITS])
def test_violations_and_collateral(
    ranges: list[tuple[str, int, int]],
    accesses: list[tuple[int, int]],
    wanted: dict[str, tuple[int, int, int | None]],
) -> None:
    vm = machine()
    vm.protect("p", [ProtectedObject(*item) for item in ranges])
    result = replay(vm, accesses)
    assert {n: (h.violations, h.collateral, h.first_index) for n, h in result.by_object.items()} == wanted
    hit = [{name for name, counts in wanted.items() if counts[0]}]
    if len(accesses) == 1:
        assert [set(names) for names in result.exit_columns.objects()] == (hit if hit[0] else [])


def test_objects_of_several_protections_are_counted_together() -> None:
    vm = machine()
    vm.protect("p", [ProtectedObject("a", 0x1000, 8), ProtectedObject("b", 0x2000, 0x1000)])
    vm.protect("q", [ProtectedObject("a", 0x1080, 0x100)])
    result = replay(vm, [0x1000, 0x1080, 0x2000])
    assert {name: (hits.violations, hits.subpages) for name, hits in result.by_object.items()} == {
        "a": (2, 3),
        "b": (1, 32),
    }
    assert result.exit_columns.objects() == [["a"], ["a"], ["b"]]
    vm.unprotect("p")
    assert list(replay(vm, [0x1000, 0x1080]).by_object) == ["a"]


def test_violation_of_a_set_counts_for_the_objects_it_touches_only() -> None:
    vm = machine()
    vm.protect("p", [ProtectedObject("a", 0x1000, 8)])
    set_map(vm, 2, 0)
    result = replay(vm, [0x2000])
    assert (result.violations, result.by_object["a"].violations) == (1, 0)
    assert result.exit_columns.objects() == [[]]


def test_runs_that_fail_count_for_no_object() -> None:
    vm = machine()
    vm.protect("p", [ProtectedObject("a", 0x1000, 8)])
    replay(vm, [0x1000])
    store_leaf(vm, 1, lambda _: 2)
    result = replay(vm, [0x1000])
    assert result.by_object["a"].violations == 0
    assert result.exit_columns.resolution_names() == ["run-failed"]


def test_an_object_of_whole_pages_counts_for_all_of_them() -> None:
    vm = machine()
    vm.protect("p", [ProtectedObject("whole", 0x1010, 8, "page"), ProtectedObject("part", 0x1100, 8)])
    result = replay(vm, [(0x1F00, 8), (0x1010, 1), (0x1108, 1), (0x2000, 8)])
    hits = {name: (hit.violations, hit.collateral) for name, hit in result.by_object.items()}
    assert hits == {"whole": (3, 2), "part": (1, 1)} and result.violations == 3
    assert result.exit_columns.objects() == [["whole"], ["whole"], ["whole", "part"]]


def test_pages_without_a_name_refuse_and_count_for_nobody() -> None:
    vm = machine()
    vm.protect("p", [ProtectedObject("o", 0x1000, 8)], [ProtectedPages(1, 1, 0xFFFFFFFC)])
    result = replay(vm, [(0x1000, 8), (0x1080, 8), (0x1100, 8)])
    assert result.violations == 2 and [hit.violations for hit in result.by_object.values()] == [1]
    assert result.exit_columns.objects()[1] == []


def test_what_a_drained_log_still_has_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LOG_ROWS", 2 * MAX_EXITS + 4)
    vm = machine()
    vm.protect("p", [ProtectedObject("a", 0x1000, 128), ProtectedObject("low", 0, 8)])
    found = replay(vm, [(0x1000, 8)] * 4)
    assert (found.violations, found.by_object["a"].violations, found.by_object["low"].violations) == (4, 4, 0)


def test_hits_of_many_objects_are_those_that_the_records_name() -> None:
    """More sub-pages than the replay remembers where to look for, hit in no order."""
    rng = np.random.default_rng(3)
    vm = machine()
    ranges = [(f"o{i % 300}", 0x10000 + 640 * i, 200) for i in range(1500)]
    vm.protect("p", [ProtectedObject(*item) for item in ranges])
    result = replay(vm, (0x10000 + rng.integers(0, 640 * 1500 // 8, 6000) * 8).tolist())
    named = Counter(name for names in result.exit_columns.objects() for name in names)
    assert {name: hits.violations for name, hits in result.by_object.items()} == named
    assert result.violations > 2000 and len(named) == 300
