"""From records in JSON to chunks: one object per access."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations, repeat
from operator import attrgetter, itemgetter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.arch.access import ACCESS_NAMES, DEFAULT_ACCESS, KIND_NAMES, LINEAR_NAMES, SOURCE_NAMES
from engine.errors import TraceError
from engine.trace.columns import (
    ALL_OR_NONE,
    ALONG,
    RECORD,
    USABLE,
    ChunkBuffer,
    ColumnPlan,
    MalformedBody,
    TraceChunk,
    does_not_fit,
    is_null,
    plan_columns,
)
from engine.trace.operations import ACCESS, NO_SPACE, OP_COLUMNS, OP_NAMES, Operations, gather

CHUNK_ROWS = 8192  # objects take ~400 bytes each, so fewer at a time than of packed records
MAX_IGNORED_COLUMNS = 256  # distinct names: a body that invents one per row would fill memory with them
UINT64_MAX = (1 << 64) - 1

_INTEGER_TEXT = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}", re.ASCII)
_HEX_TEXTS = re.compile(r"0[xX][0-9a-fA-F]{1,16}(?:\n0[xX][0-9a-fA-F]{1,16})*+", re.ASCII)  # a column of them, joined

_BYTES_TEXT = re.compile(r"([0-9a-f]{2})*", re.ASCII)

_value = msgspec.json.Decoder()


def _sums(names: Sequence[str]) -> dict[str, int]:
    """Any of ``names``, which are bits from 0 on, in any order with commas between them; and what they add up to."""
    return {
        ",".join(chosen): sum(1 << names.index(name) for name in chosen)
        for count in range(1, len(names) + 1)
        for chosen in permutations(names, count)
    }


def _positions(names: Sequence[str]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


# What may be written in place of a number.
NAMED: Mapping[str, Mapping[str, int]] = {
    "access": _positions(ACCESS_NAMES),
    "kind": _positions(KIND_NAMES),
    "linear": _sums(LINEAR_NAMES),
    "source": _positions(SOURCE_NAMES),
    "op": _positions(OP_NAMES),
}


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
    pc: Any = msgspec.UNSET
    time: Any = msgspec.UNSET
    value: Any = msgspec.UNSET


_plain_row = msgspec.json.Decoder(_PlainRow)
assert _PlainRow.__struct_fields__ == (*RECORD, *ALONG, "value")


class RowConverter:
    """Turns rows into chunks. ``done`` counts the rows converted so far; ``ignored`` has the names that mean nothing.

    Integers may be JSON integers, ``"0x…"`` or decimal strings, or names where ``NAMED`` has some. A row may omit what
    has a default; those of ALL_OR_NONE have none and are given in every row or in none. Carried values are integers
    from 0 to 2^64-1 and are given in every row. Rows of operations have what is theirs; a trace that has such columns
    has one of them among its first rows.
    """

    def __init__(self, carry: Sequence[str]) -> None:
        self.done = 0
        self.ignored: dict[str, None] = {}
        self._carry = tuple(carry)
        self._has: dict[str, bool] = {}
        self._beside: bool | None = None

    def chunk(self, texts: Sequence[bytes | msgspec.Raw]) -> TraceChunk:
        """The chunk of some records, at least one, each a JSON object.

        Raises ``TraceError`` with the absolute index of the record at fault; ``MalformedBody`` if it is not JSON.
        """
        values = None if self._carry or self._beside else self._plain(texts)
        operations: Operations | None = None
        if values is None:
            rows, had = self._decode(texts), dict(self._has)
            if self._are_beside(rows):
                rows, operations = self._operations(rows)
            values = self._any(rows)
            if operations is not None and len(operations.at) == len(rows):
                self._has = had  # rows of operations do not tell
        self._beside = operations is not None
        columns = {name: self._integers(name, column) for name, column in values.items()}
        buffer = ChunkBuffer(columns, len(texts))
        carried = dict.fromkeys((*self._carry, *(name for name in ALONG if name in columns)))
        carry = {name: columns.pop(name) for name in carried}
        for name, array in columns.items():
            buffer.fill(name, array)
        self.done += len(texts)
        return buffer.chunk(len(texts), dict(carry), operations)

    def _are_beside(self, rows: list[Any]) -> bool:
        """Whether the rows have columns beside the records. Raises TraceError for the first that comes too late."""
        if self._beside:
            return True
        for index, row in enumerate(rows):
            for name in OP_COLUMNS:
                if name in row:
                    if self._beside is None:
                        return True
                    rule = f"{name} is used from the first records on or not at all: give op in the first one"
                    raise TraceError(rule, index=self.done + index, field=name)
        return False

    def _operations(self, rows: list[Any]) -> tuple[list[Any], Operations]:
        """The rows as accesses, with something harmless in place of operations; and the operations."""
        ops = self._integers("op", [row.get("op", ACCESS) for row in rows])
        spaces = self._spaces([row.get("address_space") for row in rows])
        args = [self._bytes(position, row.get("arg")) for position, row in enumerate(rows)]

        def gva_of(position: int) -> int | None:
            value = rows[position].get("gva")
            return None if value is None else self._integer("gva", position, value, UINT64_MAX)

        found = gather(ops, spaces, args, gva_of, self.done, len(rows))
        accesses = [row for row, op in zip(rows, ops.tolist(), strict=True) if op == ACCESS]
        present = [name for name in ALL_OR_NONE if (name in accesses[0] if accesses else self._has.get(name))]
        filled = dict.fromkeys(("gpa", *self._carry, *present), 0)
        return [
            {name: value for name, value in row.items() if name not in OP_COLUMNS}
            if op == ACCESS
            else {name: value for name, value in row.items() if name not in USABLE or name == "vcpu"} | filled
            for row, op in zip(rows, ops.tolist(), strict=True)
        ], found

    def _spaces(self, given: list[Any]) -> npt.NDArray[np.uint64] | None:
        """Address spaces, NO_SPACE for each null; None where all are."""
        absent = [space is None for space in given]
        if all(absent):
            return None
        spaces = self._integers("address_space", [0 if space is None else space for space in given])
        spaces[absent] = NO_SPACE
        return spaces

    def _bytes(self, position: int, value: Any) -> bytes | None:
        """An argument: lower-case hex in memory order, or nothing."""
        if value is None:
            return None
        if not isinstance(value, str) or not _BYTES_TEXT.fullmatch(value):
            rule = "arg is lower-case hex, two digits a byte in memory order"
            raise TraceError(rule, index=self.done + position, field="arg", value=value)
        return bytes.fromhex(value)

    def _plain(self, texts: Sequence[bytes | msgspec.Raw]) -> dict[str, list[Any]] | None:
        """The columns of records that all have the same columns and no others; None for anything less usual."""
        try:
            rows = list(map(_plain_row.decode, texts))
        except (ValueError, RecursionError):
            return None
        columns: dict[str, list[Any]] = {}
        for name in (*RECORD, *ALONG):
            values = list(map(attrgetter(name), rows))
            missing = values.count(msgspec.UNSET)
            if missing == 0:
                columns[name] = values
            elif missing < len(values):
                return None
        present = {name: name in columns for name in ALL_OR_NONE}
        if "gpa" not in columns or self._has not in ({}, present):
            return None
        self._has = present
        return columns

    def _any(self, rows: list[Any]) -> dict[str, list[Any]]:
        """The columns of any records, or the error that says what is wrong with them."""
        plans = self._plans(rows)
        columns: dict[str, list[Any]] = {name: list(map(itemgetter(name), rows)) for name in self._carry}
        for name, column in RECORD.items():
            if any(name in plan.used for plan in plans):
                columns[name] = [row.get(name, column.default) for row in rows]
        columns |= {name: list(map(itemgetter(name), rows)) for name in ALONG if self._has.get(name)}
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
        if set(map(type, rows)) != {dict}:
            index = next(i for i, row in enumerate(rows) if type(row) is not dict)
            raise TraceError("a record must be an object", index=self.done + index, value=rows[index])
        return rows

    def _plans(self, rows: list[Any]) -> list[ColumnPlan]:
        """What becomes of the keys, for each distinct set of keys (one, in the traces people write)."""
        plans: list[ColumnPlan] = []
        for keys in dict.fromkeys(map(tuple, rows)):
            try:
                plan = plan_columns(keys, self._carry)
                for name in ALL_OR_NONE:
                    present = name in plan.used or name in plan.carried
                    if self._has.setdefault(name, present) != present:
                        raise TraceError(f"{name} must be given in every record or in none", field=name)
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
        limit = USABLE[name].limit if name in USABLE and name != "value" else UINT64_MAX
        kinds = set(map(type, values))
        if str in kinds and name in NAMED:
            known = NAMED[name]
            values = [known.get(value, value) if type(value) is str else value for value in values]
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
            names = [known for known in NAMED.get(name, ()) if "," not in known]
            raise does_not_fit(name, self.done + position, value, limit, names)
        return number
