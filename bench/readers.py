"""Reading traces of tools: bodies in memory, made of one recorded trace or of the same accesses again and again."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pyarrow as pa
from pyarrow import csv

from engine.trace.readers import open_trace

ITEMS = 1_000_000
LINES = 250_000  # of each further tool: all bodies are in memory together
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


# Lines as each tool writes most of its own; the address grows by eight bytes from one to the next.
_HEADINGS = {"perf-mem": b"# PID, TID, IP, ADDR, LOCAL WEIGHT, DSRC, SYMBOL\n"}
_LINES: Mapping[str, bytes] = {
    "drmemtrace": b"           6           1:        4242 write        8 byte(s) @ 0x%016x by PC 0x0000000000401624\n",
    "execlog": b'0, 0x7c0d, "movb %%al, (%%di)", store, 0x%08x, RAM\n',
    "bochs": b"[CPU0 WR]: LIN 0x0000000000004000 PHY 0x%012x (len=4, UC): 0x00001234\n",
    "gem5": b"  77000: system.physmem: Write from system.cpu.data of size 8 on address 0x%x data 0x4d C\n",
    "ftrace": (
        b"       CPU 0/KVM-4242    [001] .....  1204.000102: "
        b"kvm_page_fault: vcpu 0 rip 0xffffffff81123456 address 0x%016x error_code 0x182\n"
    ),
    "perf-script": b"               w  4242 1132.196672: page-faults:     %12x ffffffff817554ea\n",
    "perf-mem": b"4242,4242,0x7fceddc48b70,0x%x,30,0x68100844,/usr/bin/w:main\n",
    "hyperdbg": (
        b"[+] 0x1 hit, process id: 0x4, core: 0x0, context (address): 0xfffff805%08x, "
        b"rip: 0xfffff80511000123, access: write\n"
    ),
}


def _lines(name: str) -> bytes:
    return _HEADINGS.get(name, b"") + b"".join(_LINES[name] % (0x2A5C000 + 8 * n) for n in range(LINES))


# Lines, rows and instructions: what is counted of each.
FORMATS: Mapping[str, Callable[[], bytes]] = {
    "lackey": _lackey,
    "csv": _csv,
    ARROW_ALONE: _csv,
    "champsim": _champsim,
    **{name: partial(_lines, name) for name in _LINES},
}


class Reading:
    """One body, read to its end. ``items`` are its lines, rows or instructions, ``records`` what came of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._body = FORMATS[name]()
        self.items = LINES if name in _LINES else ITEMS
        self.records = 0

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        if self._name == ARROW_ALONE:
            options = csv.ReadOptions(use_threads=False)
            self.records = csv.read_csv(pa.BufferReader(self._body), read_options=options).num_rows
        else:
            self.records = sum(len(chunk.records) for chunk in open_trace(self._name, io.BytesIO(self._body)))
