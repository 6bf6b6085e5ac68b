"""Arrow IPC streams as pyarrow writes them."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa

EOS = b"\xff\xff\xff\xff\0\0\0\0"


def stream(*batches: pa.RecordBatch, schema: pa.Schema | None = None, eos: bool = True, **options: Any) -> bytes:
    """Batches as one stream, without the mark of its end if so wanted."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema or batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write(batch)
    body = sink.getvalue()
    assert body.endswith(EOS)
    return body if eos else body[: -len(EOS)]
