"""Names in exit records: what is at the address of the access, and which function made it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.machine import VirtualMachine
from engine.symbols.placement import GPA_END
from engine.symbols.stored import Symbols
from engine.trace.results import ExitColumns
from service.runtime.offload import maybe_in_thread

# Members of an exit record that only symbols can say.
NAMED = ("symbol", "writer")
_PC = "pc"

# For each record the position of its name, and names; "" where there is none.
Names = tuple[NDArray[np.int64], NDArray[Any]]


async def symbols_of(machine: VirtualMachine) -> Symbols | None:
    """The symbols of a machine, None where it has none."""
    return await maybe_in_thread(False, machine.symbols.all) if machine.symbols.loaded else None


def names_of(exits: ExitColumns, symbols: Symbols | None) -> dict[str, Names]:
    """The members that there are names for: none without symbols, and no writer without a column ``pc``."""
    if symbols is None:
        return {}
    gpa, gva = exits.columns["gpa"], exits.columns["gva"]
    # An address of the kernel's own says more than where it leads to.
    virtual = gva >= GPA_END if exits.has_gva else np.zeros(len(exits), dtype=bool)
    found = {"symbol": _labels(symbols, np.where(virtual, gva, gpa))}
    pc = exits.columns.get(_PC, exits.carry.get(_PC))
    if pc is not None and pc.dtype.kind in "iu":
        found["writer"] = _labels(symbols, pc)
    return found


def _labels(symbols: Symbols, addresses: NDArray[Any]) -> Names:
    return symbols.table.labels(symbols.placement.image_addresses(addresses.astype(np.uint64)))
