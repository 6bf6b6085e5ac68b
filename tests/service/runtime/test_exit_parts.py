"""What a store keeps of exit records: everything, in a few bytes each, and what releases before this one have kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.cpu import sppt
from engine.trace.results import EXIT_COLUMNS, ExitColumns
from engine.trace.scattered import Scattered
from service.runtime import exit_parts
from service.runtime.traces import PART
from service.storage.columns import pack, unpack

PAGE = np.uint64(4096)


def drawn(seed: int, count: int, **given: Any) -> ExitColumns:
    """Exit records of the usual sort: most at the first byte of their access, refused in all that they touch."""
    rng = np.random.default_rng(seed)
    gpa = rng.integers(0, 64, count, dtype=np.uint64) * PAGE + rng.integers(0, 4000, count, dtype=np.uint64)
    size = rng.choice([1, 4, 8, 96], count).astype(np.uint16)
    end = np.minimum(gpa % PAGE + size, PAGE) - np.uint64(1)
    subpages = (np.uint64(2) << end // np.uint64(128)) - (np.uint64(1) << gpa % PAGE // np.uint64(128))
    columns: dict[str, Any] = {name: np.zeros(count, dtype=dtype) for name, dtype, _ in EXIT_COLUMNS}
    columns |= {
        "index": np.cumsum(rng.integers(0, 300, count, dtype=np.uint64), dtype=np.uint64),
        "reason": np.full(count, 48, dtype=np.uint16),
        "qualification": rng.choice([0x18A, 0x1AA], count).astype(np.uint64),
        "gpa": gpa,
        "size": size,
        "gfn": gpa // PAGE,
        "subpages": subpages.astype(np.uint32),
        "denied": subpages.astype(np.uint32),
    }
    record_gpa = given.pop("record_gpa", gpa)
    return ExitColumns(columns | given, record_gpa, True)


def same(a: ExitColumns, b: ExitColumns) -> bool:
    pairs = [(a.columns[name], b.columns[name]) for name, _, _ in EXIT_COLUMNS]
    pairs += [(a.record_gpa, b.record_gpa), *zip(a.scattered, b.scattered, strict=True)]
    pairs += [(a.carry[name], b.carry[name]) for name in {*a.carry, *b.carry}]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def again(exits: ExitColumns) -> ExitColumns:
    return exit_parts.read(unpack(pack(exit_parts.stored(exits))), True)


COUNT = 500
UNUSUAL: dict[str, Callable[[], ExitColumns]] = {
    "usual": lambda: drawn(1, COUNT),
    "none": lambda: drawn(1, 0),
    "one": lambda: drawn(1, 1),
    "denied in part": lambda: drawn(2, COUNT, denied=np.full(COUNT, 1 << 31, dtype=np.uint32)),
    "in the second page": lambda: drawn(3, COUNT, record_gpa=drawn(3, COUNT).columns["gpa"] - np.uint64(3)),
    "under other objects": lambda: drawn(3, COUNT, record_gpa=drawn(3, COUNT).columns["gpa"] | np.uint64(7 << 52)),
    "high addresses": lambda: drawn(4, COUNT, gpa=np.full(COUNT, (1 << 52) - 9, dtype=np.uint64)),
    "gva": lambda: drawn(5, COUNT, gva=np.arange(COUNT, dtype=np.uint64) | np.uint64(0xFFFF << 48)),
    "index far away": lambda: drawn(6, COUNT, index=np.arange(COUNT, dtype=np.uint64) + np.uint64(1 << 62)),
    "index twice": lambda: drawn(7, COUNT, index=np.arange(COUNT, dtype=np.uint64) // np.uint64(2)),
    "index down": lambda: drawn(7, COUNT, index=np.arange(COUNT, dtype=np.uint64)[::-1].copy()),
    "gfn of its own": lambda: drawn(8, COUNT, gfn=np.arange(COUNT, dtype=np.uint64)),
}


@pytest.mark.parametrize("made", UNUSUAL.values(), ids=UNUSUAL)
def test_exit_records_come_back_as_they_were(made: Callable[[], ExitColumns]) -> None:
    exits = made()
    assert same(again(exits), exits)


def test_what_is_carried_and_what_is_scattered_comes_back() -> None:
    exits = drawn(9, COUNT)
    rows = np.array([3, 3, 8], dtype=np.int64)
    places = Scattered(rows, np.array([1, 2, 3], dtype=np.uint64), np.array([4, 5, 6], dtype=np.uint16))
    carry = {"pc": np.arange(COUNT, dtype=np.uint64), "weight": np.linspace(0, 1, COUNT)}
    exits = ExitColumns(exits.columns, exits.record_gpa, True, carry, scattered=places)
    assert same(again(exits), exits)


def test_parts_of_earlier_releases_are_read() -> None:
    exits = drawn(10, COUNT)
    earlier = {"record_gpa": exits.record_gpa, **{f"column:{name}": column for name, column in exits.columns.items()}}
    assert same(exit_parts.read(unpack(pack(earlier)), True), exits)


def test_a_record_takes_few_bytes() -> None:
    assert len(pack(exit_parts.stored(drawn(11, PART)))) / PART < 8


def test_sub_pages_follow_as_the_processor_finds_them() -> None:
    gpa = np.array([0, 127, 128, 4095, 4032, 4000], dtype=np.uint64)
    size = np.array([1, 2, 128, 1, 64, 500], dtype=np.uint16)
    part = [min(int(length), 4096 - int(at)) for at, length in zip(gpa, size, strict=True)]
    wanted = [int(sppt.touched(np.int64(at), np.int64(n))) for at, n in zip(gpa.tolist(), part, strict=True)]
    exits = drawn(12, 6, gpa=gpa, size=size, record_gpa=gpa, subpages=np.array(wanted, dtype=np.uint32))
    assert "column:subpages" not in exit_parts.stored(exits)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("count", lambda column: column + np.uint32(PART)),
        ("column:gpa", lambda column: column[:-1]),
        ("column:gpa", lambda column: column.astype("f8")),
        ("same:reason", lambda column: column[:0]),
        ("same:stale", lambda column: column.astype(np.uint64)),
    ],
)
def test_what_is_no_part_is_refused(name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    stored = exit_parts.stored(drawn(13, COUNT))
    with pytest.raises(ValueError, match="exit records"):
        exit_parts.read(stored | {name: change(stored[name])}, True)
