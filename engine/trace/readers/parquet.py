"""Parquet files. Their directory is at the end, so the source must be seekable; only needed columns are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import EngineError, TraceError
from engine.trace.columns import TraceChunk
from engine.trace.operations import LARGEST_ARGUMENT
from engine.trace.readers.base import Source, TraceReader
from engine.trace.readers.budget import Budget
from engine.trace.readers.columnar import ARGUMENT_RECORDS, BatchConverter
from engine.trace.readers.flat import Batch, IndexedArguments, Kind, Listed, Sort, Whole
from engine.trace.readers.parquet_bounds import (
    DIRECTORY,
    FROM_END,
    TAIL_BYTES,
    Footer,
    check_pages,
    directory,
    leaves_of,
    read_footer,
)
from engine.trace.readers.thrift import Walk

BATCH_RECORDS = 1 << 18  # decoded at a time, whatever the size of the row groups
STREAM_BYTES = 1 << 20  # read at a time from each column, so that a row group is never held whole


class ParquetReader(TraceReader):
    """Reads a Parquet file from its first row group to its last, a bounded number of records at a time."""

    def __init__(self, source: Source, carry: Sequence[str], budget: Budget) -> None:
        super().__init__(source, carry)
        self._budget = budget

    def _chunks(self) -> Iterator[TraceChunk]:
        converter: BatchConverter | None = None
        source: Any = self._source
        try:
            footer = _footer(source, self._budget)
            metadata = pq.read_metadata(pa.BufferReader(directory(source)))
            kinds = [(field.name, _kind(field.type)) for field in metadata.schema.to_arrow_schema()]
            converter = BatchConverter(kinds, self._carry)
            self.ignored_columns = converter.plan.ignored
            columns = list(converter.names)
            check_pages(source, footer, leaves_of(metadata), columns, self._budget)
            file = pq.ParquetFile(
                pa.PythonFile(source, mode="r"),
                metadata=metadata,
                buffer_size=STREAM_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
                # Arguments stay in their dictionary: a page can name one a million times.
                read_dictionary=["arg"] if "arg" in columns else None,
            )
            records = ARGUMENT_RECORDS if "arg" in columns else BATCH_RECORDS
            for batch in file.iter_batches(batch_size=records, columns=columns, use_threads=False):
                yield from converter.chunks(_batch(batch, converter))
        except EngineError as error:
            if isinstance(error, TraceError) and error.index is None:
                error.index = converter.done if converter else 0
            raise
        except Exception as error:
            done = converter.done if converter else 0
            raise TraceError(f"the Parquet file is not valid: {error}", index=done) from error


def row_count(source: Any, memory: int | Budget) -> int:
    """How many records a file says it has, in ``memory`` bytes. Raises TraceError; the source is left anywhere."""
    budget = Budget.of(memory)
    try:
        return _footer(source, budget).rows
    finally:
        budget.keep(-budget.kept, DIRECTORY)


def _footer(source: Any, budget: Budget) -> Footer:
    """The directory. The most that so long a one may unfold to is kept, at most the half of the budget."""
    end = int(source.seek(0, FROM_END))
    source.seek(max(0, end - TAIL_BYTES))
    length = int.from_bytes(source.read(TAIL_BYTES)[:4], "little")
    budget.keep(min(budget.limit // 2, Walk.STRUCT_BYTES * length), DIRECTORY)
    return read_footer(source, budget)


def _batch(batch: pa.RecordBatch, converter: BatchConverter) -> Batch:
    """Checked in full: nothing else looks at what Arrow made of the pages."""
    numbers, arguments = {}, None
    for name in converter.names:
        array = batch.column(name)
        try:
            array.validate(full=True)
            if name == "arg":
                arguments = _arguments(array)
            else:
                numbers[name] = _numbers(array)
        except (pa.ArrowException, ValueError) as error:
            raise TraceError(f"the column {name} is not valid: {error}", index=converter.done, field=name) from error
    return Batch(batch.num_rows, numbers, arguments)


def _numbers(array: pa.Array) -> Whole:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not array.null_count:
        return Whole(array.to_numpy(zero_copy_only=False), None)
    null = array.is_null().to_numpy(zero_copy_only=False)
    return Whole(array.fill_null(0).to_numpy(zero_copy_only=False), null)


def _arguments(array: pa.Array) -> Listed | IndexedArguments:
    """Of a dictionary, what is used of it."""
    if not pa.types.is_dictionary(array.type):
        return Listed(array.to_pylist())
    places, null = _numbers(array.indices).part(0, len(array))
    used, at = np.unique(places if null is None else places[~null], return_inverse=True)
    found = np.zeros(len(array), dtype=np.int64)
    found[slice(None) if null is None else ~null] = at
    return IndexedArguments(Whole(found, null), array.dictionary.take(pa.array(used)).to_pylist())


def _kind(kind: pa.DataType) -> Kind:
    """The type of a column, or of the values of its dictionary."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    sort = Sort.OTHER
    if pa.types.is_integer(value):
        sort = Sort.INTEGERS
    elif pa.types.is_floating(value) or pa.types.is_boolean(value):
        sort = Sort.NUMBERS
    elif pa.types.is_fixed_size_binary(value):
        sort = Sort.BYTES if value.byte_width <= LARGEST_ARGUMENT else Sort.OTHER
    elif pa.types.is_binary(value) or pa.types.is_large_binary(value):
        sort = Sort.BYTES
    return Kind(str(kind), sort)
