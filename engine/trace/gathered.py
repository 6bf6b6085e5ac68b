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
from engine.trace.results import ExitColumns

# How much more room there is made than is needed, when it is used up. Pages that nothing was written to take no memory.
GROWTH = 4

_RECORD_GPA = "record_gpa"
_COLUMN = "column:"
_CARRY = "carry:"


class Gathered:
    """The exit records of one replay so far. What was handed out stays as it is: the rest comes behind it."""

    def __init__(self) -> None:
        self._first: ExitColumns | None = None
        self._arrays: dict[str, NDArray[Any]] = {}  # none as long as the first part is the only one
        self._scattered: list[scattered.Scattered] = []
        self._lengths: list[int] = []
        self._count = 0
        self._room = 0

    def add(self, part: ExitColumns) -> None:
        """Put a part of the same replay behind the others."""
        begin, self._count = self._count, self._count + len(part)
        self._scattered.append(part.scattered)
        self._lengths.append(len(part))
        if self._first is None:
            self._first = part
            return
        if self._count > self._room:
            self._make_room(begin)
        for name, array in _arrays_of(part).items():
            self._arrays[name][begin : self._count] = array

    def exits(self, empty: ExitColumns) -> ExitColumns:
        """All of them; ``empty`` is what there is without any."""
        first = self._first
        if first is None or not self._arrays:
            return empty if first is None else first
        found = {name: array[: self._count] for name, array in self._arrays.items()}
        return replace(
            first,
            columns={name: found[_COLUMN + name] for name in first.columns},
            record_gpa=found[_RECORD_GPA],
            carry={name: found[_CARRY + name] for name in first.carry},
            scattered=scattered.joined(self._scattered, self._lengths),
        )

    def _make_room(self, held: int) -> None:
        """Room for all records and more, and the ``held`` ones in it."""
        assert self._first is not None
        self._room = GROWTH * self._count
        for name, array in list((self._arrays or _arrays_of(self._first)).items()):
            made = np.empty(self._room, dtype=array.dtype)
            made[:held] = array[:held]
            self._arrays[name] = made


def _arrays_of(part: ExitColumns) -> dict[str, NDArray[Any]]:
    return {
        _RECORD_GPA: part.record_gpa,
        **{_COLUMN + name: column for name, column in part.columns.items()},
        **{_CARRY + name: column for name, column in part.carry.items()},
    }
