"""Exit records as a store has them: a part of them as few narrow columns, about eight bytes a record where it was 67.

What follows from other columns is left out where it does; a column of one value is that value; indices are their
steps; all numbers are as wide as the largest of the part. zstd does the rest (``storage.columns``). Parts of releases
before this one have every column whole, and are read as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.trace.results import EXIT_COLUMNS, ExitColumns
from engine.trace.scattered import NONE, Scattered
from service.runtime.traces import PART

RECORD_GPA = "record_gpa"
COUNT = "count"
COLUMN, CARRY, SCATTERED = "column:", "carry:", "scattered:"
# How a column may be stored: as it is, as the one value that it has, as its first value and the steps after it.
PLAIN, SAME, STEPS = _FORMS = ("column", "same", "steps")

_ONE, _TWO, _PAGE, _SUBPAGE, _LAST, _OFFSET = (np.uint64(value) for value in (1, 2, 12, 7, 31, 0xFFF))
# Above it the address of a record may have the set of objects that it is named by (``trace.interactive``).
_ADDRESS = np.uint64((1 << 52) - 1)

_WIDTHS: Mapping[str, str] = {name: dtype for name, dtype, _ in EXIT_COLUMNS} | {RECORD_GPA: "uint64"}
_NARROW = (np.uint8, np.uint16, np.uint32)


def stored(exits: ExitColumns) -> dict[str, NDArray[Any]]:
    """The columns of a part by their names in the store."""
    kept: dict[str, NDArray[Any]] = {COUNT: np.array([len(exits)], dtype=np.uint32)}
    given = {RECORD_GPA: exits.record_gpa, **exits.columns}
    follow = _following(exits.columns["gpa"], exits.columns["size"], exits.record_gpa)
    for name, column in given.items():
        if name not in follow or not np.array_equal(column, follow[name]):
            kept |= _one(name, column)
    kept |= {CARRY + name: column for name, column in exits.carry.items()}
    if len(exits.scattered.rows):
        kept |= {SCATTERED + name: column for name, column in exits.scattered._asdict().items()}
    return kept


def read(piece: Mapping[str, NDArray[Any]], has_gva: bool) -> ExitColumns:
    """The exit records of a part, without the objects that they are named by. Raises ValueError."""
    carry = {name.removeprefix(CARRY): column for name, column in piece.items() if name.startswith(CARRY)}
    if COUNT not in piece:  # of a release before this one
        whole = {name.removeprefix(COLUMN): column for name, column in piece.items() if name.startswith(COLUMN)}
        return ExitColumns(whole, piece[RECORD_GPA], has_gva, carry, scattered=_scattered(piece))
    (count,) = piece[COUNT].tolist()
    if count > PART:
        raise ValueError(f"a part of {count} exit records")
    found: dict[str, NDArray[Any]] = {}
    for name, column in piece.items():
        form, _, rest = name.partition(":")
        if form in _FORMS:
            found[rest] = _whole(form, rest, column, count)
    record_gpa = found.pop(RECORD_GPA, found["gpa"])
    found = _following(found["gpa"], found["size"], record_gpa) | found
    columns = {name: found[name] for name, _, _ in EXIT_COLUMNS}
    return ExitColumns(columns, record_gpa, has_gva, carry, scattered=_scattered(piece))


def _whole(form: str, name: str, column: NDArray[Any], count: int) -> NDArray[Any]:
    """A column as it was before it was stored."""
    wanted = np.dtype(_WIDTHS.get(name, "uint8"))
    narrow = column.dtype.kind == "u" and column.dtype.itemsize <= wanted.itemsize and name in _WIDTHS
    if not narrow or column.shape != (1 if form == SAME else count,):
        raise ValueError(f"column {name} is not one of {count} exit records")
    if form == SAME:
        return np.full(count, column[0], dtype=wanted)
    return np.cumsum(column, dtype=wanted) if form == STEPS else column.astype(wanted, copy=False)


def _following(
    gpa: NDArray[np.uint64], size: NDArray[np.uint16], record_gpa: NDArray[np.uint64]
) -> dict[str, NDArray[Any]]:
    """What some columns are most often, given others: an exit is at the first byte of its access, and what it touches
    in its page is refused."""
    end = np.minimum((record_gpa & _ADDRESS) + size, (gpa | _OFFSET) + _ONE) - _ONE
    touched = (_TWO << (end >> _SUBPAGE & _LAST)) - (_ONE << (gpa >> _SUBPAGE & _LAST))
    subpages = touched.astype(np.uint32)
    return {RECORD_GPA: gpa, "gfn": gpa >> _PAGE, "subpages": subpages, "denied": subpages}


def _one(name: str, column: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """One column in the form that is the smallest."""
    if not len(column):
        return {f"{PLAIN}:{name}": column}
    low, high = column.min(), column.max()
    if low == high:
        return {f"{SAME}:{name}": column[:1]}
    if name == "index" and (column[1:] >= column[:-1]).all():
        steps = np.diff(column, prepend=np.uint64(0))
        return {f"{STEPS}:{name}": _narrow(steps, int(steps.max()))}
    return {f"{PLAIN}:{name}": _narrow(column, int(high))}


def _narrow(column: NDArray[Any], high: int) -> NDArray[Any]:
    for dtype in _NARROW:
        if high <= np.iinfo(dtype).max:
            return column.astype(dtype, copy=False)
    return column


def _scattered(piece: Mapping[str, Any]) -> Scattered:
    """Those among the records of a part; parts without any, and of before there were any, say nothing of them."""
    if SCATTERED + "rows" not in piece:
        return NONE
    return Scattered(*(piece[SCATTERED + name] for name in Scattered._fields))
