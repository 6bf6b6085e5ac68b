"""A processor on a bench: one vCPU, a 64-bit guest, and every table entry at hand by the name the vectors give it.

Memory as the vectors have it: the test page is linear and guest-physical 0x801000; its guest PTE is at 0xA00008; the
guest's upper tables are elsewhere. EPT maps all of it to itself, read, write and execute. EPT and SPPT tables are
frames of the arena, so a raw entry names them by their real addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.words import signed, unsigned
from engine.cpu import control_checks, frames, guest_memory, host_physical_memory, instruction, tlb
from engine.cpu.fastpath import CACHE_WORDS, EMPTY
from engine.cpu.memory_slots import SLOT_WORDS
from engine.state.default_host import EPT_VPID_CAP, PROCBASED_CTLS2

PAGE = 0x1000
ARENA = 1 << 30
LINEAR = 0x801000
FAR = 0x80_0080_1000
GUEST_PT = 0xA00000
GUEST_PD, GUEST_PDPT, GUEST_PML4 = 0xC00000, 0xC01000, 0xC02000
TABLE = 0x407  # read, write, execute, and user execute where that means something
LEAF = 0x437
GUEST_TABLE = 0x63
FRAMES = 256
VCPU = np.int64(0)
B61 = 1 << 61
ALL = 0x5555_5555_5555_5555
TERTIARY = 1 << 2 | 1 << 3

# The frames of the tables, in order; those before them are the machine's registers and its vCPU.
EPT_TABLES = ("PML5", "PML4", "PDPT", "PD", "PT", "gPT", "gUpper", "FPDPT", "FPD", "FPT", "VEB", "PMLB")
SPPT_TABLES = ("L4", "L3", "L2", "L1", "gL1", "FL3", "FL2", "FL1")
TABLES = {name: ARENA + PAGE * n for n, name in enumerate((*EPT_TABLES, *SPPT_TABLES), 2)}


class Processor:
    """Entries are set with ``poke`` by host-physical address; ``tables`` names the frames."""

    def __init__(self, *, width: int = 40, levels: int = 4, cap: int = EPT_VPID_CAP, model: bool = False) -> None:
        caps = np.zeros(frames.CAPS, dtype=np.int64)
        caps[frames.CAP_ARENA] = ARENA
        caps[frames.CAP_RESERVED_ADDRESS] = ((1 << 52) - 1) & ~((1 << width) - 1)
        caps[frames.CAP_EPT_VPID] = signed(cap)
        caps[frames.CAP_SECONDARY_ALLOWED] = PROCBASED_CTLS2 >> 32
        caps[frames.CAP_TERTIARY_ALLOWED] = TERTIARY
        caps[frames.CAP_VCPUS] = 1
        row_of = np.full(FRAMES, -1, dtype=np.int64)
        row_of[:2] = (0, 1)
        free = np.arange(FRAMES - 1, 1, -1, dtype=np.int64)
        self.m = frames.Machine(
            rows=np.zeros((FRAMES, frames.WORDS), dtype=np.int64),
            row_of=row_of,
            fresh=np.ones(FRAMES, dtype=np.uint8),
            kind=np.full(FRAMES, frames.CLIENT, dtype=np.uint8),
            free=free,
            spare=free.copy(),
            top=np.array([len(free), len(free)], dtype=np.int64),
            caps=caps,
            vcpu_of_id=np.zeros(1, dtype=np.int64),
            slots=np.zeros((0, SLOT_WORDS), dtype=np.int64),
            cache=np.full(CACHE_WORDS, EMPTY, dtype=np.int64),
            tlb=tlb.new_table() if model else tlb.no_table(),
            queues=np.zeros((0, 2, frames.QUEUE_WORDS), dtype=np.int64),
            places=np.full(frames.MOST_PAGES, frames.NO_PLACE, dtype=np.int64),
            lost=np.zeros(1, dtype=np.int64),
        )
        self.levels = levels
        self._ept_tables()
        self._sppt_tables()
        self._guest_tables()
        self.vcpu(
            {
                ctl.V_EPTP: self.tables["root"] | 6 | levels - 1 << 3,
                ctl.V_SPPTP: self.tables["L4"],
                ctl.V_PRIMARY: ctl.PRIMARY_SECONDARY,
                ctl.V_SECONDARY: ctl.SECONDARY_EPT | ctl.SECONDARY_SPP,
                ctl.V_PML_ADDRESS: self.tables["PMLB"],
                ctl.V_PML_INDEX: 511,
                ctl.V_VE_ADDRESS: self.tables["VEB"],
                ctl.V_CR0: 0x8001_0033,
                ctl.V_CR3: GUEST_PML4,
                ctl.V_CR4: 0x2620,
                ctl.V_EFER: 0xD00,
            }
        )

    # ---- words -----------------------------------------------------------------------------------------------------

    def vcpu(self, words: dict[Any, int]) -> None:
        """Set words of the vCPU record."""
        for word, value in words.items():
            self.m.rows[self.m.row_of[frames.FIRST_VCPU_FRAME], word] = signed(value)

    def control(self, word: Any) -> int:
        """A word of the vCPU record."""
        return unsigned(self.m.rows[self.m.row_of[frames.FIRST_VCPU_FRAME], word])

    def turn_on(self, word: Any, mask: int) -> None:
        """Set bits of a word of the vCPU record."""
        self.vcpu({word: self.control(word) | mask})

    def table(self) -> int:
        """Address of a fresh, zeroed frame."""
        return ARENA + int(frames.new_frame(self.m, frames.CLIENT)) * PAGE

    def poke(self, address: int, value: int) -> None:
        """Store a table entry by host-physical address."""
        host_physical_memory.write_entry(
            self.m, np.int64(address & -PAGE), np.int64(address % PAGE // 8), signed(value)
        )

    def peek(self, address: int) -> int:
        """A table entry by host-physical address."""
        return unsigned(
            host_physical_memory.read_entry(self.m, np.int64(address & -PAGE), np.int64(address % PAGE // 8))
        )

    def guest(self, gpa: int, value: int) -> None:
        """Store a word of guest memory."""
        guest_memory.write_word(self.m, np.int64(gpa), signed(value))

    def guest_word(self, gpa: int) -> int:
        """A word of guest memory."""
        return unsigned(guest_memory.read_word(self.m, np.int64(gpa)))

    # ---- tables ----------------------------------------------------------------------------------------------------

    def _ept_tables(self) -> None:
        t = self.tables = {name: self.table() for name in TABLES}
        assert t == TABLES
        t["root"] = t["PML4"] if self.levels == 4 else t["PML5"]
        self.poke(t["PML5"], t["PML4"] | TABLE)
        self.poke(t["PML4"], t["PDPT"] | TABLE)
        self.poke(t["PML4"] + 8, t["FPDPT"] | TABLE)
        self.poke(t["PDPT"], t["PD"] | TABLE)
        self.poke(t["FPDPT"], t["FPD"] | TABLE)
        for pd, names_of in (("PD", {4: "PT", 5: "gPT", 6: "gUpper"}), ("FPD", {4: "FPT"})):
            for index, name in names_of.items():
                self.poke(t[pd] + 8 * index, t[name] | TABLE)
                for page in range(16):
                    self.poke(t[name] + 8 * page, index << 21 | page << 12 | LEAF)

    def _sppt_tables(self) -> None:
        t = self.tables
        for four, three, two, one, index in ((0, "L3", "L2", "L1", 4), (1, "FL3", "FL2", "FL1", 4)):
            self.poke(t["L4"] + 8 * four, t[three] | 1)
            self.poke(t[three], t[two] | 1)
            self.poke(t[two] + 8 * index, t[one] | 1)

    def _guest_tables(self) -> None:
        self.guest(GUEST_PML4, GUEST_PDPT | GUEST_TABLE)
        self.guest(GUEST_PDPT, GUEST_PD | GUEST_TABLE)
        self.guest(GUEST_PD + 8 * 4, GUEST_PT | GUEST_TABLE)
        self.guest(GUEST_PD + 8 * 5, GUEST_PT + PAGE | GUEST_TABLE)
        for page in range(16):
            self.guest(GUEST_PT + 8 * page, LINEAR - PAGE + page * PAGE | GUEST_TABLE)
        self.guest(GUEST_PT + PAGE, GUEST_PT | GUEST_TABLE)

    # ---- what it does ----------------------------------------------------------------------------------------------

    def access(
        self,
        access: int,
        size: int = 8,
        linear: int = LINEAR,
        *,
        kind: int = acc.DATA,
        circumstances: int = 0,
    ) -> instruction.Access:
        """Run one access by linear address."""
        how = acc.describe(access, kind, circumstances=circumstances)
        return instruction.access(self.m, VCPU, np.int64(signed(linear)), np.int64(size), np.int64(how))

    def enter(self) -> int:
        """VM-instruction error of VM entry."""
        return int(control_checks.vm_entry(self.m, VCPU))

    def leaf(self, far: bool = False) -> int:
        """Address of the EPT PTE of the test page."""
        return self.tables["FPT" if far else "PT"] + 8

    def invept(self) -> None:
        """INVEPT, all contexts."""
        tlb.remove_ept(self.m, VCPU, tlb.EVERY)


def without(cap: int, bit: int) -> int:
    """Capabilities without one."""
    return cap & ~bit


ADVANCED = EPT_VPID_CAP | bits.CAP_ADVANCED_EXIT
SHADOW_STACK = EPT_VPID_CAP | bits.CAP_SHADOW_STACK
