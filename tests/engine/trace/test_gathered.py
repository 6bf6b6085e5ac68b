"""Exit records that come part by part are those that come at once, and what was handed out stays."""

from __future__ import annotations

import numpy as np

from engine.trace.gathered import Gathered
from engine.trace.results import EXIT_COLUMNS, ExitColumns, join
from engine.trace.scattered import NONE, Scattered


def part(first: int, count: int) -> ExitColumns:
    """Numbers of its own, one carried column, and in every part but the first one scattered record."""
    columns = {name: np.arange(first, first + count).astype(dtype) for name, dtype, _ in EXIT_COLUMNS}
    places = Scattered(np.array([1]), np.array([first], dtype=np.uint64), np.array([2], dtype=np.uint16))
    numbers = np.arange(first, first + count, dtype=np.uint64)
    return ExitColumns(columns, numbers, True, {"pc": numbers + np.uint64(7)}, scattered=places if first else NONE)


def listed(exits: ExitColumns) -> list[object]:
    arrays = (*exits.columns.values(), exits.record_gpa, *exits.carry.values(), *exits.scattered)
    return [(array.dtype, array.tolist()) for array in arrays]


def test_parts_come_out_as_if_joined() -> None:
    parts = [part(1000 * i, count) for i, count in enumerate((3, 5, 200, 2, 1, 4000))]
    gathered, empty = Gathered(), part(0, 0)
    assert gathered.exits(empty) is empty
    told: list[tuple[ExitColumns, list[object]]] = []
    for i, one in enumerate(parts):
        gathered.add(one)
        found = gathered.exits(empty)
        assert listed(found) == listed(join(parts[: i + 1], empty)) and found.has_gva
        told.append((found, listed(found)))
    assert all(listed(found) == then for found, then in told), "what was handed out changed"
