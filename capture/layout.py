"""The shared memory between QEMU and the reader, as ``ring.h`` has it; a test compares the two."""

from __future__ import annotations

import numpy as np

MAGIC = 0x31474E4952425553
VERSION = 1
HEADER_BYTES = 4096

MADE, LOADED, STARTED, ENDED = range(4)  # states of the recorder

KERNEL, SPLIT = 1, 2  # flags of a record

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
        ("reserved", "<u8", 9),
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
        ("reserved2", "<u8", 5),
    ]
)

RECORD = np.dtype(
    [
        ("gpa", "<u8"),
        ("gva", "<u8"),
        ("pc", "<u8"),
        ("size", "|u1"),
        ("vcpu", "|u1"),
        ("flags", "|u1"),
        ("reserved", "|u1"),
        ("lap", "<u4"),
    ]
)
