"""ELF images with a symbol table, such as ``vmlinux``: names, addresses, and the sizes that the compiler wrote.

System V ABI, chapter 4 (gABI), and its x86-64 supplement. Sizes of objects in ``.symtab`` are those of their types in
DWARF, which is not read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidValue
from engine.symbols.table import SYMBOL_MEMORY, SymbolTable, Take, check_count, check_name, table_of

MAGIC = b"\x7fELF"
_HEADER_SIZE = 64
_CLASS_64, _LITTLE_ENDIAN = 2, 1
_MACHINES = {
    3: "i386", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "S390", 40: "ARM", 62: "x86-64", 183: "AArch64",
    243: "RISC-V", 258: "LoongArch",
}  # fmt: skip
_X86_64 = 62
_TYPES = {1: "an object file whose addresses are not final", 4: "a core dump: it has memory, and no symbols"}
_SHT_SYMTAB, _SHT_DYNSYM = 2, 11
_SHN_UNDEF = 0
# STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_GNU_IFUNC: what has an address; sections, files and TLS have none of their own.
_ADDRESSED = (0, 1, 2, 10)

_HEADER = np.dtype(
    [("ident", "V16"), ("type", "<u2"), ("machine", "<u2"), ("version", "<u4"), ("entry", "<u8"), ("phoff", "<u8"),
     ("shoff", "<u8"), ("flags", "<u4"), ("ehsize", "<u2"), ("phentsize", "<u2"), ("phnum", "<u2"),
     ("shentsize", "<u2"), ("shnum", "<u2"), ("shstrndx", "<u2")]
)  # fmt: skip
_SECTION = np.dtype(
    [("name", "<u4"), ("type", "<u4"), ("flags", "<u8"), ("addr", "<u8"), ("offset", "<u8"), ("size", "<u8"),
     ("link", "<u4"), ("info", "<u4"), ("addralign", "<u8"), ("entsize", "<u8")]
)  # fmt: skip
_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"), ("size", "<u8")]
)


def read(data: bytes, take: Take) -> SymbolTable:
    """The table of ``.symtab``, or of ``.dynsym`` where that is all there is. Raises InvalidValue, and as ``take``."""
    header = _header(data)
    count = int(header["shnum"])
    sections = _records(data, _SECTION, int(header["shoff"]), count, "section headers")
    for kind in (_SHT_SYMTAB, _SHT_DYNSYM):
        for section in sections[sections["type"] == kind]:
            take(SYMBOL_MEMORY * (int(section["size"]) // _SYMBOL.itemsize))
            return _table(data, sections, section)
    raise _refusal("has no symbol table: it was stripped. Take the vmlinux with debug information", "sections", count)


def _header(data: bytes) -> np.void:
    if len(data) < _HEADER_SIZE:
        raise _refusal(f"ends at byte {len(data)}, inside its ELF header of {_HEADER_SIZE}", "body", len(data))
    if data[4] != _CLASS_64 or data[5] != _LITTLE_ENDIAN:
        raise _refusal("must be a 64-bit little-endian ELF image, of x86-64", "EI_CLASS, EI_DATA", list(data[4:6]))
    header: np.void = np.frombuffer(data, _HEADER, 1)[0]
    machine = int(header["machine"])
    if machine != _X86_64:
        named = _MACHINES.get(machine, "another processor")
        raise _refusal(f"is an image of {named}; expected x86-64 ({_X86_64})", "e_machine", machine)
    if (unfit := _TYPES.get(int(header["type"]))) is not None:
        raise _refusal(f"is {unfit}; expected a linked image, such as vmlinux", "e_type", int(header["type"]))
    if int(header["shentsize"]) != _SECTION.itemsize and header["shnum"]:
        raise _refusal(f"expected section headers of {_SECTION.itemsize} bytes", "e_shentsize", header["shentsize"])
    return header


def _table(data: bytes, sections: NDArray[np.void], section: np.void) -> SymbolTable:
    size, link = int(section["size"]), int(section["link"])
    if int(section["entsize"]) != _SYMBOL.itemsize or size % _SYMBOL.itemsize:
        raise _refusal(f"expected symbols of {_SYMBOL.itemsize} bytes", "sh_entsize", section["entsize"])
    if link >= len(sections):
        raise _refusal("the symbol table names no table of strings", "sh_link", link)
    check_count(size // _SYMBOL.itemsize)
    rows = _records(data, _SYMBOL, int(section["offset"]), size // _SYMBOL.itemsize, "the symbol table")
    strings = sections[link]
    begin, length = int(strings["offset"]), int(strings["size"])
    if begin + length > len(data):
        raise _cut("the table of names", begin + length, len(data))
    named = (rows["name"] != 0) & (rows["shndx"] != _SHN_UNDEF) & np.isin(rows["info"] & 15, _ADDRESSED)
    rows = rows[named]
    texts = data[begin : begin + length]
    names = [_name(texts, at, index) for index, at in zip(np.flatnonzero(named).tolist(), rows["name"].tolist())]
    return table_of(names, rows["value"].astype(np.uint64), rows["size"].astype(np.uint64))


def _name(texts: bytes, at: int, index: int) -> bytes:
    end = texts.find(b"\0", at)
    if at >= len(texts) or end < 0:
        raise _refusal(f"symbol {index}: its name lies outside the table of names", "st_name", at)
    name = texts[at:end]
    check_name(name, f"symbol {index}")
    return name


def _records(data: bytes, kind: np.dtype[np.void], offset: int, count: int, what: str) -> NDArray[np.void]:
    if offset + count * kind.itemsize > len(data):
        raise _cut(what, offset + count * kind.itemsize, len(data))
    return np.frombuffer(data, kind, count, offset) if count else np.zeros(0, kind)


def _cut(what: str, end: int, size: int) -> InvalidValue:
    return _refusal(f"ends at byte {size}, and {what} would end at byte {end}: is the file cut?", "body", size)


def _refusal(rule: str, field: str, value: object) -> InvalidValue:
    number = int(value) if isinstance(value, np.integer) else value
    return InvalidValue(rule if field == "body" else f"{field}: {rule}", field="body", value=number)
