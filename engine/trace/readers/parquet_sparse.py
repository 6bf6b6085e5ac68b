"""Columns of a Parquet file of which few pages are decoded: those with values that somebody wants.

Linear addresses are wanted of the records with an exit, when the rest has been replayed; decoding all of them takes as
long as the addresses themselves. A column whose dictionary has one value is known when one page of it is. So the pages
in question are found, and each is decoded once, as a file of its own that has nothing but the page, the dictionary that
it may need, and a directory made here. The pages were bounded before like those of all columns that are used
(``parquet_bounds``).

What is decoded is checked as ever. Of what is not: no value can be wrong, as it is an unsigned 64-bit address, or that
of the dictionary, which was looked at; and a column counts as sparse only where each row group says that it has no
nulls, or its type allows none. A file that says so and has them, or whose pages are damaged, is refused where such a
page is decoded, and only there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import TraceError
from engine.trace.columns import is_null
from engine.trace.readers.parquet_bounds import DATA, DATA_2, DICTIONARY, MAGIC, Chunk, Page, pages_of
from engine.trace.readers.thrift import BINARY, I32, I64, LIST, STRUCT, Value, written

# Of parquet.thrift: PLAIN, how often a column has a value, and which integers its INT32 and INT64 are (ConvertedType).
PLAIN = 0
REQUIRED, OPTIONAL = 0, 1
CONVERTED = {
    pa.uint8(): 11,
    pa.uint16(): 12,
    pa.uint32(): 13,
    pa.uint64(): 14,
    pa.int8(): 15,
    pa.int16(): 16,
    pa.int32(): 17,
    pa.int64(): 18,
}


class Sparse(NamedTuple):
    """A column that may be decoded a page at a time: its type, its chunks in all row groups, the size of the file."""

    name: str
    kind: pa.DataType
    required: bool
    chunks: Sequence[Chunk]
    size: int

    def allowed(self, rows: Sequence[int]) -> bool:
        """Whether no value that is not decoded can be wrong, as far as the file says. ``rows`` are those of groups."""
        whole = self.required or all(chunk.nulls == 0 for chunk in self.chunks)
        return self.kind in CONVERTED and whole and [chunk.values for chunk in self.chunks] == list(rows)


class SparseColumn:
    """The values of such a column, by the numbers of their records, which ascend from call to call."""

    def __init__(self, source: Any, column: Sparse) -> None:
        self._source = source
        self._column = column
        self._name = column.name
        # Index of the first record of each row group, and of the one behind the last.
        self._firsts = list(itertools.accumulate((chunk.values for chunk in column.chunks), initial=0))
        self._group = -1
        self._pages: Iterator[tuple[int, Page]] = iter(())
        self._dictionary: Page | None = None
        # What was decoded last: its values, and the index of the first.
        self._first = 0
        self._values: npt.NDArray[Any] = np.zeros(0, dtype=column.kind.to_pandas_dtype())

    def at(self, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Their values. Raises TraceError."""
        found = np.zeros(len(records), dtype=self._values.dtype)
        done = 0
        while done < len(records):
            record = int(records[done])
            if not self._first <= record < self._first + len(self._values):
                self._go_to(record)
            end = done + int(np.searchsorted(records[done:], self._first + len(self._values)))
            found[done:end] = self._values[records[done:end] - self._first]
            done = end
        return found

    def _go_to(self, record: int) -> None:
        """Decode the page with a record."""
        group = int(np.searchsorted(self._firsts, record, side="right")) - 1
        if group != self._group or record < self._first:
            self._group, self._dictionary = group, None
            self._pages = self._numbered(group)
        for first, page in self._pages:
            if page.type == DICTIONARY:
                self._dictionary = page
            elif page.type in (DATA, DATA_2) and record < first + page.values:
                self._first, self._values = first, self._decoded(page, first)
                return
        raise TraceError(f"the column {self._name} is not valid: a page is missing", index=record, field=self._name)

    def _numbered(self, group: int) -> Iterator[tuple[int, Page]]:
        """The pages of a row group, each with the index of its first record."""
        first = self._firsts[group]
        for page in pages_of(self._source, self._name, self._column.chunks[group], self._column.size):
            yield first, page
            first += page.values if page.type in (DATA, DATA_2) else 0

    def _decoded(self, page: Page, first: int) -> npt.NDArray[Any]:
        body = b"".join(map(self._bytes, filter(None, (self._dictionary, page))))
        try:
            table = pq.ParquetFile(pa.BufferReader(self._file(body, page)), page_checksum_verification=True).read(
                use_threads=False
            )
            column = table.column(0).combine_chunks()
            column.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            rule = f"the column {self._name} is not valid: {error}"
            raise TraceError(rule, index=first, field=self._name) from error
        if len(column) != page.values:
            rule = f"the column {self._name} is not valid: a page has {len(column)} values and says {page.values}"
            raise TraceError(rule, index=first, field=self._name)
        if column.null_count:
            raise is_null(self._name, first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))))
        values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return values

    def _bytes(self, page: Page) -> bytes:
        self._source.seek(page.at)
        return bytes(self._source.read(page.header + page.packed))

    def _file(self, body: bytes, page: Page) -> bytes:
        """A file of one column with one row group of these pages."""
        dictionary, wanted = self._dictionary, self._column
        chunk = wanted.chunks[self._group]
        head = len(MAGIC)
        length = 0 if dictionary is None else dictionary.header + dictionary.packed
        unpacked = sum(each.header + each.unpacked for each in (dictionary, page) if each is not None)
        column: Value = {
            1: (I32, chunk.physical_type),
            2: (LIST, (I32, [PLAIN])),
            3: (LIST, (BINARY, [b"v"])),
            4: (I32, chunk.codec),
            5: (I64, page.values),
            6: (I64, unpacked),
            7: (I64, len(body)),
            9: (I64, head + length),
            **({11: (I64, head)} if length else {}),
        }
        group: Value = {
            1: (LIST, (STRUCT, [{2: (I64, head), 3: (STRUCT, column)}])),
            2: (I64, unpacked),
            3: (I64, page.values),
        }
        leaf: Value = {
            1: (I32, chunk.physical_type),
            3: (I32, REQUIRED if wanted.required else OPTIONAL),
            4: (BINARY, b"v"),
            6: (I32, CONVERTED[wanted.kind]),
        }
        root: Value = {4: (BINARY, b"schema"), 5: (I32, 1)}
        directory = written(
            {
                1: (I32, 2),
                2: (LIST, (STRUCT, [root, leaf])),
                3: (I64, page.values),
                4: (LIST, (STRUCT, [group])),
            }
        )
        return b"".join((MAGIC, body, directory, len(directory).to_bytes(4, "little"), MAGIC))
