"""Raw EPT and SPPT entries for one test page, as the vectors of the hardware notes describe them.

The page has linear and guest-physical address 0x801000, or 0x8000801000 (``far``: through PML4E[1], to test upper
levels). Every entry is readable, writable and executable, and the sub-page tables are valid, unless a row changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.words import signed, unsigned
from engine.cpu import access_check, frames
from engine.state.config import HostConfig, VmConfig
from tests.engine.builders import bare_draft, new_trail

WIDTH = 40
ARENA = 1 << (WIDTH - 1)
NEAR = 0x801000
FAR = 0x8000801000
FRAME = 0x801000

# Frames 0 to 2 are the machine's registers, its vCPU and KVM's own root; these are the tables of the tests.
ROOT, PDPT, PD, PT, FAR_PDPT, FAR_PD, FAR_PT = (ARENA + (n << 12) for n in range(3, 10))
L4, L3, L2, L1, FAR_L3, FAR_L2, FAR_L1, NEXT_PT, PML5 = (ARENA + (n << 12) for n in range(10, 19))
TABLES = 16

B58, B60, B61, B63 = (1 << bit for bit in (58, 60, 61, 63))
ALL = 0x5555_5555_5555_5555
DEFAULT_PTE = FRAME | 0x37
EPTP = 0x1E

CAP = 0x0000_0F01_0633_41C1
ADVANCED = CAP | bits.CAP_ADVANCED_EXIT


@dataclass(frozen=True)
class Access:
    """``size`` bytes at ``offset`` in the test page."""

    how: int
    size: int
    offset: int


def read(offset: int = 0, size: int = 8, kind: int = acc.DATA, linear: int = acc.LINEAR_VALID) -> Access:
    return Access(acc.describe(acc.READ, kind, linear), size, offset)


def write(offset: int = 0, size: int = 8, kind: int = acc.DATA, linear: int = acc.LINEAR_VALID) -> Access:
    return Access(acc.describe(acc.WRITE, kind, linear), size, offset)


def fetch(offset: int = 0, linear: int = acc.LINEAR_VALID) -> Access:
    return Access(acc.describe(acc.EXECUTE, acc.DATA, linear), 1, offset)


def modify(offset: int = 0, size: int = 8) -> Access:
    return write(offset, size, acc.READ_MODIFY_WRITE)


@dataclass(frozen=True)
class Outcome:
    """What the processor did: ``reason`` 0 is completed; ``gpa`` is None then."""

    reason: int
    qualification: int = 0
    gpa: int | None = None
    denied: int = 0


class Tables:
    """A machine whose only vCPU walks the test tables, with the changes of one row applied.

    ``setup``: ``PML4E``, ``PDPTE``, ``PDE``, ``PTE`` and ``next_PTE`` whole entries, ``pte`` the bits of a PTE that
    maps the frame, ``L4E``, ``L3E``, ``L2E``, ``vec``; ``far`` the upper page; ``EPTP``, ``mbec``, ``spp``,
    ``paging_write`` and ``cap``, ``width``, ``execute_only_spp`` the processor; ``five`` a PML5E.
    """

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.far = bool(setup.get("far"))
        self.gpa = FAR if self.far else NEAR
        config = VmConfig(maxphyaddr=WIDTH, host=HostConfig(vmx_capabilities={"ept_vpid_cap": setup.get("cap", CAP)}))
        self.draft = bare_draft(config)
        self.m = self.draft.machine
        self.m.caps[frames.CAP_SPP_EXECUTE_ONLY] = setup.get("execute_only_spp", 0)
        if "width" in setup:
            self.m.caps[frames.CAP_RESERVED_ADDRESS] = ((1 << 52) - 1) & ~((1 << setup["width"]) - 1)
        assert int(frames.address_of(self.m, frames.new_frame(self.m, frames.CLIENT))) == ROOT
        for _ in range(TABLES - 1):
            frames.new_frame(self.m, frames.CLIENT)
        self._fill(setup)
        self._control(setup)
        self.trail = new_trail()

    def _fill(self, setup: Mapping[str, Any]) -> None:
        rights = 7 | (bits.USER_EXECUTE if setup.get("mbec") else 0)
        self.put(ROOT, 0, PDPT | rights)
        self.put(PDPT, 0, PD | rights)
        self.put(PD, 4, PT | rights)
        self.put(PT, 1, DEFAULT_PTE)
        self.put(PT, 2, (FRAME + 4096) | 0x37)
        self.put(ROOT, 1, FAR_PDPT | rights)
        self.put(FAR_PDPT, 0, FAR_PD | rights)
        self.put(FAR_PD, 4, FAR_PT | rights)
        self.put(FAR_PT, 1, DEFAULT_PTE)
        for index, (third, second, first) in enumerate(((L3, L2, L1), (FAR_L3, FAR_L2, FAR_L1))):
            self.put(L4, index, third | 1)
            self.put(third, 0, second | 1)
            self.put(second, 4, first | 1)
        places = {
            "PML4E": (ROOT, int(self.far)),
            "PDPTE": (FAR_PDPT if self.far else PDPT, 0),
            "PDE": (FAR_PD if self.far else PD, 4),
            "PTE": (FAR_PT if self.far else PT, 1),
            "next_PTE": (PT, 2),
            "L4E": (L4, int(self.far)),
            "L3E": (FAR_L3 if self.far else L3, 0),
            "L2E": (FAR_L2 if self.far else L2, 4),
            "vec": (FAR_L1 if self.far else L1, 1),
            "five": (PML5, 0),
        }
        for name, entry in setup.items():
            if name in places:
                self.put(*places[name], entry)
        if "pte" in setup:
            self.put(*places["PTE"], FRAME | setup["pte"])
        self.places = places

    def _control(self, setup: Mapping[str, Any]) -> None:
        secondary = ctl.SECONDARY_EPT
        secondary |= ctl.SECONDARY_SPP if setup.get("spp", True) else 0
        secondary |= ctl.SECONDARY_MBEC if setup.get("mbec") else 0
        secondary |= ctl.SECONDARY_VE if setup.get("ve") else 0
        secondary |= ctl.SECONDARY_PML if setup.get("pml") else 0
        tertiary = ctl.TERTIARY_PAGING_WRITE if setup.get("paging_write") else 0
        tertiary |= ctl.TERTIARY_PAGING_VERIFICATION if setup.get("paging_verification") else 0
        root = PML5 | 0x26 if "five" in setup else ROOT | EPTP
        for position, value in (
            (ctl.V_EPTP, root | setup.get("EPTP", 0)),
            (ctl.V_SPPTP, setup.get("SPPTP", L4)),
            (ctl.V_SECONDARY, secondary),
            (ctl.V_PRIMARY, ctl.PRIMARY_SECONDARY | ctl.PRIMARY_TERTIARY),
            (ctl.V_TERTIARY, tertiary),
        ):
            frames.write_word(self.m, frames.FIRST_VCPU_FRAME, position, value)

    def put(self, table: int, index: int, entry: int) -> None:
        """Store an entry."""
        frames.write_entry(self.m, table, index, np.int64(signed(entry)))

    def entry(self, name: str) -> int:
        """An entry of the test page by its name in a row."""
        return unsigned(int(frames.read_entry(self.m, *self.places[name])))

    def access(self, access: Access, gpa: int | None = None) -> Outcome:
        """Decide about an access, page by page, low page first."""
        at = (self.gpa if gpa is None else gpa) + access.offset
        end = at + access.size
        while at < end:
            part = int(access_check.page_part(at, end))
            reason, qualification, denied = access_check.check(self.m, 0, at, part, access.how, self.trail)
            if reason:
                return Outcome(int(reason), unsigned(int(qualification)), at, int(denied))
            at += part
        return Outcome(0)

    def perform(self, access: Access) -> Outcome:
        """The same, and what a success leaves behind."""
        outcome = self.access(access)
        if not outcome.reason:
            access_check.complete(self.m, 0, access.how, self.trail)
        return outcome
