"""From Arrow arrays to chunks: what Arrow streams and Parquet files have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.errors import TraceError
from engine.trace.columns import (
    CHUNK_RECORDS,
    USABLE,
    ChunkBuffer,
    TraceChunk,
    does_not_fit,
    is_null,
    plan_columns,
)
from engine.trace.operations import ACCESS, NO_SPACE, OP_COLUMNS, Operations, gather


class BatchConverter:
    """Turns the record batches of one body into chunks. ``done`` is the number of records converted so far.

    Raises ``TraceError`` for a schema that lacks ``gpa``, has a column of the wrong type, or from which a column to
    carry is missing; index 0 then, since the first record has the fault. Nulls are for what an operation has not, and
    for address spaces.
    """

    def __init__(self, schema: pa.Schema, carry: Sequence[str]) -> None:
        self.plan = plan_columns(schema.names, carry)
        for name in self.plan.used:
            kind = schema.field(name).type
            if name == "arg" and not _is_bytes(_value_type(kind)):
                raise TraceError("the column arg must hold binary", index=0, field=name, value=str(kind))
            if name != "arg" and not pa.types.is_integer(_value_type(kind)):
                raise TraceError(
                    f"the column {name} must hold integers",
                    index=0,
                    field=name,
                    value=str(kind),
                )
        for name in self.plan.carried:
            kind = schema.field(name).type
            if not _is_fixed_width(_value_type(kind)):
                raise TraceError(
                    f"the column {name} must hold numbers to be carried",
                    index=0,
                    field=name,
                    value=str(kind),
                )
        self.names = self.plan.used + self.plan.carried
        self.done = 0
        self._buffer = ChunkBuffer(self.plan.used)

    def chunks(self, batch: pa.RecordBatch) -> Iterator[TraceChunk]:
        """The records of a batch.

        Raises ``TraceError`` for nulls, values that do not fit and arrays that contradict themselves.
        """
        beside = self._beside(batch) if self._buffer.beside else None
        columns = {name: self._plain(name, batch.column(name), beside) for name in self.names if name not in OP_COLUMNS}
        first = self.done
        for start in range(0, batch.num_rows, CHUNK_RECORDS):
            length = min(CHUNK_RECORDS, batch.num_rows - start)
            for name in self.plan.used:
                if name not in OP_COLUMNS:
                    values = columns[name][start : start + length]
                    _check_range(name, values, first + start)
                    self._buffer.fill(name, values)
            operations = None if beside is None else beside.slice(start, length, columns.get("gva"), first)
            self.done = first + start + length
            yield self._buffer.chunk(
                length, {name: columns[name][start : start + length] for name in self.plan.carried}, operations
            )

    def _beside(self, batch: pa.RecordBatch) -> _Beside:
        """The columns that are about operations."""
        ops = spaces = args = None
        if "op" in self.plan.used:
            ops = self._plain("op", batch.column("op"))
            _check_range("op", ops, self.done)
            ops = ops.astype(np.uint64)
        if "address_space" in self.plan.used:
            array = self._decoded("address_space", batch.column("address_space"))
            given = array.is_valid().to_numpy(zero_copy_only=False)
            values = array.fill_null(0).to_numpy(zero_copy_only=False)
            _check_range("address_space", values, self.done)
            spaces = np.where(given, values.astype(np.uint64), np.uint64(NO_SPACE))
        if "arg" in self.plan.used:
            args = self._decoded("arg", batch.column("arg")).to_pylist()
        known = None
        if "gva" in self.plan.used and ops is not None:
            known = batch.column("gva").is_valid().to_numpy(zero_copy_only=False)
        return _Beside(ops, spaces, args, known)

    def _plain(self, name: str, array: pa.Array, beside: _Beside | None = None) -> npt.NDArray[Any]:
        """The values as numpy, without a copy unless they are dictionary-encoded or bits; 0 for what is not given."""
        array = self._decoded(name, array)
        if array.null_count:
            lacking = array.is_null().to_numpy(zero_copy_only=False)
            if beside is not None and beside.ops is not None:
                lacking &= beside.ops == ACCESS
            if lacking.any():
                raise is_null(name, self.done + int(np.argmax(lacking)))
            array = array.fill_null(0)
        values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
        return values

    def _decoded(self, name: str, array: pa.Array) -> pa.Array:
        try:
            # Cheap for plain arrays (are the buffers long enough?); dictionary indices must be in range as well.
            array.validate(full=pa.types.is_dictionary(array.type))
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
        except (pa.ArrowException, ValueError) as error:
            raise TraceError(f"the column {name} is not valid: {error}", index=self.done, field=name) from error
        return array


class _Beside(NamedTuple):
    """The columns of a batch that are about operations, None where there is no such column.

    ``known`` says which records have a linear address.
    """

    ops: npt.NDArray[np.uint64] | None
    spaces: npt.NDArray[np.uint64] | None
    args: list[bytes | None] | None
    known: npt.NDArray[np.bool_] | None

    def slice(self, start: int, length: int, gvas: npt.NDArray[Any] | None, first_index: int) -> Operations:
        """The operations of a part of the batch, whose first record has ``first_index``."""

        def gva_of(position: int) -> int | None:
            at = start + position
            return int(gvas[at]) if gvas is not None and self.known is not None and self.known[at] else None

        def part(column: Any) -> Any:
            return None if column is None else column[start : start + length]

        return gather(part(self.ops), part(self.spaces), part(self.args), gva_of, first_index + start, length)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_fixed_width(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


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
