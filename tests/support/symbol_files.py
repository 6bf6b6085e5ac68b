"""Files of symbols as tools write them, made from a list of symbols."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Sequence
from typing import Any

# (address, type letter, name, size) of a kernel that is where it was linked.
KERNEL: tuple[tuple[int, str, str, int], ...] = (
    (0x1F000, "A", "cpu_info", 0x100),
    (0xFFFFFFFF81000000, "T", "_text", 0),
    (0xFFFFFFFF81000000, "T", "startup_64", 0x40),
    (0xFFFFFFFF81000040, "t", "verify_cpu", 0xC0),
    (0xFFFFFFFF82000360, "D", "sys_call_table", 3616),
    (0xFFFFFFFF82001180, "R", "linux_banner", 0x80),
    (0xFFFFFFFF82A1A010, "D", "phys_base", 8),
    (0xFFFFFFFF82A1A018, "D", "page_offset_base", 8),
    (0xFFFFFFFF82A5C6A0, "D", "modprobe_path", 256),
    (0xFFFFFFFF82A5C7A0, "D", "poweroff_cmd", 256),
    (0xFFFFFFFF82C00000, "b", "twice", 16),
    (0xFFFFFFFF82C00010, "b", "twice", 16),
    (0xFFFFFFFF82C00020, "B", "_end", 0),
)
MODULE = "ffffffffc0201000 t e1000_probe\t[e1000]"
BANNER = b"Linux version 6.1.0-9-amd64 (debian-kernel@lists.debian.org) #1 SMP\n\0"
MAP = 0xFFFFFFFF80000000

Rows = Sequence[tuple[int, str, str, int]]


def kallsyms(rows: Rows = KERNEL, *, slide: int = 0, more: Iterable[str] = (MODULE,), end: str = "\n") -> bytes:
    """``cat /proc/kallsyms``."""
    lines = [f"{address + (slide if address >= MAP else 0):016x} {kind} {name}" for address, kind, name, _ in rows]
    return "".join(line + end for line in [*lines, *more]).encode()


def isf(rows: Rows = KERNEL, banner: bytes | None = None, **members: Any) -> bytes:
    """What dwarf2json writes: each symbol an array of chars, or a struct where it is large."""
    symbols: dict[str, Any] = {}
    for address, _, name, size in rows:
        kind: dict[str, Any] = {"kind": "base", "name": "void"}
        if size:
            kind = {"kind": "array", "count": size, "subtype": {"kind": "base", "name": "char"}}
        symbols[name] = {"type": kind, "address": address}
    if banner is not None:
        symbols["linux_banner"]["constant_data"] = base64.b64encode(banner).decode()
    document = {
        "metadata": {"format": "6.2.0", "producer": {"name": "dwarf2json", "version": "0.8.0"}},
        "base_types": {
            "char": {"size": 1, "signed": True, "kind": "char", "endian": "little"},
            "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
            "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
        },
        "user_types": {
            "cred": {"size": 176, "kind": "struct", "fields": {"uid": {"offset": 4, "type": {"kind": "base"}}}}
        },
        "enums": {"state": {"size": 4, "base": "int", "constants": {"ON": 1}}},
        "symbols": symbols,
    }
    return json.dumps({**document, **members}).encode()


def elf(rows: Rows = KERNEL, *, machine: int = 62, kind: int = 2, bits: int = 2, table: int = 2) -> bytes:
    """A linked image that has nothing but a symbol table."""
    strings, symbols = bytearray(1), bytearray(24)
    for address, letter, name, size in rows:
        info = (0 if letter.islower() else 1) << 4 | (2 if letter in "tT" else 1)
        symbols += struct.pack("<IBBHQQ", len(strings), info, 0, 1, address, size)
        strings += name.encode() + b"\0"
    offset = 64
    end = offset + len(symbols) + len(strings)
    ident = bytes([0x7F, 0x45, 0x4C, 0x46, bits, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 0, end, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, table, 0, 0, offset, len(symbols), 2, 0, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, offset + len(symbols), len(strings), 0, 0, 1, 0)
    return header + symbols + strings + sections
