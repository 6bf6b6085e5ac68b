"""Parquet files. Their directory is at the end, so the source must be seekable; only needed columns are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import EngineError, TraceError
from engine.trace.columns import SHARED, TraceChunk
from engine.trace.operations import LARGEST_ARGUMENT, OP_COLUMNS
from engine.trace.readers.base import Source, TraceReader
from engine.trace.readers.budget import Budget
from engine.trace.readers.columnar import ARGUMENT_RECORDS, BatchConverter
from engine.trace.readers.flat import Kind, Sort
from engine.trace.readers.parquet_bounds import (
    DIRECTORY,
    FROM_END,
    TAIL_BYTES,
    WHAT,
    Footer,
    check_pages,
    directory,
    leaves_of,
    read_footer,
)
from engine.trace.readers.parquet_columns import AHEAD, DECODERS, Decoder, Plan, Shared, ahead, decoded
from engine.trace.readers.parquet_sparse import Sparse, SparseColumn
from engine.trace.readers.thrift import Walk

# Decoded at a time, whatever the size of the row groups: a column of them stays in a core's own cache.
BATCH_RECORDS = 1 << 17
WORD_BYTES = 8  # that a value takes at most
LATE = "gva"
# Columns that are often the same in all records.
SAME = SHARED | {"size"}


class ParquetReader(TraceReader):
    """Reads a Parquet file from its first row group to its last, a bounded number of records at a time.

    One of more than a batch is decoded in threads of their own, which are a few batches ahead of the replay. With
    ``late`` linear addresses come undecoded with the chunks, where they may (``parquet_sparse``).
    """

    def __init__(self, source: Source, carry: Sequence[str], budget: Budget, *, late: bool = False) -> None:
        super().__init__(source, carry)
        self._budget = budget
        self._may_be_late = late

    def _chunks(self) -> Iterator[TraceChunk]:
        converter: BatchConverter | None = None
        source = Shared(self._source)
        try:
            footer = _footer(source, self._budget)
            metadata = pq.read_metadata(pa.BufferReader(directory(source)))
            kinds = [(field.name, _kind(field.type)) for field in metadata.schema.to_arrow_schema()]
            converter = BatchConverter(kinds, self._carry)
            self.ignored_columns = converter.plan.ignored
            checked = check_pages(source, footer, leaves_of(metadata), converter.names, self._budget)
            firsts = list(accumulate(_rows(footer, metadata, converter), initial=0))
            uniform, late = self._sparse(footer, metadata, converter, checked.uniform)
            if late is not None:
                converter = BatchConverter([kind for kind in kinds if kind[0] != LATE], self._carry)
            records = ARGUMENT_RECORDS if "arg" in converter.names else BATCH_RECORDS
            plan = Plan(metadata, converter.names, uniform, records, firsts)
            linear = None if late is None else SparseColumn(Shared(source), late)
            count = self._decoders(plan, checked.memory)
            groups = range(len(footer.groups))
            decoders = [Decoder(source, plan, groups[at :: count or 1]) for at in range(count or 1)]
            for batch in (ahead if count else decoded)(decoders, len(groups)):
                for chunk in converter.chunks(batch):
                    if linear is not None:
                        chunk.late = _Late(linear, converter.done - len(chunk))
                    yield chunk
        except EngineError as error:
            if isinstance(error, TraceError) and error.index is None:
                error.index = converter.done if converter else 0
            raise
        except Exception as error:
            done = converter.done if converter else 0
            raise TraceError(f"the Parquet file is not valid: {error}", index=done) from error

    def _sparse(
        self, footer: Footer, metadata: Any, converter: BatchConverter, uniform: frozenset[str]
    ) -> tuple[list[Sparse], Sparse | None]:
        """Columns that are known by their first value in each row group, and the one that is decoded when values of it
        are wanted, if there is one."""
        schema, leaves = metadata.schema.to_arrow_schema(), leaves_of(metadata)
        rows = _rows(footer, metadata, converter)
        found = {}
        for name in converter.names:
            place = leaves.index(name)
            required = metadata.schema.column(place).max_definition_level == 0
            column = Sparse(
                name, schema.field(name).type, required, [group[place] for group in footer.groups], footer.size
            )
            if column.allowed(rows):
                found[name] = column
        same = [found[name] for name in found if name in uniform and name in SAME]
        late = found.get(LATE)
        plain = "gpa" in converter.names and not set(OP_COLUMNS) & set(converter.names)
        return same, late if self._may_be_late and plain and late is not None and late.kind == pa.uint64() else None

    def _decoders(self, plan: Plan, memory: int) -> int:
        """How many threads decode, 0 for none: where there is something to be ahead of, and memory beside the pages."""
        groups = len(plan.firsts) - 1
        longest = max((end - first for first, end in pairwise(plan.firsts)), default=0)
        each = memory + AHEAD * plan.records * WORD_BYTES * len(plan.names)
        most = DECODERS if longest <= AHEAD * plan.records else 1
        count = min(most, groups, (self._budget.limit - self._budget.kept) // each)
        if plan.firsts[-1] <= plan.records or "arg" in plan.names:
            return 0
        self._budget.check(max(memory, count * each), WHAT)
        return count


@dataclass(frozen=True, slots=True)
class _Late:
    """The linear addresses of a chunk, of which the first is that of record ``first``."""

    column: SparseColumn
    first: int

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        return self.column.at(positions + self.first)


def _rows(footer: Footer, metadata: Any, converter: BatchConverter) -> list[int]:
    """The records of each row group."""
    place = leaves_of(metadata).index(converter.names[0])
    return [group[place].values for group in footer.groups]


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
