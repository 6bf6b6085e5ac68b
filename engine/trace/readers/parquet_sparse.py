"""Columns of a Parquet file of which few pages are decoded: those with values that somebody wants.

Linear addresses are wanted of the records with an exit, when the rest has been replayed; decoding all of them takes as
long as the addresses themselves. A column whose dictionary has one value is known when one page of it is. So the pages
in question are found, and those that are wanted together decoded as a file of their own, that has nothing but these,
the dictionary that they may need, and a directory made here. The pages were bounded before like those of all columns
that are used (``parquet_bounds``).

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


class _Placed(NamedTuple):
    """A page and the index of its first record."""

    first: int
    page: Page


_NOWHERE = _Placed(-1, Page(0, 0, DATA, 0, 0, 0, 0))


class SparseColumn:
    """The values of such a column, by the numbers of their records, which ascend from call to call."""

    def __init__(self, source: Any, column: Sparse) -> None:
        self._source = source
        self._column = column
        self._name = column.name
        # Index of the first record of each row group, and of the one behind the last.
        self._firsts = list(itertools.accumulate((chunk.values for chunk in column.chunks), initial=0))
        self._group = -1
        self._pages: Iterator[_Placed] = iter(())
        self._page = _NOWHERE
        self._dictionary: Page | None = None

    def at(self, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Their values. Raises TraceError."""
        found = np.zeros(len(records), dtype=self._column.kind.to_pandas_dtype())
        done = 0
        while done < len(records):
            group = int(np.searchsorted(self._firsts, records[done], side="right")) - 1
            end = int(np.searchsorted(records, self._firsts[group + 1]))
            found[done:end] = self._in_group(group, records[done:end])
            done = end
        return found

    def _in_group(self, group: int, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Those of records of one row group: the pages with them, decoded together."""
        if group != self._group:
            self._group, self._dictionary, self._page = group, None, _NOWHERE
            self._pages = self._placed(group)
        wanted, done = list[_Placed](), 0
        while done < len(records):
            wanted.append(placed := self._page_with(int(records[done])))
            done = int(np.searchsorted(records, placed.first + placed.page.values))
        values = self._decoded(wanted)
        firsts = np.array([placed.first for placed in wanted])
        begins = np.cumsum([0, *(placed.page.values for placed in wanted)])
        which = np.searchsorted(firsts, records, side="right") - 1
        found: npt.NDArray[Any] = values[begins[which] + records - firsts[which]]
        return found

    def _page_with(self, record: int) -> _Placed:
        while not self._page.first <= record < self._page.first + self._page.page.values:
            placed = next(self._pages, None)
            if placed is None:
                raise TraceError(f"the column {self._name} is not valid: a page is missing", field=self._name)
            if placed.page.type == DICTIONARY:
                self._dictionary = placed.page
            elif placed.page.type in (DATA, DATA_2):
                self._page = placed
        return self._page

    def _placed(self, group: int) -> Iterator[_Placed]:
        first = self._firsts[group]
        for page in pages_of(self._source, self._name, self._column.chunks[group], self._column.size):
            yield _Placed(first, page)
            first += page.values if page.type in (DATA, DATA_2) else 0

    def _decoded(self, wanted: Sequence[_Placed]) -> npt.NDArray[Any]:
        """The values of some pages, one after the other."""
        pages = [placed.page for placed in wanted]
        first, count = wanted[0].first, sum(page.values for page in pages)
        body = b"".join(map(self._bytes, pages if self._dictionary is None else [self._dictionary, *pages]))
        try:
            file = pq.ParquetFile(pa.BufferReader(self._file(body, pages)), page_checksum_verification=True)
            column = file.read(use_threads=False).column(0).combine_chunks()
            column.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            rule = f"the column {self._name} is not valid: {error}"
            raise TraceError(rule, index=first, field=self._name) from error
        if len(column) != count:
            rule = f"the column {self._name} is not valid: pages have {len(column)} values and say {count}"
            raise TraceError(rule, index=first, field=self._name)
        if column.null_count:
            raise is_null(self._name, self._record(wanted, int(np.argmax(column.is_null()))))
        values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return values

    def _record(self, wanted: Sequence[_Placed], position: int) -> int:
        """The number of the record whose value is at a position of some pages."""
        for first, page in wanted:
            if position < page.values:
                return first + position
            position -= page.values
        raise AssertionError("no page has it")

    def _bytes(self, page: Page) -> bytes:
        self._source.seek(page.at)
        return bytes(self._source.read(page.header + page.packed))

    def _file(self, body: bytes, pages: Sequence[Page]) -> bytes:
        """A file of one column with one row group of these pages, whose ``body`` begins with the dictionary."""
        dictionary, wanted = self._dictionary, self._column
        chunk = wanted.chunks[self._group]
        head = len(MAGIC)
        length = 0 if dictionary is None else dictionary.header + dictionary.packed
        count = sum(page.values for page in pages)
        unpacked = sum(page.header + page.unpacked for page in (*pages, dictionary) if page is not None)
        column: Value = {
            1: (I32, chunk.physical_type),
            2: (LIST, (I32, [PLAIN])),
            3: (LIST, (BINARY, [b"v"])),
            4: (I32, chunk.codec),
            5: (I64, count),
            6: (I64, unpacked),
            7: (I64, len(body)),
            9: (I64, head + length),
            **({11: (I64, head)} if length else {}),
        }
        group: Value = {
            1: (LIST, (STRUCT, [{2: (I64, head), 3: (STRUCT, column)}])),
            2: (I64, unpacked),
            3: (I64, count),
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
                3: (I64, count),
                4: (LIST, (STRUCT, [group])),
            }
        )
        return b"".join((MAGIC, body, directory, len(directory).to_bytes(4, "little"), MAGIC))
