"""From JSON objects to chunks: one access per object."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import TraceError
from engine.trace.columns import (
    USABLE,
    ChunkBuffer,
    ColumnPlan,
    TraceChunk,
    does_not_fit,
    is_null,
    plan_columns,
)

CHUNK_ROWS = 8192  # objects take ~400 bytes each, so fewer at a time than of packed records
MAX_IGNORED_COLUMNS = 256  # distinct names: a body that invents one per row would fill memory with them
UINT64_MAX = (1 << 64) - 1

_INTEGER_TEXT = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}", re.ASCII)
_HEX_TEXTS = re.compile(r"0[xX][0-9a-fA-F]{1,16}(?:\n0[xX][0-9a-fA-F]{1,16})*+", re.ASCII)  # a column of them, joined


def _distinct_keys(rows: list[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    """The key sets that occur, in order of first occurrence. Rows that are all alike are told so without hashing each."""
    first = tuple(rows[0])
    if first and set(map(len, rows)) == {len(first)}:
        try:
            deque(map(itemgetter(*first), rows), maxlen=0)
        except KeyError:
            pass
        else:
            return [first]
    return dict.fromkeys(map(tuple, rows))


class RowConverter:
    """Turns rows into chunks. ``done`` is the number of rows converted so far; ``ignored`` the names met that mean nothing.

    Integers may be JSON integers, ``"0x…"`` or decimal strings. A row may leave out what has a default; ``gva`` has none and is
    given in every row or in none. Carried values are integers from 0 to 2^64-1 and are given in every row.
    """

    def __init__(self, carry: Sequence[str]) -> None:
        self.done = 0
        self.ignored: dict[str, None] = {}
        self._carry = tuple(carry)
        self._has_gva: bool | None = None

    def chunk(self, rows: list[Any]) -> TraceChunk:
        """The chunk of some rows, at least one. Raises ``TraceError`` with the absolute index of the row at fault."""
        columns: dict[str, npt.NDArray[np.uint64]] = {}
        plans = self._plans(rows)
        given = [name for name in USABLE if any(name in plan.used for plan in plans)]
        for name in given:
            column = USABLE[name]
            if all(name in plan.used for plan in plans):
                values = list(map(itemgetter(name), rows))
            else:
                values = [row.get(name, column.default) for row in rows]
            columns[name] = self._integers(name, values, column.limit)
        carry = {name: self._integers(name, list(map(itemgetter(name), rows)), UINT64_MAX) for name in self._carry}
        buffer = ChunkBuffer(given, len(rows))
        for name, array in columns.items():
            buffer.fill(name, array)
        self.done += len(rows)
        return buffer.chunk(len(rows), dict(carry))

    def _plans(self, rows: list[Any]) -> list[ColumnPlan]:
        """What becomes of the keys, for each distinct set of keys (one, in the traces people write)."""
        if set(map(type, rows)) != {dict}:
            index = next(i for i, row in enumerate(rows) if type(row) is not dict)
            raise TraceError("a record must be an object", index=self.done + index, value=rows[index])
        plans: list[ColumnPlan] = []
        for keys in _distinct_keys(rows):
            try:
                plan = plan_columns(keys, self._carry)
                if self._has_gva is None:
                    self._has_gva = "gva" in plan.used
                if self._has_gva != ("gva" in plan.used):
                    raise TraceError("gva must be given in every record or in none", field="gva")
                self.ignored.update(dict.fromkeys(plan.ignored))
                if len(self.ignored) > MAX_IGNORED_COLUMNS:
                    raise TraceError(
                        f"there may be up to {MAX_IGNORED_COLUMNS} further columns",
                        value=plan.ignored[-1],
                    )
            except TraceError as error:
                error.index = self.done + next(i for i, row in enumerate(rows) if tuple(row) == keys)
                raise
            plans.append(plan)
        return plans

    def _integers(self, name: str, values: list[Any], limit: int) -> npt.NDArray[np.uint64]:
        kinds = set(map(type, values))
        try:
            if kinds == {str} and _HEX_TEXTS.fullmatch("\n".join(values)):
                values, kinds = list(map(int, values, repeat(16))), {int}
            if kinds == {int}:  # not bool: JSON true is no number
                array = np.array(values, dtype=np.uint64)
                if limit == UINT64_MAX or int(array.max()) <= limit:
                    return array
        except (OverflowError, ValueError):
            pass  # found again below, with its position
        return np.array(
            [self._integer(name, i, value, limit) for i, value in enumerate(values)],
            dtype=np.uint64,
        )

    def _integer(self, name: str, position: int, value: Any, limit: int) -> int:
        """One value, or the error that says what is wrong with it."""
        if value is None:
            raise is_null(name, self.done + position)
        number = value
        if isinstance(value, str) and _INTEGER_TEXT.fullmatch(value):
            number = int(value, 16 if value[1:2] in ("x", "X") else 10)
        if type(number) is not int or not 0 <= number <= limit:
            raise does_not_fit(name, self.done + position, value, limit)
        return number
