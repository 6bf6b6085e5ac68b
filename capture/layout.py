"""The shared memory between QEMU and the reader, as ``ring.h`` has it; a test compares the two."""

from __future__ import annotations

from typing import Any

import numpy as np

MAGIC = 0x31474E4952425553
VERSION = 4
HEADER_BYTES = 4096

MADE, LOADED, STARTED, ENDED, STOPPED = range(5)  # states of the recorder

KERNEL, SPLIT, HELD = 1, 2, 4  # flags of a record

GUARD_SHIFT = 7  # a guard is a bit for each 128 bytes
GUARD_BYTES = 1 << 24  # 16 GiB of memory; what no guard is set in is never there

HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("record_bytes", "<u4"),
        ("capacity", "<u8"),
        ("start_pc", "<u8"),
        ("start_n", "<u8"),
        ("low_gpa", "<u8"),
        ("high_gpa", "<u8"),
        ("guard_bytes", "<u8"),
        ("stop_pc", "<u8"),
        ("stop_n", "<u8"),
        ("wide", "<u8"),
        ("sample", "<u8"),
        ("reserved", "<u8", 3),
        ("several", "<u4"),
        ("reserved1", "<u4"),
        ("head", "<u8"),
        ("state", "<u4"),
        ("interface", "<u4"),
        ("waits", "<u8"),
        ("elsewhere", "<u8"),
        ("devices", "<u8"),
        ("unknown", "<u8"),
        ("split", "<u8"),
        ("loads", "<u8"),
        ("tail", "<u8"),
        ("wanted", "<u8"),
        ("closed", "<u8"),
        ("judged", "<u8"),
        ("guarding", "<u8"),
        ("reserved2", "<u8", 3),
    ]
)

_FIELDS: list[Any] = [
    ("gpa", "<u8"),
    ("gva", "<u8"),
    ("pc", "<u8"),
    ("size", "|u1"),
    ("vcpu", "|u1"),
    ("flags", "|u1"),
    ("reserved", "|u1"),
    ("lap", "<u4"),
]
RECORD = np.dtype(_FIELDS)
# With CR3, and the first ``size`` bytes of ``value`` as they were stored.
WIDE_RECORD = np.dtype([*_FIELDS, ("cr3", "<u8"), ("value", "|u1", 16), ("reserved2", "<u8")])
