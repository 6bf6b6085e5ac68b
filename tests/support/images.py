"""Writers of memory images, from the layouts of the formats and not from the readers."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

LIME_MAGIC = 0x4C694D45
QEMU_NOTE_BYTES = 440


def lime(*ranges: tuple[int, bytes], magic: int = LIME_MAGIC, version: int = 1) -> bytes:
    """A LiME image; the end of a range is its last byte."""
    return b"".join(struct.pack("<IIQQQ", magic, version, gpa, gpa + len(data) - 1, 0) + data for gpa, data in ranges)


def note(name: bytes, kind: int, description: bytes) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return struct.pack("<III", len(name) + 1, len(description), kind) + padded(name + b"\0") + padded(description)


def qemu_note(registers: Mapping[str, int], version: int = 1) -> bytes:
    """QEMUCPUState: general registers, ten segments, CR0 to CR4, KERNEL_GS_BASE."""
    general = [registers.get(name, 0) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")]
    general += [0] * 8 + [registers.get("rip", 0), registers.get("rflags", 2)]
    segments = struct.pack("<IIIIQ", 8, 0xFFFFFFFF, 0xA09B00, 0, 0) * 10
    controls = [registers.get(f"cr{n}", 0) for n in range(5)]
    state = struct.pack("<II18Q", version, QEMU_NOTE_BYTES, *general) + segments + struct.pack("<6Q", *controls, 0)
    assert len(state) == QEMU_NOTE_BYTES
    return note(b"QEMU", 0, state)


def elf_core(
    segments: Sequence[tuple[int, bytes]],
    notes: bytes = b"",
    *,
    bits: int = 64,
    machine: int = 62,
    kind: int = 4,
    ident: bytes | None = None,
    loads: Sequence[tuple[int, int, int]] | None = None,
    **header: Any,
) -> bytes:
    """An ELF core with its notes first, as QEMU writes it. ``loads`` are (offset from the first byte of memory, GPA,
    size) of the program headers where they are not those of ``segments``; ``header`` are members of the header that are
    to be others than they should: ``phnum``, ``phoff``, ``phentsize``."""
    wide = bits == 64
    head, entry = (64, 56) if wide else (52, 32)
    memory = b"".join(data for _, data in segments)
    if loads is None:
        at, loads = 0, []
        for gpa, data in segments:
            loads = [*loads, (at, gpa, len(data))]
            at += len(data)
    count = len(loads) + 1
    first_note = head + entry * count
    first = first_note + len(notes)
    rows = [(4, first_note, 0, len(notes)), *((1, first + at, gpa, size) for at, gpa, size in loads)]
    if wide:
        programs = [struct.pack("<IIQQQQQQ", t, 0, at, 0, gpa, size, size, 0) for t, at, gpa, size in rows]
    else:
        programs = [struct.pack("<8I", t, at, 0, gpa, size, size, 0, 0) for t, at, gpa, size in rows]
    start = ident or b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    members = (kind, machine, 1, 0, header.get("phoff", head), 0, 0, head, header.get("phentsize", entry))
    layout = "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH"
    return (
        start + struct.pack(layout, *members, header.get("phnum", count), 0, 0, 0) + b"".join(programs) + notes + memory
    )
