"""The symbols of a machine, and the bytes that they are kept as."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from engine.symbols.placement import Placement
from engine.symbols.table import SymbolTable

# Columns of the table in the order in which they are kept, behind a line of JSON; the names come last.
_COLUMNS = (
    ("addresses", "<u8", 0),
    ("sizes", "<u8", 0),
    ("assumed", "?", 0),
    ("bounds", "<u4", 1),
    ("hashes", "<u8", 0),
    ("by_hash", "<u4", 0),
)


@dataclass(frozen=True, slots=True)
class Symbols:
    """The symbols of one guest: their table with the guest's own addresses, and where those are in its memory."""

    format: str
    table: SymbolTable
    placement: Placement


def packed(symbols: Symbols) -> bytes:
    """The symbols as bytes."""
    table = symbols.table
    head = {"format": symbols.format, "count": len(table), "placement": asdict(symbols.placement)}
    columns = [getattr(table, name).astype(kind).tobytes() for name, kind, _ in _COLUMNS]
    return b"".join([json.dumps(head).encode(), b"\n", *columns, table.names])


def unpacked(data: bytes) -> Symbols:
    """The symbols that ``packed`` made bytes of."""
    at = data.index(b"\n") + 1
    head = json.loads(data[:at])
    columns = {}
    for name, kind, more in _COLUMNS:
        columns[name] = np.frombuffer(data, kind, head["count"] + more, at)
        at += columns[name].nbytes
    return Symbols(head["format"], SymbolTable(**columns, names=data[at:]), Placement(**head["placement"]))
