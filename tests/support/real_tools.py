"""A program of real mode whose accesses are known, for tools that run machines, and how each of them runs it.

It is a ROM of its own, so that nothing else runs before it.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.trace.readers import open_trace

QEMU = shutil.which("qemu-system-x86_64")

# Bytes of each instruction, and what it is.
_CODE = (
    ("fa", "cli"),
    ("31c0", "xor ax, ax"),
    ("8ed8", "mov ds, ax"),
    ("8ed0", "mov ss, ax"),
    ("bc0070", "mov sp, 0x7000"),
    ("bf0040", "mov di, 0x4000"),
    ("b90800", "mov cx, 8"),
    ("c6055a", "mov byte [di], 0x5a"),
    ("81c78000", "add di, 0x80"),
    ("e2f7", "loop, back to the store"),
    ("66c706005034120000", "mov dword [0x5000], 0x1234"),
    ("c70608507856", "mov word [0x5008], 0x5678"),
    ("66ff060050", "inc dword [0x5000]"),
    ("50", "push ax"),
    ("a10850", "mov ax, [0x5008]"),
    ("b800b8", "mov ax, 0xb800"),
    ("8ec0", "mov es, ax"),
    ("26880e1000", "mov [es:0x10], cl"),
    ("26a12000", "mov ax, [es:0x20]"),
    ("b000", "mov al, 0"),
    ("e6f4", "out 0xf4, al"),
    ("f4", "hlt"),
    ("ebfd", "jmp, back to it"),
)
_SEGMENT = 0xF0000
# Where it halts, as an address of memory.
HALT = _SEGMENT + sum(len(code) // 2 for code, _ in _CODE[:-2])

READ, WRITE = 0, 1
# (address, bytes, read or write) of all its accesses to data, in order. 0xb8000 is no memory.
ACCESSES = (
    *((0x4000 + 128 * n, 1, WRITE) for n in range(8)),
    *((0x5000, 4, WRITE), (0x5008, 2, WRITE)),
    *((0x5000, 4, READ), (0x5000, 4, WRITE)),  # inc
    *((0x6FFE, 2, WRITE), (0x5008, 2, READ)),
    *((0xB8010, 1, WRITE), (0xB8020, 2, READ)),
)


class Access(NamedTuple):
    """A record of a trace; 0 is what its format does not have."""

    gpa: int
    size: int
    access: int
    vcpu: int
    pc: int
    time: int


def accesses_of(trace: Path, format: str) -> tuple[list[Access], Mapping[str, int]]:
    """The records of a file, which must be recognised by its content, and how many lines were skipped why."""
    reader = open_trace("auto", io.BytesIO(trace.read_bytes()))
    found: list[Access] = []
    for chunk in reader:
        word, none = chunk.records[:, 1], np.zeros(len(chunk.records), dtype=np.uint64)
        fields = (word >> np.uint64(shift) & np.uint64(mask) for shift, mask in ((0, 0xFFFF), (16, 0xFF), (32, 0xFFFF)))
        columns = chunk.records[:, 0], *fields, chunk.carry.get("pc", none), chunk.carry.get("time", none)
        found += map(Access, *(column.tolist() for column in columns))
    assert reader.taken is not None and reader.taken.format == format
    return found, reader.taken.skipped


def rom(folder: Path) -> Path:
    """The 64 KiB below 1 MiB, with a far jump to their begin where a processor starts."""
    code = bytes.fromhex("".join(code for code, _ in _CODE))
    path = folder / "rom.bin"
    path.write_bytes((code.ljust(0xFFF0, b"\xf4") + bytes.fromhex("ea000000f0")).ljust(1 << 16, b"\0"))
    return path


def qemu(folder: Path, *options: object, seconds: int = 240) -> None:
    """Run it to its end in QEMU."""
    assert QEMU is not None
    command = [QEMU, "-m", "16", "-nodefaults", "-display", "none", "-no-reboot", "-bios", rom(folder)]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4", *options]
    done = subprocess.run([*map(str, command)], timeout=seconds, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # what the device makes of 0
