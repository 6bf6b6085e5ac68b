"""Raw EPT and SPPT entries: what a client reads and writes at its own risk.

An entry is named by its level and a guest-physical address: it is the one that the first vCPU's walk of that address
reads at that level. Any 64 bits may be stored, and nothing is flushed: what processors remember stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.words import signed
from engine.cpu import ept, explain, frames, host_physical_memory, sppt
from engine.cpu.sentences import ReadEntry
from engine.errors import InvalidValue
from engine.kvm import state_frame as reg
from engine.machine.state import Operations
from engine.state.retry import new_trail

TableEntry = ReadEntry

Trail = NDArray[np.int64]


@dataclass(frozen=True)
class _Structure:
    """How one kind of table is walked: its depth, its first row in a trail, and the entries that a trail holds."""

    name: str
    depth: Callable[[frames.Machine], int]
    walk: Callable[[frames.Machine, int, Trail], None]
    entries: Callable[[frames.Machine, Trail], tuple[TableEntry, ...]]
    first_row: int


class TableOperations(Operations):
    """The tables of one machine."""

    def ept_entry(self, level: int, gpa: int) -> TableEntry:
        """The EPT entry of ``level`` (1 is the PTE) on the walk of ``gpa``; absent memory reads as all ones.

        Raises InvalidValue for a level that EPT has not or the walk does not reach, and for a GPA that is too wide.
        """
        return self._read(_EPT, level, gpa)

    def sppt_entry(self, level: int, gpa: int) -> TableEntry:
        """The SPPT entry of ``level`` (1 is the vector) on the walk of ``gpa``; in all else as ``ept_entry``."""
        return self._read(_SPPT, level, gpa)

    def set_ept_entry(self, level: int, gpa: int, raw: int) -> TableEntry:
        """Store ``raw`` where ``ept_entry`` reads, without any flush; returns the entry as it is now.

        Raises InvalidValue as ``ept_entry`` does, for more than 64 bits, and for a table in absent memory.
        """
        return self._write(_EPT, level, gpa, raw)

    def set_sppt_entry(self, level: int, gpa: int, raw: int) -> TableEntry:
        """Store ``raw`` where ``sppt_entry`` reads; in all else as ``set_ept_entry``."""
        return self._write(_SPPT, level, gpa, raw)

    def new_frame(self) -> int:
        """Host-physical address of a new table of 512 zeroes. Raises LimitExceeded."""
        with self._state.change() as draft:
            return int(frames.address_of(draft.machine, frames.new_frame(draft.machine, frames.CLIENT)))

    def _read(self, structure: _Structure, level: int, gpa: int) -> TableEntry:
        snapshot = self._published
        entries = self._entries(snapshot.machine, structure, level, gpa, new_trail())
        return entries[_place_of(entries, level)]

    def _write(self, structure: _Structure, level: int, gpa: int, raw: int) -> TableEntry:
        if not 0 <= raw < 1 << 64:
            raise InvalidValue("an entry has 64 bits", field="raw", value=raw)
        with self._state.change() as draft:
            machine = draft.machine
            trail = new_trail()
            entries = self._entries(machine, structure, level, gpa, trail)
            place = _place_of(entries, level)
            entry = entries[place]
            if entry.absent:
                raise InvalidValue(
                    f"an entry is stored in table memory; there is none at {entry.table:#x}", field="level", value=level
                )
            host_physical_memory.write_entry(machine, entry.table, entry.index, signed(raw))
            if structure is _SPPT:
                frames.write_word(machine, frames.STATE_FRAME, reg.SPPT_EDITED, 1)
            trail[structure.first_row + place, 3] = signed(raw)
            return structure.entries(machine, trail)[place]

    def _entries(
        self, machine: frames.Machine, structure: _Structure, level: int, gpa: int, trail: Trail
    ) -> tuple[TableEntry, ...]:
        """What the walk reads. Raises InvalidValue unless it reads an entry of ``level``."""
        depth = structure.depth(machine)
        if not 1 <= level <= depth:
            raise InvalidValue(f"the {structure.name} has levels 1 to {depth}", field="level", value=level)
        width = self._config.maxphyaddr
        if not 0 <= gpa < 1 << width:
            raise InvalidValue(
                f"gpa lies within the guest-physical address width of {width} bits", field="gpa", value=gpa
            )
        structure.walk(machine, gpa, trail)
        entries = structure.entries(machine, trail)
        if not entries:
            raise InvalidValue(f"gpa lies within what {depth} levels translate", field="gpa", value=gpa)
        last = entries[-1]
        if last.level > level:
            raise InvalidValue(
                f"the walk of gpa reads an entry of that level; it ends at level {last.level}, {last.structure} "
                f"= {last.raw:#x}, which leads to no table",
                field="level",
                value=level,
            )
        return entries


def _place_of(entries: tuple[TableEntry, ...], level: int) -> int:
    return entries[0].level - level


def _eptp(machine: frames.Machine) -> int:
    return int(frames.read_word(machine, frames.FIRST_VCPU_FRAME, ctl.V_EPTP))


def _ept_depth(machine: frames.Machine) -> int:
    return ((_eptp(machine) & bits.EPTP_WALK_MASK) >> bits.EPTP_WALK_SHIFT) + 1


def _walk_ept(machine: frames.Machine, gpa: int, trail: Trail) -> None:
    ept.walk(machine, _eptp(machine), ept.mode_of(machine, 0), gpa, trail)


def _sppt_depth(_: frames.Machine) -> int:
    return 4


def _walk_sppt(machine: frames.Machine, gpa: int, trail: Trail) -> None:
    sppt.walk(machine, int(frames.read_word(machine, frames.FIRST_VCPU_FRAME, ctl.V_SPPTP)), gpa, trail)


_EPT = _Structure("EPT", _ept_depth, _walk_ept, explain.ept_entries_read, 0)
_SPPT = _Structure("SPPT", _sppt_depth, _walk_sppt, explain.sppt_entries_read, ept.TRAIL_SPPT)
