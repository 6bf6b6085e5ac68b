"""Arrow IPC streams: batches are replayed while they arrive."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from engine.errors import EngineError, TraceError
from engine.trace.columns import TraceChunk
from engine.trace.readers.arrow_frames import MessageSource
from engine.trace.readers.base import TraceReader
from engine.trace.readers.columnar import BatchConverter


class ArrowReader(TraceReader):
    """Reads an Arrow IPC stream of any number of batches. One batch is held at a time; unused columns are not decoded.

    The stream must end with its end-of-stream mark: one that was cut between two batches cannot be told from a complete
    one otherwise.
    """

    def _chunks(self) -> Iterator[TraceChunk]:
        messages = MessageSource(self._source)
        converter: BatchConverter | None = None
        try:
            schema = _open(messages).schema
            converter = BatchConverter(schema, self._carry)
            self.ignored_columns = converter.plan.ignored
            messages.rewind()
            batches = _open(messages, [schema.get_field_index(name) for name in converter.names])
            while (batch := _next_batch(batches)) is not None:
                yield from converter.chunks(batch)
            messages.finish()
        except EngineError as error:
            if isinstance(error, TraceError) and error.index is None:
                error.index = converter.done if converter else 0
            raise
        except Exception as error:
            if messages.failed:  # the source failed, not the body
                raise
            done = converter.done if converter else 0
            raise TraceError(f"the Arrow stream is not valid: {error}", index=done) from error


def _open(messages: MessageSource, fields: list[int] | None = None) -> pa.RecordBatchStreamReader:
    """``fields`` are the columns to decode, all by default. One thread: parallel decoding would take the other core."""
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    return pa.ipc.open_stream(pa.PythonFile(messages, mode="r"), options=options)


def _next_batch(batches: pa.RecordBatchStreamReader) -> pa.RecordBatch | None:
    try:
        return batches.read_next_batch()
    except StopIteration:
        return None
