"""The forms in which files of symbols come: one table, which the API, the command line and the errors are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import InvalidValue
from engine.symbols import elf, isf, lines
from engine.symbols.table import SymbolTable, Take

# Bytes that a packed file may unpack to, unless whoever reads it says otherwise.
MOST = 128 << 20
# Of a file that may be something else.
_LOOKED_AT = 1 << 13


@dataclass(frozen=True, slots=True)
class SymbolFile:
    """What a file says. ``banner`` is the text of ``linux_banner`` in the kernel that it is of, where it has that."""

    format: str
    table: SymbolTable
    banner: bytes | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """One form: what it is, for people, and how a file of it is read: ``(bytes, most, take)``."""

    about: str
    read: Callable[[bytes, int, Take], tuple[SymbolTable, bytes | None]]


FORMATS = {
    "kallsyms": Format("/proc/kallsyms of the running guest", lambda data, most, take: (lines.read(data, take), None)),
    "system-map": Format("System.map of a kernel", lambda data, most, take: (lines.read(data, take), None)),
    "isf": Format("Volatility 3's symbol file: JSON, or JSON in xz, gzip or bzip2", isf.read),
    "elf": Format(
        "an ELF image with a symbol table, such as vmlinux", lambda data, most, take: (elf.read(data, take), None)
    ),
}
# What others begin with, and what to do with them.
_FOREIGN = (
    (0x202, b"HdrS", "is a kernel's boot image: its vmlinux has the symbols (scripts/extract-vmlinux of the kernel)"),
    (0, b"\x28\xb5\x2f\xfd", "is packed with zstd: unpack it first"),
    (0, b"MZ", "is a PE image: only ELF images are read"),
)


def format_of(data: bytes) -> str:
    """What a file is, by its first bytes. Raises InvalidValue."""
    if data.startswith(elf.MAGIC):
        return "elf"
    if data.startswith(isf.PACKED) or data.lstrip()[:1] == b"{":
        return "isf"
    if lines.looks_like(data):
        return "kallsyms"
    rule = next((rule for at, magic, rule in _FOREIGN if data[at : at + len(magic)] == magic), None)
    expected = "; ".join(f"{name}: {item.about}" for name, item in FORMATS.items())
    raise InvalidValue(rule or f"is no file of symbols that is known here. Known are {expected}", field="body")


def read(data: bytes, format: str | None = None, most: int = MOST, take: Take = lambda size: None) -> SymbolFile:
    """The symbols in a file of a form, or of the one that it looks like.

    ``most`` is what it may unpack to; ``take`` is asked for the memory that this needs, and may refuse. Raises
    InvalidValue that names the line, the symbol or the header that is wrong, and what was expected.
    """
    if not data:
        raise InvalidValue("is empty", field="body", value=0)
    found = format_of(data) if format is None else format
    if found not in FORMATS:
        raise InvalidValue(f"must be one of {', '.join(FORMATS)}", field="format", value=found)
    if found == "elf" and not data.startswith(elf.MAGIC):
        raise InvalidValue("is no ELF image: expected 7f 45 4c 46 at its begin", field="body", value=data[:4].hex(" "))
    return SymbolFile(found, *FORMATS[found].read(data, most, take))


def told(data: bytes) -> str | None:
    """What these bytes are, where something else was expected and they are symbols; only the first are looked at."""
    if data.startswith(elf.MAGIC):
        return FORMATS["elf"].about
    if data.startswith(isf.PACKED[0]) or b'"base_types"' in data[:_LOOKED_AT]:
        return FORMATS["isf"].about
    return FORMATS["kallsyms"].about if lines.looks_like(data) else None
