"""Policies made from files of symbols: what ``subpage policy from-symbols`` writes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InvalidValue
from engine.symbols import formats
from engine.symbols.placement import located, phys_base_of, placed, stated
from engine.symbols.stored import Symbols
from service.cli.policy_files import policy_of
from service.platform.failures import Failure, FileError, opened

_OBJECT = re.compile(r"(?P<symbol>[^:+]+?)(?:\+(?P<offset>0x[0-9a-fA-F]+|\d+))?(?::(?P<size>0x[0-9a-fA-F]+|\d+))?")
ASSUMED = "size assumed: up to the next symbol"


class Unplaced(Failure):
    """An object that is wanted and that the symbols have no place for."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """``NAME[+OFFSET][:SIZE]`` of the command line."""

    symbol: str
    offset: int = 0
    size: int | None = None

    @classmethod
    def of(cls, text: str) -> Wanted:
        """Raises Unplaced."""
        found = _OBJECT.fullmatch(text)
        if found is None:
            raise Unplaced(f"--object {text}: must be NAME, NAME:SIZE or NAME+OFFSET:SIZE")
        size, offset = found["size"], found["offset"]
        return cls(found["symbol"], int(offset or "0", 0), None if size is None else int(size, 0))


def read_symbols(
    path: Path,
    format: str | None = None,
    slide: int | None = None,
    phys_base: int | None = None,
    cr3: int | None = None,
) -> Symbols:
    """The symbols in a file, and where the kernel is. Raises FileError."""
    with opened(path) as file:
        data = file.read()
    try:
        found = formats.read(data, format)
        placement = stated(found, slide, phys_base)
        if cr3 is not None and phys_base is None:
            placement = stated(found, slide, phys_base_of(placed(found.table, placement), cr3))
        return Symbols(found.format, placed(found.table, placement), placement)
    except InvalidValue as error:
        where = f"--{error.field.replace('_', '-')} " if error.field in {"slide", "phys_base", "cr3"} else ""
        raise FileError(f"{path}: {where}{error.rule}") from None


def policy_from(symbols: Symbols, wanted: list[Wanted], name: str) -> dict[str, Any]:
    """The policy that protects what is wanted, in the order in which it is. Raises Failure."""
    policy = {"name": name, "objects": [_object(symbols, item) for item in wanted]}
    policy_of(Path(name), policy)
    return policy


def _object(symbols: Symbols, wanted: Wanted) -> dict[str, Any]:
    try:
        gva, gpa, size = located(symbols.table, symbols.placement, wanted.symbol)
    except InvalidValue as error:
        raise Unplaced(f"--object {wanted.symbol}: {error.rule}") from None
    known = symbols.table.find(wanted.symbol)[0]
    given = wanted.size if wanted.size is not None else size - wanted.offset
    if given <= 0:
        rule = "nothing says how large it is" if not size else f"it has {size:#x} bytes"
        raise Unplaced(f"--object {wanted.symbol}: {rule}: say NAME+OFFSET:SIZE")
    made: dict[str, Any] = {
        "name": wanted.symbol if not wanted.offset else f"{wanted.symbol}+{wanted.offset:#x}",
        "gva": hex(gva + wanted.offset),
        "gpa": hex(gpa + wanted.offset),
        "size": given,
    }
    return {**made, "about": ASSUMED} if known.assumed and wanted.size is None else made


def text_of(policy: dict[str, Any]) -> str:
    """A policy as a file that people read: an object a line."""
    rows = ",\n  ".join(json.dumps(item) for item in policy["objects"])
    return f'{{"name": {json.dumps(policy["name"])},\n "objects": [\n  {rows}]}}\n'
