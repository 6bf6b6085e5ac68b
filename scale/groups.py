"""Large Parquet files in pieces: runs of row groups, each reduced alone, and put together to what the file comes to."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.errors import TraceError
from engine.footprint.combine import gathered
from engine.footprint.places import Footprint
from engine.trace.columns import USABLE
from scale.sources import PIECE_BYTES, Source, opened

# A file of more bytes is taken apart, into pieces of about so many.
SPLIT_BYTES = 256 << 20
_BATCH_RECORDS = 1 << 18
_MAGIC = b"PAR1"


class Piece(NamedTuple):
    """Row groups from ``first`` to before ``end``, whose records begin with the one of that index."""

    first: int
    end: int
    record: int


class Whole(NamedTuple):
    """What is known of a file as a whole: SHA-256 of it, and how long it lasts."""

    digest: str
    nanoseconds: int


def pieces_of(source: Source, size: int = SPLIT_BYTES) -> list[Piece]:
    """The pieces of a file; none where it is no Parquet file, or has but one. Raises ScaleError."""
    from pyarrow import ArrowException, parquet  # noqa: PLC0415 - the Arrow library is 33 MB

    with opened(source) as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return []
        try:
            metadata = parquet.read_metadata(file)
            groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
        except (ArrowException, OSError, ValueError):
            return []  # whoever reads it says what is wrong
    found: list[Piece] = []
    first = record = held = rows = 0
    for at, group in enumerate(groups):
        held += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        rows += group.num_rows
        if held >= size or at == len(groups) - 1:
            found.append(Piece(first, at + 1, record))
            first, record, held, rows = at + 1, record + rows, 0, 0
    return found if len(found) > 1 else []


class Rows(io.RawIOBase):
    """The records of a piece as an Arrow stream, a batch at a time."""

    def __init__(self, file: Any, piece: Piece) -> None:
        self._parts = self._streamed(file, piece)
        self._left = memoryview(b"")

    def _streamed(self, file: Any, piece: Piece) -> Iterator[bytes]:
        from pyarrow import ipc, parquet, schema  # noqa: PLC0415

        whole = parquet.ParquetFile(file, buffer_size=1 << 20, page_checksum_verification=True)
        names = [field.name for field in whole.schema_arrow if field.name in USABLE]
        kept = schema([whole.schema_arrow.field(name) for name in names])
        sink = io.BytesIO()
        with ipc.new_stream(sink, kept) as out:
            for batch in whole.iter_batches(
                _BATCH_RECORDS, row_groups=range(piece.first, piece.end), columns=names, use_threads=False
            ):
                out.write_batch(batch.cast(kept))
                yield sink.getvalue()
                sink.seek(0)
                sink.truncate()
        yield sink.getvalue()

    def _following(self) -> bytes | None:
        """Raises TraceError for a file that is damaged."""
        from pyarrow import ArrowException  # noqa: PLC0415

        try:
            return next(self._parts, None)
        except (ArrowException, ValueError) as error:
            raise TraceError(f"the Parquet file is not valid: {error}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view = memoryview(target)
        while not len(self._left):
            part = self._following()
            if part is None:
                return 0
            self._left = memoryview(part)
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def whole_of(source: Source) -> Whole:
    """Hash a Parquet file, and see from when to when its records are. Raises ScaleError."""
    from pyarrow import compute, parquet  # noqa: PLC0415

    with opened(source) as file:
        digest = hashlib.sha256()
        while data := file.read(PIECE_BYTES):
            digest.update(data)
        file.seek(0)
        whole = parquet.ParquetFile(file)
        times: list[int] = []
        if "time" in whole.schema_arrow.names:
            for batch in whole.iter_batches(_BATCH_RECORDS, columns=["time"], use_threads=False):
                column = batch.column(0)
                column = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
                ends = compute.min_max(column.fill_null(0))
                times = [t for t in (*times, ends["min"].as_py(), ends["max"].as_py()) if t is not None]
                times = [min(times), max(times)] if times else []
    lasted = times[1] - times[0] if times else 0
    return Whole(digest.hexdigest(), min(lasted, (1 << 63) - 1))


def one_of(parts: Sequence[Footprint]) -> Footprint:
    """Pieces of one file that follow one another as one."""
    first = parts[0]
    origin = first.origins[0]
    columns = tuple(dict.fromkeys(name for part in parts for name in part.origins[0].columns))
    records = sum(part.origins[0].records for part in parts)
    together = {name: np.concatenate([part.columns()[name] for part in parts]) for name in first.columns()}
    return gathered(first.level, first.by, (origin._replace(records=records, columns=columns),), together)


def finished(footprint: Footprint, whole: Whole) -> Footprint:
    """All pieces of a file, as the footprint of the file."""
    (origin,) = footprint.origins
    return gathered(
        footprint.level,
        footprint.by,
        (origin._replace(digest=whole.digest, nanoseconds=whole.nanoseconds),),
        footprint.columns(),
    )
