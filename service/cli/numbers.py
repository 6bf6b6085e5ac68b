"""Numbers of the command line: addresses, sizes, ranges of memory. What is none is a mistake of the command line."""

from __future__ import annotations

import re

import typer

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"(0x[0-9a-f]{1,16}|[0-9]{1,20})\s*(?:([kmgt])(?:ib)?)?", re.IGNORECASE)


def size_of(text: str) -> int | None:
    """``4GiB``, ``512M``, ``0x1000`` in bytes, None for what is no size."""
    found = _SIZE.fullmatch(text.strip())
    return (
        int(found[1], 0 if found[1][:2].lower() == "0x" else 10) << _UNITS[(found[2] or "").lower()] if found else None
    )


def parse_size(text: str) -> int:
    """A size in bytes. Raises BadParameter."""
    if (size := size_of(text)) is None or not 0 < size < 1 << 64:
        raise typer.BadParameter(f"must be a size such as 1GiB, 512M or 0x1000, not {text}")
    return size


def parse_range(text: str) -> tuple[int, int]:
    """``GPA:SIZE`` as first address and first address behind it. Raises BadParameter."""
    gpa, _, size = text.partition(":")
    begin, length = number_of(gpa), size_of(size)
    if begin is None or not length:
        raise typer.BadParameter(f"must be GPA:SIZE, such as 0:3GiB or 0x100000000:0x40000000, not {text}")
    return begin, begin + length


def number_of(text: str) -> int | None:
    """A number, decimal or 0x, below 2^64; None for what is none."""
    try:
        found = int(text, 0)
    except ValueError:
        return None
    return found if 0 <= found < 1 << 64 else None


def parse_number(text: str) -> int:
    """An address or a number of a page. Raises BadParameter."""
    if (found := number_of(text)) is None:
        raise typer.BadParameter(f"must be a number such as 0x100000 or 4096, not {text}")
    return found


def parse_signed(text: str) -> int:
    """A displacement: with a sign, or in two's complement. Raises BadParameter."""
    try:
        found = int(text, 0)
    except ValueError:
        raise typer.BadParameter(f"must be a number, decimal or 0x…, not {text}") from None
    return found - (1 << 64) if 1 << 63 <= found < 1 << 64 else found


def parse_word(text: str) -> int:
    """A bitmap of 32 bits. Raises BadParameter."""
    if (found := number_of(text)) is None or found >= 1 << 32:
        raise typer.BadParameter(f"must be a word of 32 bits such as 0xffff00ff, not {text}")
    return found
