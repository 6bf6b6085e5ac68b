"""Page tables of a guest, built by hand: what memory has, and which registers rule over it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.arch import controls as ctl
from engine.arch import paging as guest
from engine.arch.words import signed
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine, write_word

PRESENT_WRITABLE = 3
LARGE = 1 << 7
K, M, G = 1 << 10, 1 << 20, 1 << 30

_PAE, _PSE, _LA57 = guest.CR4_PAE, guest.CR4_PSE, guest.CR4_LA57


@dataclass(frozen=True)
class Mode:
    """A paging mode: its levels, the bits of an index, the bytes of an entry, the pages it has by level, registers."""

    levels: int
    index_bits: int
    entry: int
    pages: dict[int, int]
    cr4: int
    efer: int


MODES = {
    "4-level": Mode(4, 9, 8, {1: 4 * K, 2: 2 * M, 3: G}, _PAE, guest.EFER_LMA | 1 << 8 | guest.EFER_NXE),
    "5-level": Mode(5, 9, 8, {1: 4 * K, 2: 2 * M, 3: G}, _PAE | _LA57, guest.EFER_LMA | 1 << 8 | guest.EFER_NXE),
    "pae": Mode(3, 9, 8, {1: 4 * K, 2: 2 * M}, _PAE, 0),
    "32-bit": Mode(2, 10, 4, {1: 4 * K, 2: 4 * M}, _PSE, 0),
}


@dataclass
class GuestPages:
    """Tables from ``root`` on, a page each, in the order in which they are needed."""

    mode: Mode
    root: int
    entries: dict[int, int] = field(default_factory=dict)
    tables: dict[tuple[int, int], int] = field(default_factory=dict)
    used: int = 1

    def map(self, linear: int, gpa: int, level: int = 1, flags: int = PRESENT_WRITABLE) -> None:
        """Map the page of a linear address; ``level`` says how large it is."""
        self.entries[self.slot(linear, level)] = gpa | flags | (LARGE if level > 1 else 0)

    def slot(self, linear: int, level: int) -> int:
        """GPA of the entry of a level for a linear address; the tables above are made."""
        table = self.root
        for above in range(self.mode.levels, level, -1):
            slot = table + self._index(linear, above) * self.mode.entry
            key = (slot, above)
            if key not in self.tables:
                self.tables[key] = self.root + self.used * 4 * K
                self.used += 1
            table = self.tables[key]
            self.entries[slot] = table | (1 if above == 3 and self.mode.levels == 3 else 7)
        return table + self._index(linear, level) * self.mode.entry

    def _index(self, linear: int, level: int) -> int:
        bits = 2 if self.mode.levels == 3 and level == 3 else self.mode.index_bits
        return linear >> 12 + self.mode.index_bits * (level - 1) & (1 << bits) - 1

    def store(self, write: Callable[[int, bytes], None]) -> None:
        """Put the entries in guest memory."""
        for slot, entry in self.entries.items():
            write(slot, struct.pack("<Q" if self.mode.entry == 8 else "<I", entry))

    def registers(self) -> dict[int, int]:
        """Words of a vCPU's record."""
        words = {ctl.V_CR0: guest.CR0_PG | guest.CR0_PE, ctl.V_CR3: self.root}
        words |= {ctl.V_CR4: self.mode.cr4, ctl.V_EFER: self.mode.efer}
        if self.mode.levels == 3:
            words |= {ctl.V_PDPTE0 + i: self.entries.get(self.root + 8 * i, 0) for i in range(4)}
        return words

    def load(self, m: Machine, position: int = 0) -> None:
        """Put the registers in a vCPU's record."""
        for word, value in self.registers().items():
            write_word(m, FIRST_VCPU_FRAME + position, word, signed(value))
