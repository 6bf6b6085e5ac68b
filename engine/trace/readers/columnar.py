"""From columns to chunks: what Arrow streams and Parquet files have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import TraceError
from engine.trace.columns import (
    ALONG,
    CHUNK_RECORDS,
    USABLE,
    ChunkBuffer,
    TraceChunk,
    does_not_fit,
    is_null,
    plan_columns,
)
from engine.trace.operations import ACCESS, NO_SPACE, OP_COLUMNS, Operations, gather
from engine.trace.readers.flat import Batch, Kind, Lacking, Numbers, Sort

# Arguments become objects, of up to a page each, so fewer records at a time.
ARGUMENT_RECORDS = 1 << 14


class BatchConverter:
    """Turns the record batches of one body into chunks. ``done`` is the number of records converted so far.

    Raises ``TraceError`` for a schema that lacks ``gpa``, has a column of the wrong type, or from which a column to
    carry is missing; index 0 then, since the first record has the fault. Nulls are for what an operation has not, and
    for address spaces.
    """

    def __init__(self, schema: Sequence[tuple[str, Kind]], carry: Sequence[str]) -> None:
        self.plan = plan_columns([name for name, _ in schema], carry)
        kinds = dict(schema)
        for name in self.plan.used:
            if name == "arg" and kinds[name].sort is not Sort.BYTES:
                raise _wrong_type(name, "must hold binary", kinds[name])
            if name != "arg" and kinds[name].sort is not Sort.INTEGERS:
                raise _wrong_type(name, "must hold integers", kinds[name])
        for name in self.plan.carried:
            if name in ALONG and kinds[name].sort is not Sort.INTEGERS:
                raise _wrong_type(name, "must hold integers", kinds[name])
            if kinds[name].sort not in (Sort.INTEGERS, Sort.NUMBERS):
                raise _wrong_type(name, "must hold numbers to be carried", kinds[name])
        self.names = self.plan.used + self.plan.carried
        self.done = 0
        self._records = tuple(name for name in self.plan.used if name not in OP_COLUMNS)
        self._step = ARGUMENT_RECORDS if "arg" in self.plan.used else CHUNK_RECORDS
        self._buffer = ChunkBuffer(self.plan.used, self._step)

    def chunks(self, batch: Batch) -> Iterator[TraceChunk]:
        """The records of a batch.

        Raises ``TraceError`` for nulls, values that do not fit and columns that contradict themselves.
        """
        for start in range(0, batch.rows, self._step):
            length = min(self._step, batch.rows - start)
            chunk = self._chunk(batch, start, length)
            self.done += length
            yield chunk

    def _chunk(self, batch: Batch, start: int, length: int) -> TraceChunk:
        beside = self._buffer.beside
        ops = self._ranged("op", batch, start, length).astype(np.uint64) if "op" in self.plan.used else None
        spared = None if ops is None else ops != ACCESS
        parts = {name: self._part(name, batch.numbers[name], start, length) for name in self._records}
        for name, (values, null) in parts.items():
            self._refuse_nulls(name, null, spared)
            _check_range(name, values, self.done)
        carry = {}
        for name in self.plan.carried:
            values, null = self._part(name, batch.numbers[name], start, length)
            self._refuse_nulls(name, null, spared)
            if name in ALONG:
                _check_range(name, values, self.done)
            carry[name] = values.astype(np.uint64) if name in ALONG else values
        operations = self._operations(batch, start, length, ops, parts.get("gva")) if beside else None
        return self._buffer.chunk_of({name: values for name, (values, _) in parts.items()}, carry, operations)

    def _operations(
        self,
        batch: Batch,
        start: int,
        length: int,
        ops: npt.NDArray[np.uint64] | None,
        gva: tuple[npt.NDArray[Any], Lacking] | None,
    ) -> Operations:
        """The operations among some records, of which ``ops`` and ``gva`` are columns."""
        spaces = args = None
        if "address_space" in self.plan.used:
            values, null = self._part("address_space", batch.numbers["address_space"], start, length)
            _check_range("address_space", values, self.done)
            spaces = values.astype(np.uint64)
            if null is not None:
                spaces[null] = NO_SPACE
        if batch.arguments is not None:
            try:
                args = batch.arguments.texts(start, length)
            except ValueError as error:
                raise self._not_valid("arg", error) from error

        def gva_of(position: int) -> int | None:
            """The linear address of an operation, if it has one."""
            if gva is None or ops is None or (gva[1] is not None and gva[1][position]):
                return None
            return int(gva[0][position])

        return gather(ops, spaces, args, gva_of, self.done, length)

    def _ranged(self, name: str, batch: Batch, start: int, length: int) -> npt.NDArray[Any]:
        """A part of a column that every record has."""
        values, null = self._part(name, batch.numbers[name], start, length)
        self._refuse_nulls(name, null, None)
        _check_range(name, values, self.done)
        return values

    def _part(self, name: str, column: Numbers, start: int, length: int) -> tuple[npt.NDArray[Any], Lacking]:
        try:
            return column.part(start, length)
        except ValueError as error:
            raise self._not_valid(name, error) from error

    def _refuse_nulls(self, name: str, null: Lacking, spared: Lacking) -> None:
        """Raise for the first null, those of operations ``spared``."""
        if null is not None:
            null = null if spared is None else null & ~spared
            if null.any():
                raise is_null(name, self.done + int(np.argmax(null)))

    def _not_valid(self, name: str, error: ValueError) -> TraceError:
        return TraceError(f"the column {name} is not valid: {error}", index=self.done, field=name)


def _wrong_type(name: str, rule: str, kind: Kind) -> TraceError:
    return TraceError(f"the column {name} {rule}", index=0, field=name, value=kind.name)


def _check_range(name: str, values: npt.NDArray[Any], first_index: int) -> None:
    """Raise ``TraceError`` for the first value that the column cannot hold; types that always fit cost nothing."""
    limit = USABLE[name].limit
    have = np.iinfo(values.dtype)
    if have.min >= 0 and have.max <= limit:
        return
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high <= limit:
        return
    wrong = values > limit if low >= 0 else (values < 0) | (values > min(limit, have.max))
    position = int(np.argmax(wrong))
    raise does_not_fit(name, first_index + position, int(values[position]), limit)
