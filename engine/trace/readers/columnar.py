"""From Arrow arrays to chunks: what Arrow streams and Parquet files have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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


class BatchConverter:
    """Turns the record batches of one body into chunks. ``done`` is the number of records converted so far.

    Raises ``TraceError`` for a schema that lacks ``gpa``, has a reserved column or a column of the wrong type, or from
    which a column to carry is missing; index 0 then, since the first record has the fault.
    """

    def __init__(self, schema: pa.Schema, carry: Sequence[str]) -> None:
        self.plan = plan_columns(schema.names, carry)
        for name in self.plan.used:
            kind = schema.field(name).type
            if not pa.types.is_integer(_value_type(kind)):
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
        columns = {name: self._plain(name, batch.column(name)) for name in self.names}
        first = self.done
        for start in range(0, batch.num_rows, CHUNK_RECORDS):
            length = min(CHUNK_RECORDS, batch.num_rows - start)
            for name in self.plan.used:
                values = columns[name][start : start + length]
                _check_range(name, values, first + start)
                self._buffer.fill(name, values)
            self.done = first + start + length
            yield self._buffer.chunk(
                length,
                {name: columns[name][start : start + length] for name in self.plan.carried},
            )

    def _plain(self, name: str, array: pa.Array) -> npt.NDArray[Any]:
        """The values as numpy, without a copy unless they are dictionary-encoded or bits."""
        try:
            # Cheap for plain arrays (are the buffers long enough?); dictionary indices must be in range as well.
            array.validate(full=pa.types.is_dictionary(array.type))
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
        except (pa.ArrowException, ValueError) as error:
            raise TraceError(f"the column {name} is not valid: {error}", index=self.done, field=name) from error
        if array.null_count:
            raise is_null(
                name,
                self.done + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))),
            )
        values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
        return values


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
