"""``/proc/kallsyms`` and System.map: a line for each symbol, ``address type name``, and ``[module]`` behind some.

proc(5), and nm(1) for System.map. Nothing says how large a symbol is. Windows line ends are taken, too: so a serial
console writes them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from engine.errors import InvalidValue
from engine.symbols.table import (
    MAX_NAME,
    MAX_SYMBOLS,
    SYMBOL_MEMORY,
    SymbolTable,
    Take,
    check_count,
    check_name,
    table_of,
)

_LINE = re.compile(rb"([0-9a-fA-F]+) ([A-Za-z?-]) ([^\s\x00]+)(?:[ \t]+(\[[^\s\x00\]]+\]))?")
_EXPECTED = "expected an address of 1 to 16 hexadecimal digits, a letter, and a name, with spaces between them"
_LONGEST = 2 * MAX_NAME
_PLACEHOLDER = b"The real System.map is in"


def read(data: bytes, take: Take) -> SymbolTable:
    """The table of such a file. Raises InvalidValue, which names the line, and what ``take`` raises."""
    take(SYMBOL_MEMORY * min(data.count(b"\n"), MAX_SYMBOLS))
    names: list[bytes] = []
    addresses: list[int] = []
    for number, line in _lines(data):
        found = _LINE.fullmatch(line)
        if found is None or len(found[1]) > 16:
            raise _refusal(number, line)
        check_name(found[3], f"line {number}")
        names.append(found[3] if found[4] is None else found[3] + b" " + found[4])
        addresses.append(int(found[1], 16))
        check_count(len(names))
    if names and not any(addresses):
        rule = (
            "every address is 0: the kernel hides them (kernel.kptr_restrict). Read /proc/kallsyms as root, after "
            "`sysctl kernel.kptr_restrict=1`"
        )
        raise InvalidValue(rule, field="body", value="0")
    return table_of(names, addresses, [0] * len(names))


def looks_like(data: bytes) -> bool:
    """Whether the first lines are of this form."""
    begun = [line for _, line in _lines(data[:_LONGEST])][:3]
    return bool(begun) and all(map(_LINE.fullmatch, begun[: max(1, len(begun) - 1)]))


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, text without its end) of every line that is not empty."""
    for number, line in enumerate(io.BytesIO(data), 1):
        if line := line.rstrip(b"\r\n"):
            yield number, line


def _refusal(number: int, line: bytes) -> InvalidValue:
    text = line[:100].decode(errors="replace")
    if _PLACEHOLDER in line:
        rule = f"line {number}: is a placeholder, not a table: {text}; or take /proc/kallsyms of the running guest"
        return InvalidValue(rule, field="body", value=text)
    expected = _EXPECTED
    digits = re.match(rb"[0-9a-fA-F]*", line)
    if len(line) > _LONGEST:
        expected = f"a line has at most {_LONGEST} bytes; {_EXPECTED}"
    elif digits is not None and len(digits[0]) > 16:
        expected = f"an address has 64 bits; {_EXPECTED}"
    return InvalidValue(f"line {number}: {expected}", field="body", value=text)
