"""The same accesses as a body of every format."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

JSON = "application/json"
NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"
PACKED = "application/octet-stream"

RECORD16 = np.dtype([("gpa", "<u8"), ("size", "<u2"), ("access", "u1"), ("z", "u1"), ("vcpu", "<u2"), ("zz", "<u2")])


class Body(NamedTuple):
    """What to send: bytes, their type, and the query that goes with them."""

    content: bytes
    media: str
    query: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": self.media}


def arrow(table: pa.Table, batch: int | None = None) -> Body:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return Body(sink.getvalue(), ARROW)


def parquet(table: pa.Table) -> Body:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return Body(sink.getvalue(), PARQUET)


def packed(table: pa.Table) -> Body:
    rows = np.zeros(len(table), dtype=RECORD16)
    rows["size"], rows["access"] = 8, 1
    for name in ("gpa", "size", "access", "vcpu"):
        if name in table.column_names:
            rows[name] = table[name].to_numpy()
    return Body(rows.tobytes(), PACKED, "record=record16")


def gpa8(gpas: Sequence[int]) -> Body:
    return Body(np.array(gpas, dtype="<u8").tobytes(), PACKED, "record=gpa8")


def as_json(table: pa.Table) -> Body:
    return Body(json.dumps({"accesses": table.to_pylist()}).encode(), JSON)


def ndjson(table: pa.Table) -> Body:
    return Body(b"".join(json.dumps(row).encode() + b"\n" for row in table.to_pylist()), NDJSON)


FORMATS = {"arrow": arrow, "parquet": parquet, "packed": packed, "json": as_json, "ndjson": ndjson}


def table(**columns: Any) -> pa.Table:
    """Columns in the widths that traces have."""
    kinds = {"gpa": pa.uint64(), "gva": pa.uint64(), "size": pa.uint16(), "access": pa.uint8(), "vcpu": pa.uint16()}
    return pa.table({name: pa.array(values, kinds.get(name)) for name, values in columns.items()})
