"""Reading traces of tools: bodies in memory, made of one recorded trace or of the same accesses again and again."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
from pyarrow import csv

from engine.trace.readers import open_trace

ITEMS = 1_000_000
ARROW_ALONE = "Arrow's CSV reader"


def _lackey() -> bytes:
    return b"".join(b"I  0040%04x,4\n S 1fff%06x,8\n" % (n & 0xFFFF, 8 * n & 0xFFFFFF) for n in range(ITEMS // 2))


def _csv() -> bytes:
    return b"gpa,size,access\n" + b"".join(b"0x%x,8,1\n" % (0x2A5C000 + 8 * n) for n in range(ITEMS))


def _champsim() -> bytes:
    body = np.zeros((ITEMS, 8), dtype="<u8")
    body[:, 0] = 0x400000 + 4 * np.arange(ITEMS)
    body[:, 2] = 0x4A9000 + 8 * np.arange(ITEMS)
    body[:, 4] = 0x7FF000
    return body.tobytes()


# Lines, rows and instructions: what is counted of each.
FORMATS: Mapping[str, Callable[[], bytes]] = {
    "lackey": _lackey,
    "csv": _csv,
    ARROW_ALONE: _csv,
    "champsim": _champsim,
}


class Reading:
    """One body, read to its end. ``items`` are its lines, rows or instructions, ``records`` what came of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._body = FORMATS[name]()
        self.items = ITEMS
        self.records = 0

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        if self._name == ARROW_ALONE:
            options = csv.ReadOptions(use_threads=False)
            self.records = csv.read_csv(pa.BufferReader(self._body), read_options=options).num_rows
        else:
            self.records = sum(len(chunk.records) for chunk in open_trace(self._name, io.BytesIO(self._body)))
