"""Bodies of every format, made from plain columns, and a reader that gathers what comes out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.trace.readers import open_trace


class Gathered(NamedTuple):
    """All chunks of a trace put together."""

    records: np.ndarray
    gva: np.ndarray | None
    carry: dict[str, np.ndarray]
    ignored: tuple[str, ...]
    chunks: int


class Trickle:
    """A source that gives a few bytes at a time and offers nothing but ``read``."""

    def __init__(self, body: bytes, step: int = 7) -> None:
        self._body, self._step, self._position = body, step, 0

    def read(self, size: int = -1, /) -> bytes:
        step = self._step if size < 0 else min(size, self._step)
        piece = self._body[self._position : self._position + step]
        self._position += len(piece)
        return piece


def gather(format: str, body: Any, **options: Any) -> Gathered:
    source = io.BytesIO(body) if isinstance(body, bytes | bytearray) else body
    reader = open_trace(format, source, **options)
    records, gva, carry, chunks = [np.zeros((0, 2), np.uint64)], [], {}, 0
    for chunk in reader:
        chunks += 1
        assert chunk.records.dtype == np.uint64 and chunk.records.flags.c_contiguous and chunk.records.flags.writeable
        records.append(chunk.records.copy())
        if chunk.gva is not None:
            gva.append(chunk.gva.copy())
        for name, values in chunk.carry.items():
            assert len(values) == len(chunk.records)
            carry.setdefault(name, []).append(values.copy())
    return Gathered(
        np.concatenate(records),
        np.concatenate(gva) if gva else None,
        {name: np.concatenate(parts) for name, parts in carry.items()},
        reader.ignored_columns,
        chunks,
    )


def rows(*fields: Sequence[int]) -> list[list[int]]:
    """The two words of each (gpa, size, access, vcpu)."""
    return [[gpa, size | access << 16 | vcpu << 32] for gpa, size, access, vcpu in fields]


def table(count=1_000, **more):
    """That many accesses of 4 bytes, one after the other; columns that are given come beside or instead."""
    return pa.table(
        {
            "gpa": pa.array(np.arange(count, dtype=np.uint64)),
            "size": pa.array(np.full(count, 4, np.uint8)),
        }
        | more
    )


def arrow_body(table: pa.Table | pa.RecordBatch, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write(table)
    return sink.getvalue()


def parquet_body(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def json_body(table: pa.Table) -> bytes:
    return json.dumps({"accesses": table.to_pylist()}).encode()


def ndjson_body(table: pa.Table) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in table.to_pylist())


ENCODERS: Mapping[str, Callable[[pa.Table], bytes]] = {
    "arrow": arrow_body,
    "parquet": parquet_body,
    "json": json_body,
    "ndjson": ndjson_body,
}


@pytest.fixture
def read() -> Callable[..., Gathered]:
    return gather


@pytest.fixture
def words() -> Callable[..., list[list[int]]]:
    return rows


@pytest.fixture
def trickle() -> type[Trickle]:
    return Trickle


@pytest.fixture(params=sorted(ENCODERS))
def named(request: pytest.FixtureRequest) -> tuple[str, Callable[[pa.Table], bytes]]:
    """Each format with column names, and its encoder."""
    return request.param, ENCODERS[request.param]


@pytest.fixture(params=sorted(ENCODERS.keys() - {"parquet"}))
def streamed(request: pytest.FixtureRequest) -> tuple[str, Callable[[pa.Table], bytes]]:
    """Each of them that is read while it arrives."""
    return request.param, ENCODERS[request.param]
