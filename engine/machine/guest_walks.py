"""A walk of the guest's own page tables, explained entry by entry: where a linear address leads now."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from engine.arch import ept as bits
from engine.arch import paging as guest
from engine.arch.words import signed, unsigned
from engine.cpu import guest_paging, guest_tables
from engine.cpu.frames import Machine
from engine.cpu.sentences import ReadEntry
from engine.errors import InvalidValue
from engine.machine.virtual_objects import PAGE, check_space, leads_nowhere
from engine.state.config import VmConfig
from engine.state.retry import new_trail

FIELDS = (
    ("present", 0),
    ("write", 1),
    ("user", 2),
    ("accessed", 5),
    ("dirty", 6),
    ("page", 7),
    ("global", 8),
    ("execute_disable", 63),
)


class GuestWalk(NamedTuple):
    """``gpa`` of the first byte, and the ``entries`` that were read for it, from the root."""

    gpa: int
    entries: tuple[ReadEntry, ...]


def walk_guest(m: Machine, config: VmConfig, gva: int, size: int, vcpu: int, cr3: int | None) -> GuestWalk:
    """Walk the tables for ``size`` bytes at ``gva``, under the vCPU's CR3 or another.

    Raises InvalidValue where an address leads nowhere, with the entry to blame, and where the bytes are in frames that
    are no neighbours.
    """
    if gva + size > 1 << 64:
        raise InvalidValue("must keep the access within 64 bits", field="gva", value=hex(gva))
    check_space(m, config, vcpu, cr3)
    position = np.int64(config.vcpu_position(vcpu))
    space = guest_paging.OWN_SPACE if cr3 is None else np.int64(signed(cr3))
    steps = np.zeros((guest_paging.STEP_ROWS, 4), dtype=np.int64)
    first = gva - gva % PAGE
    # From the last page down, so that the steps are those of the first.
    found = 0
    frames = []
    for at in range(first + (gva % PAGE + size - 1) // PAGE * PAGE, first - 1, -PAGE):
        found = int(guest_tables.locate(m, position, space, np.int64(signed(at)), new_trail(), steps))
        if found >= guest_tables.NOWHERE:
            raise leads_nowhere("gva", max(at, gva), steps)
        frames.append(found)
    if any(above - below != PAGE for above, below in pairwise(frames)):
        rule = "must keep the access in frames that are neighbours: explain its pages one by one"
        raise InvalidValue(rule, field="size", value=size)
    rows = [steps[level].tolist() for level in range(guest_paging.FIVE_LEVELS, 0, -1) if steps[level, 0]]
    return GuestWalk(found + gva % PAGE, tuple(_entry(row, gva) for row in rows))


def _entry(step: Sequence[int], gva: int) -> ReadEntry:
    """One entry, of a step of the walk; a register of PAE paging is at no address."""
    level, slot, size, entry = step
    table = slot & ~(PAGE - 1) if slot >= 0 else 0
    index = (slot - table) // size if slot >= 0 else gva >> 30 & 3
    raw = unsigned(entry)
    values = {name: raw >> bit & 1 for name, bit in FIELDS if bit < 8 * size}
    values["address"] = raw & (guest.ADDRESS if size == 8 else guest.ADDRESS_32)
    return ReadEntry(bits.LEVEL_NAMES[level], level, table, index, raw, False, values)
