"""Exit records that come part by part, put behind one another in columns that have room for more.

A replay of millions of exits drains its log hundreds of times. To keep every part and join them in the end would write
each record twice, and hold it twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.trace import scattered
from engine.trace.results import EXIT_COLUMNS, ExitColumns, Room, room_for

# How much more room there is made than is needed, when it is used up. Pages that nothing was written to take no memory.
GROWTH = 4

_RECORD_GPA = "record_gpa"
_COLUMN = "column:"
_CARRY = "carry:"


class Gathered:
    """The exit records of one replay so far. What was handed out stays as it is: the rest comes behind it."""

    def __init__(self) -> None:
        self._first: ExitColumns | None = None
        self._arrays: dict[str, NDArray[Any]] = {}
        self._next: dict[str, NDArray[Any]] = {}
        self._scattered: list[scattered.Scattered] = []
        self._lengths: list[int] = []
        self._count = 0
        self._room = 0

    def room(self, count: int) -> Room:
        """Where the next part may be filled in, of so many records, so that ``add`` need not copy it."""
        end = self._count + count
        if not self._arrays:
            columns, record_gpa = room_for(count)
            self._arrays = {_RECORD_GPA: record_gpa, **{_COLUMN + name: column for name, column in columns.items()}}
            self._room = count
        elif end > self._room:
            self._make_room(GROWTH * end)
        self._next = {name: array[self._count : end] for name, array in self._arrays.items()}
        return {name: self._next[_COLUMN + name] for name, _, _ in EXIT_COLUMNS}, self._next[_RECORD_GPA]

    def add(self, part: ExitColumns) -> None:
        """Put a part of the same replay behind the others; columns that are in the last ``room`` are there already."""
        begin, end = self._count, self._count + len(part)
        if end > self._room:
            self._make_room(GROWTH * end if begin else end)
        for name, array in _arrays_of(part).items():
            if name not in self._arrays:
                self._arrays[name] = np.empty(self._room, dtype=array.dtype)
            if self._next.get(name) is not array:
                self._arrays[name][begin:end] = array
        self._scattered.append(part.scattered)
        self._lengths.append(len(part))
        self._first = part if self._first is None else self._first
        self._next = {}
        self._count = end

    def exits(self, empty: ExitColumns) -> ExitColumns:
        """All of them; ``empty`` is what there is without any."""
        first = self._first
        if first is None:
            return empty
        found = {name: array[: self._count] for name, array in self._arrays.items()}
        return replace(
            first,
            columns={name: found[_COLUMN + name] for name in first.columns},
            record_gpa=found[_RECORD_GPA],
            carry={name: found[_CARRY + name] for name in first.carry},
            scattered=scattered.joined(self._scattered, self._lengths),
        )

    def _make_room(self, room: int) -> None:
        """Room for so many records, with those that there are in it."""
        self._room = room
        for name, array in self._arrays.items():
            made = np.empty(room, dtype=array.dtype)
            made[: self._count] = array[: self._count]
            self._arrays[name] = made


def _arrays_of(part: ExitColumns) -> dict[str, NDArray[Any]]:
    return {
        _RECORD_GPA: part.record_gpa,
        **{_COLUMN + name: column for name, column in part.columns.items()},
        **{_CARRY + name: column for name, column in part.carry.items()},
    }
