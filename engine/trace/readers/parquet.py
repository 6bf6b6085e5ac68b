"""Parquet files. Their directory is at the end, so the source must be seekable; only needed columns are decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import EngineError, TraceError
from engine.trace.columns import TraceChunk
from engine.trace.readers.base import TraceReader
from engine.trace.readers.columnar import BatchConverter

BATCH_RECORDS = 1 << 18  # decoded at a time, whatever the size of the row groups
STREAM_BYTES = 1 << 20  # read at a time from each column, so that a row group is never held whole


class ParquetReader(TraceReader):
    """Reads a Parquet file from its first row group to its last, a bounded number of records at a time."""

    def _chunks(self) -> Iterator[TraceChunk]:
        converter: BatchConverter | None = None
        source: Any = self._source
        try:
            file = pq.ParquetFile(
                pa.PythonFile(source, mode="r"),
                buffer_size=STREAM_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            converter = BatchConverter(file.schema_arrow, self._carry)
            self.ignored_columns = converter.plan.ignored
            columns = list(converter.names)
            for batch in file.iter_batches(batch_size=BATCH_RECORDS, columns=columns, use_threads=False):
                yield from converter.chunks(batch)
        except EngineError:
            raise
        except Exception as error:
            done = converter.done if converter else 0
            raise TraceError(f"the Parquet file is not valid: {error}", index=done) from error
