"""Writes that are all refused, and writes that are all the first ones of their pages: what a record costs beside the
fast path."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.data import RAM_BYTES, Policy, Trace
from bench.http_replay import HttpReplay
from bench.servers import service
from engine.arch.access import WRITE
from engine.trace.results import ExitColumns
from service.runtime.exit_parts import stored
from service.runtime.traces import PART
from service.storage.columns import pack

EXITS = 4_000_000
PAGE = 4096
FULL = (1 << 32) - 1


def refused() -> tuple[Trace, Policy]:
    """Writes to 64 objects of two sub-pages each, in no order, after one to each page that is allowed."""
    rng = np.random.default_rng(4)
    first = np.arange(64, dtype=np.uint64) * np.uint64(3 * PAGE) + np.uint64(0x100080)
    gpa = rng.choice(first, EXITS) + rng.integers(0, 31, EXITS).astype(np.uint64) * np.uint64(8)
    gpa[:64] = first - np.uint64(0x80)
    objects = [{"name": f"object{i}", "gpa": at, "size": 256} for i, at in enumerate(first.tolist())]
    pages = [(at // PAGE, 1, FULL & ~0b110) for at in first.tolist()]
    return _trace("refused", gpa), Policy("objects", objects, pages)


def touched() -> tuple[Trace, Policy]:
    """One write to each page of the guest's memory, of which one in a thousand has an object elsewhere."""
    gpa = np.arange(0, RAM_BYTES, PAGE, dtype=np.uint64) + np.uint64(0x800)
    some = gpa[::1000].tolist()
    objects = [{"name": f"object{i}", "gpa": at - 0x800, "size": 64} for i, at in enumerate(some)]
    return _trace("touched", gpa), Policy("elsewhere", objects, [(at // PAGE, 1, FULL & ~1) for at in some])


def _trace(name: str, gpa: np.ndarray) -> Trace:
    records = np.empty((len(gpa), 2), dtype=np.uint64)
    records[:, 0], records[:, 1] = gpa, 8 | WRITE << 16
    return Trace(name, records, gpa, np.full(len(gpa), 8, dtype=np.uint8))


def stored_bytes(exits: ExitColumns) -> int:
    """What a store keeps of exit records."""
    return sum(len(pack(stored(exits[at : at + PART]))) for at in range(0, len(exits), PART))


@contextmanager
def durable(trace: Trace, policy: Policy) -> Iterator[HttpReplay]:
    """The same over HTTP, as Arrow, until SQLite has it."""
    folder = tempfile.TemporaryDirectory(prefix="subpage-bench-")
    with folder, service(f"sqlite:///{Path(folder.name) / 'bench.db'}") as port:
        replay = HttpReplay(port, "arrow", trace, policy)
        yield replay
        replay.close()
