"""Tables of Arrow as compact streams: what a trace is sent as where the way is narrow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from subpage.bitmaps import library
from subpage.errors import BadInput

RECORDS = 1 << 18  # of a batch: the service decompresses one while it replays another
_CODECS = ("lz4", "zstd")


def compact(table: Any, compression: str = "lz4") -> Iterator[bytes]:
    """A trace as a compact stream of Arrow, piece by piece: each column of numbers in the fewest bits that hold it, one
    that is the same everywhere as one run a batch, and every buffer compressed, by lz4 or zstd. Give it to ``replay``,
    or write it to a file ``….arrow``. Raises BadInput, NotInstalled.

        >>> import pyarrow
        >>> from subpage import compact
        >>> rows = pyarrow.table({"gpa": [0x2000, 0x2800], "size": [8, 8]})
        >>> vm.replay(compact(rows)).records
        2
    """
    arrow, compute = library("pyarrow"), library("pyarrow.compute")
    if compression not in _CODECS:
        raise BadInput(f"compression is one of {', '.join(_CODECS)}, not {compression!r}")
    if not hasattr(table, "slice"):
        table = arrow.table(table)
    return _pieces(
        arrow, table, [_Narrow(arrow, compute, table.column(at)) for at in range(table.num_columns)], compression
    )


def _pieces(arrow: Any, table: Any, columns: list[_Narrow], compression: str) -> Iterator[bytes]:
    schema = arrow.schema(
        [arrow.field(name, column.kind) for name, column in zip(table.column_names, columns, strict=True)]
    )
    options = arrow.ipc.IpcWriteOptions(compression=compression)
    held = io.BytesIO()
    with arrow.ipc.new_stream(held, schema, options=options) as writer:
        for start in range(0, table.num_rows, RECORDS):
            part = table.slice(start, RECORDS)
            arrays = [column.of(part.column(at)) for at, column in enumerate(columns)]
            writer.write_batch(arrow.record_batch(arrays, schema=schema))
            yield taken(held)
    yield taken(held)


class _Narrow:
    """How one column is stored: ``kind`` is its type."""

    def __init__(self, arrow: Any, compute: Any, column: Any) -> None:
        self._arrow = arrow
        self._same = False
        self.kind = self._values = column.type
        if not arrow.types.is_integer(column.type) or column.null_count == len(column):
            return
        low, high = (value.as_py() for value in compute.min_max(column).values())
        if low >= 0:
            self.kind = self._values = next(kind for kind in _unsigned(arrow) if high < 1 << kind.bit_width)
        self._same = low == high and not column.null_count
        if self._same:
            self.kind = arrow.run_end_encoded(arrow.int32(), self._values)

    def of(self, part: Any) -> Any:
        """Some of it."""
        if self._same:
            first = part.slice(0, 1).cast(self._values).combine_chunks()
            return self._arrow.RunEndEncodedArray.from_arrays(
                self._arrow.array([len(part)], self._arrow.int32()), first
            )
        whole = part.cast(self._values).combine_chunks()
        return whole.chunk(0) if isinstance(whole, self._arrow.ChunkedArray) else whole


def _unsigned(arrow: Any) -> tuple[Any, ...]:
    return arrow.uint8(), arrow.uint16(), arrow.uint32(), arrow.uint64()


def taken(held: io.BytesIO) -> bytes:
    """What was written since it was last asked."""
    data = held.getvalue()
    held.seek(0)
    held.truncate()
    return data
