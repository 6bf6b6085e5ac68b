"""The committed traces, policies and answers, in the shapes that the methods take."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support import recorded

TRACES = ("boot", "user")
POLICIES = ("kernel_control_data", "hot_pages_stress")
RAM_BYTES = 1 << 30  # of the recorded guest, at GPA 0
CHUNK = 1 << 18


@dataclass(frozen=True)
class Trace:
    """One recorded trace: ``records`` is uint64[n, 2], 16 bytes each; ``gpa`` and ``size`` are the same as columns."""

    name: str
    records: np.ndarray
    gpa: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    def packed(self) -> bytes:
        """The ``record16`` body."""
        return self.records.tobytes()

    def arrow(self) -> bytes:
        """An Arrow IPC stream of the columns gpa (u64) and size (u8), 64 Ki records per batch."""
        table = pa.table({"gpa": self.gpa, "size": self.size})
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=CHUNK)
        return sink.getvalue()


@dataclass(frozen=True)
class Policy:
    """Named objects, and the same as (first GFN, pages, map of writable sub-pages)."""

    name: str
    objects: list[dict[str, Any]]
    pages: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Answer:
    """What every method that is not a mere count must arrive at."""

    violations: int
    page_granular: int | None = None
    indices_sha256: str | None = None

    def differs(self, other: Answer) -> bool:
        """True if a figure that both have is not the same."""
        pairs = (
            (self.violations, other.violations),
            (self.page_granular, other.page_granular),
            (self.indices_sha256, other.indices_sha256),
        )
        return any(a is not None and b is not None and a != b for a, b in pairs)


@cache
def load_trace(name: str, limit: int | None = None) -> Trace:
    """A trace by name; ``limit`` keeps the first records only."""
    table = pq.read_table(recorded.trace(name), columns=["gpa", "size"])
    gpa, size = (table[column].to_numpy()[:limit].copy() for column in ("gpa", "size"))
    records = np.empty((len(gpa), 2), dtype=np.uint64)
    records[:, 0] = gpa
    records[:, 1] = size.astype(np.uint64) | np.uint64(1 << 16)
    return Trace(name, records, gpa, size)


@cache
def load_policy(name: str) -> Policy:
    raw = json.loads(recorded.policy(name).read_text())
    objects = [{"name": o["name"], "gpa": int(o["gpa"], 16), "size": o["size"]} for o in raw["objects"]]
    return Policy(name, objects, [(first, count, mask) for first, count, mask in raw["pages"]])


def expected(policy: str, trace: str) -> Answer:
    """The ground truth for a whole trace."""
    truth = json.loads(recorded.TRUTH.read_text())[policy][f"{trace}.parquet"]
    return Answer(truth["violations"], truth["page_granular_violations"], truth["indices_sha256"])


def hash_of(indices: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<u8").tobytes()).hexdigest()
