"""Raw EPT and SPPT entries for one test page, as the vectors of the hardware notes describe them.

The page has linear and guest-physical address 0x801000, or 0x8000801000 (``far``: through PML4E[1], to test upper
levels). The tables are those of ``bench_machine``, unless a row changes an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.words import unsigned
from engine.cpu import access_check, access_over_pages, frames
from tests.engine.builders import new_trail
from tests.engine.cpu.bench_machine import FAR, LINEAR, TABLES, Processor

NEAR = FRAME = LINEAR

ROOT, PDPT, PD, PT, FAR_PDPT, FAR_PD, FAR_PT = (
    TABLES[name] for name in ("PML4", "PDPT", "PD", "PT", "FPDPT", "FPD", "FPT")
)
L4, L3, L2, L1, FAR_L3, FAR_L2, FAR_L1, PML5 = (
    TABLES[name] for name in ("L4", "L3", "L2", "L1", "FL3", "FL2", "FL1", "PML5")
)

B58, B60, B61, B63 = (1 << bit for bit in (58, 60, 61, 63))

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
        self.processor = Processor(
            width=setup.get("width", 40), levels=5 if "five" in setup else 4, cap=setup.get("cap", CAP)
        )
        self.m = self.processor.m
        self.m.caps[frames.CAP_SPP_EXECUTE_ONLY] = setup.get("execute_only_spp", 0)
        self._fill(setup)
        self._control(setup)
        self.trail = new_trail()

    def _fill(self, setup: Mapping[str, Any]) -> None:
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
        self.processor.vcpu(
            {
                ctl.V_EPTP: self.processor.control(ctl.V_EPTP) | setup.get("EPTP", 0),
                ctl.V_SPPTP: setup.get("SPPTP", L4),
                ctl.V_SECONDARY: secondary,
                ctl.V_PRIMARY: ctl.PRIMARY_SECONDARY | ctl.PRIMARY_TERTIARY,
                ctl.V_TERTIARY: tertiary,
            }
        )

    def put(self, table: int, index: int, entry: int) -> None:
        """Store an entry."""
        self.processor.poke(table + 8 * index, entry)

    def entry(self, name: str) -> int:
        """An entry of the test page by its name in a row."""
        table, index = self.places[name]
        return self.processor.peek(table + 8 * index)

    def access(self, access: Access, gpa: int | None = None) -> Outcome:
        """Decide about an access, page by page, low page first."""
        at = (self.gpa if gpa is None else gpa) + access.offset
        end = at + access.size
        while at < end:
            part = int(access_over_pages.page_part(at, end))
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
