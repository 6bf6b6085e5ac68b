"""From records in JSON to chunks: one object per access."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, itemgetter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.arch.access import DEFAULT_ACCESS
from engine.errors import TraceError
from engine.trace.columns import (
    USABLE,
    ChunkBuffer,
    ColumnPlan,
    MalformedBody,
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

_value = msgspec.json.Decoder()


class _PlainRow(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A record with no other columns than those of an access: the usual one, which this decodes fastest."""

    gpa: Any = msgspec.UNSET
    size: Any = msgspec.UNSET
    access: Any = msgspec.UNSET
    vcpu: Any = msgspec.UNSET
    gva: Any = msgspec.UNSET
    kind: Any = msgspec.UNSET
    linear: Any = msgspec.UNSET
    source: Any = msgspec.UNSET
    insn_len: Any = msgspec.UNSET


_plain_row = msgspec.json.Decoder(_PlainRow)
assert _PlainRow.__struct_fields__ == tuple(USABLE)


class RowConverter:
    """Turns rows into chunks. ``done`` counts the rows converted so far; ``ignored`` has the names that mean nothing.

    Integers may be JSON integers, ``"0x…"`` or decimal strings. A row may omit what has a default; ``gva`` has none
    and is given in every row or in none. Carried values are integers from 0 to 2^64-1 and are given in every row.
    """

    def __init__(self, carry: Sequence[str]) -> None:
        self.done = 0
        self.ignored: dict[str, None] = {}
        self._carry = tuple(carry)
        self._has_gva: bool | None = None

    def chunk(self, texts: Sequence[bytes | msgspec.Raw]) -> TraceChunk:
        """The chunk of some records, at least one, each a JSON object.

        Raises ``TraceError`` with the absolute index of the record at fault; ``MalformedBody`` if it is not JSON.
        """
        values = None if self._carry else self._plain(texts)
        if values is None:
            values = self._any(texts)
        columns = {name: self._integers(name, column) for name, column in values.items()}
        buffer = ChunkBuffer(columns, len(texts))
        carry = {name: columns.pop(name) for name in self._carry}
        for name, array in columns.items():
            buffer.fill(name, array)
        self.done += len(texts)
        return buffer.chunk(len(texts), dict(carry))

    def _plain(self, texts: Sequence[bytes | msgspec.Raw]) -> dict[str, list[Any]] | None:
        """The columns of records that all have the same columns and no others; None for anything less usual."""
        try:
            rows = list(map(_plain_row.decode, texts))
        except (ValueError, RecursionError):
            return None
        columns: dict[str, list[Any]] = {}
        for name in USABLE:
            values = list(map(attrgetter(name), rows))
            missing = values.count(msgspec.UNSET)
            if missing == 0:
                columns[name] = values
            elif missing < len(values):
                return None
        if "gpa" not in columns or self._has_gva not in (None, "gva" in columns):
            return None
        self._has_gva = "gva" in columns
        return columns

    def _any(self, texts: Sequence[bytes | msgspec.Raw]) -> dict[str, list[Any]]:
        """The columns of any records, or the error that says what is wrong with them."""
        rows = self._decode(texts)
        plans = self._plans(rows)
        columns: dict[str, list[Any]] = {name: list(map(itemgetter(name), rows)) for name in self._carry}
        for name, column in USABLE.items():
            if any(name in plan.used for plan in plans):
                columns[name] = [row.get(name, column.default) for row in rows]
        if "kind" in columns:
            kinds = self._integers("kind", columns["kind"]).tolist()
            columns["access"] = [row.get("access", DEFAULT_ACCESS[kind]) for row, kind in zip(rows, kinds, strict=True)]
        return columns

    def _decode(self, texts: Sequence[bytes | msgspec.Raw]) -> list[Any]:
        rows: list[Any] = []
        try:
            rows.extend(map(_value.decode, texts))
        except msgspec.ValidationError as error:
            index = self.done + len(rows)
            raise TraceError(f"the record has a number that is out of range: {error}", index=index) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedBody(f"the record is not JSON: {error}", index=self.done + len(rows)) from error
        return rows

    def _plans(self, rows: list[Any]) -> list[ColumnPlan]:
        """What becomes of the keys, for each distinct set of keys (one, in the traces people write)."""
        if set(map(type, rows)) != {dict}:
            index = next(i for i, row in enumerate(rows) if type(row) is not dict)
            raise TraceError("a record must be an object", index=self.done + index, value=rows[index])
        plans: list[ColumnPlan] = []
        for keys in dict.fromkeys(map(tuple, rows)):
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

    def _integers(self, name: str, values: list[Any]) -> npt.NDArray[np.uint64]:
        limit = USABLE[name].limit if name in USABLE else UINT64_MAX
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
