"""Columns of a body once they are checked: numpy views, with nothing of the library that wrote or read the body.

A column gives its parts. A part of numbers is the values, 0 in place of nulls, and which are null, or None when none
is; a part of bytes is a list. What cannot be given, an index past its dictionary or an offset past its data, is a
ValueError: no column reads memory that is not its body's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from engine.trace.operations import LARGEST_ARGUMENT

# Longer arguments mean nothing: they are cut to one byte more, which is as wrong.
CUT = LARGEST_ARGUMENT + 1

Lacking = npt.NDArray[np.bool_] | None
Part = tuple[npt.NDArray[Any], Lacking]


class Sort(Enum):
    """What a column holds, as far as a trace cares."""

    INTEGERS = "integers"
    NUMBERS = "numbers"
    BYTES = "bytes"
    OTHER = "other"


class Kind(NamedTuple):
    """The type of a column: its name for messages, and its sort."""

    name: str
    sort: Sort


class Numbers(Protocol):
    """A column of numbers."""

    def part(self, start: int, length: int) -> Part:
        """``length`` values from ``start`` on. Raises ValueError."""


class Arguments(Protocol):
    """A column of bytes."""

    def texts(self, start: int, length: int) -> list[bytes | None]:
        """``length`` values from ``start`` on, cut to CUT bytes. Raises ValueError."""


class Batch(NamedTuple):
    """Some records: their columns by name, and the column ``arg`` if there is one."""

    rows: int
    numbers: Mapping[str, Numbers]
    arguments: Arguments | None


class Plain:
    """Values side by side. ``bitmap`` has a bit for each that is there, lowest first; None: all are."""

    def __init__(self, values: npt.NDArray[Any], bitmap: npt.NDArray[np.uint8] | None = None) -> None:
        self._values = values
        self._bitmap = bitmap

    def part(self, start: int, length: int) -> Part:
        values = self._values[start : start + length]
        return without_nulls(values, lacking(self._bitmap, start, length))


class Bits:
    """Booleans, eight to a byte, lowest first."""

    def __init__(self, bits: npt.NDArray[np.uint8], bitmap: npt.NDArray[np.uint8] | None = None) -> None:
        self._bits = bits
        self._bitmap = bitmap

    def part(self, start: int, length: int) -> Part:
        return without_nulls(_bits(self._bits, start, length) == 1, lacking(self._bitmap, start, length))


class Whole:
    """Values and which are null, as they are."""

    def __init__(self, values: npt.NDArray[Any], null: Lacking) -> None:
        self._values = values
        self._null = null

    def part(self, start: int, length: int) -> Part:
        null = None if self._null is None else self._null[start : start + length]
        return without_nulls(self._values[start : start + length], null)


class Same:
    """One value, an array of length 1, for all records."""

    def __init__(self, value: npt.NDArray[Any]) -> None:
        self._value = value

    def part(self, start: int, length: int) -> Part:
        return np.broadcast_to(self._value, length), None


class Runs:
    """One value after the other, each up to the position where its run ends: ``ends`` ascend, the last is at least that
    of the column. ``null`` says which values are none."""

    def __init__(self, ends: npt.NDArray[Any], values: npt.NDArray[Any], null: Lacking) -> None:
        self._ends = ends
        self._values = values
        self._null = null

    def part(self, start: int, length: int) -> Part:
        if not length:
            return self._values[:0], None
        first, last = np.searchsorted(self._ends, [start, start + length - 1], side="right").tolist()
        values = self._values[first : last + 1]
        null = None if self._null is None or not self._null[first : last + 1].any() else self._null[first : last + 1]
        if first == last:
            spread = None if null is None else np.broadcast_to(null, length)
            return without_nulls(np.broadcast_to(values, length), spread)
        ends = np.minimum(self._ends[first : last + 1].astype(np.int64), start + length)
        lengths = np.diff(ends, prepend=start)
        return without_nulls(np.repeat(values, lengths), None if null is None else np.repeat(null, lengths))


class Windows:
    """Bytes of any length: those from one offset to the next of ``data``."""

    def __init__(
        self, offsets: npt.NDArray[Any], data: npt.NDArray[np.uint8], bitmap: npt.NDArray[np.uint8] | None = None
    ) -> None:
        self._offsets = offsets
        self._data = data
        self._bitmap = bitmap

    def texts(self, start: int, length: int) -> list[bytes | None]:
        offsets = self._offsets[start : start + length + 1].astype(np.int64)
        # Compared, as a difference wraps.
        if length and (offsets[0] < 0 or offsets[-1] > len(self._data) or (offsets[1:] < offsets[:-1]).any()):
            raise ValueError("its offsets are not within its data, or not in order")
        ends = offsets[:-1] + np.minimum(np.diff(offsets), CUT)
        data = self._data.data
        found: list[bytes | None] = [
            bytes(data[at:end]) for at, end in zip(offsets[:-1].tolist(), ends.tolist(), strict=True)
        ]
        return _with_nulls(found, lacking(self._bitmap, start, length))


class Cells:
    """Bytes of one length."""

    def __init__(self, width: int, data: npt.NDArray[np.uint8], bitmap: npt.NDArray[np.uint8] | None = None) -> None:
        self._width = width
        self._data = data
        self._bitmap = bitmap

    def texts(self, start: int, length: int) -> list[bytes | None]:
        width, used, data = self._width, min(self._width, CUT), self._data.data
        found: list[bytes | None] = [bytes(data[at * width : at * width + used]) for at in range(start, start + length)]
        return _with_nulls(found, lacking(self._bitmap, start, length))


class Listed:
    """Bytes that are objects already."""

    def __init__(self, values: Sequence[bytes | None]) -> None:
        self._values = values

    def texts(self, start: int, length: int) -> list[bytes | None]:
        return list(self._values[start : start + length])


class IndexedNumbers:
    """Numbers by their places in a dictionary, of which ``null`` are none."""

    def __init__(self, indices: Numbers, values: npt.NDArray[Any], null: Lacking) -> None:
        self._indices = indices
        self._values = values
        self._null = null

    def part(self, start: int, length: int) -> Part:
        places, lack = _places(self._indices, start, length, len(self._values))
        if not len(self._values):
            return np.zeros(length, dtype=self._values.dtype), lack
        if self._null is not None:
            lack = self._null[places] if lack is None else lack | self._null[places]
        return without_nulls(self._values[places], lack)


class IndexedArguments:
    """Bytes by their places in a dictionary."""

    def __init__(self, indices: Numbers, values: Sequence[bytes | None]) -> None:
        self._indices = indices
        self._values = values

    def texts(self, start: int, length: int) -> list[bytes | None]:
        places, lack = _places(self._indices, start, length, len(self._values))
        if not self._values:
            return [None] * length
        return _with_nulls([self._values[at] for at in places.tolist()], lack)


def lacking(bitmap: npt.NDArray[np.uint8] | None, start: int, length: int) -> Lacking:
    """Which of some values a validity bitmap says are null; None for none."""
    if bitmap is None:
        return None
    null = _bits(bitmap, start, length) == 0
    return null if null.any() else None


def without_nulls(values: npt.NDArray[Any], null: Lacking) -> Part:
    """The values with 0 for each null, and which those are."""
    return (values, None) if null is None else (np.where(null, values.dtype.type(0), values), null)


def _bits(packed: npt.NDArray[np.uint8], start: int, length: int) -> npt.NDArray[np.uint8]:
    first = start // 8
    bits = np.unpackbits(packed[first : (start + length + 7) // 8], bitorder="little")
    return bits[start - 8 * first : start - 8 * first + length]


def _places(indices: Numbers, start: int, length: int, entries: int) -> Part:
    places, lack = indices.part(start, length)
    if length and (entries or lack is None or not lack.all()) and not 0 <= places.min() <= places.max() < entries:
        raise ValueError("an index is not in its dictionary")
    return places, lack


def _with_nulls(values: list[bytes | None], null: Lacking) -> list[bytes | None]:
    if null is not None:
        for position in np.flatnonzero(null).tolist():
            values[position] = None
    return values
