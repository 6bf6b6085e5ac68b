"""What a connection asks of a machine, and what it wants done to it.

Reads are of the last published state and answered at once. What changes the machine is a value that the connection
hands out, for whoever may wait for the machine.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.kvmi.wire import NO_ADDRESS, PAGE_SIZE, WRITE

# Where struct kvm_regs has RIP, and struct kvm_sregs the parts of CS and EFER that tell the mode.
RIP_AT = 128
_CS_DB_AT, _CS_L_AT, _CR3_AT, _EFER_AT = 17, 19, 240, 264
_EFER_LMA = 1 << 10


@dataclass(frozen=True, slots=True)
class Registers:
    """A vCPU: struct kvm_regs (144 bytes), struct kvm_sregs (312), and the values of the MSRs that were asked for."""

    regs: bytes
    sregs: bytes
    msrs: tuple[int, ...] = ()

    @property
    def cr3(self) -> int:
        """What CR3 has."""
        return int.from_bytes(self.sregs[_CR3_AT : _CR3_AT + 8], "little")

    @property
    def mode(self) -> int:
        """Bytes of an address in the mode of the vCPU: 8, 4 or 2."""
        (efer,) = struct.unpack_from("<Q", self.sregs, _EFER_AT)
        if efer & _EFER_LMA and self.sregs[_CS_L_AT]:
            return 8
        return 4 if self.sregs[_CS_DB_AT] else 2

    def at(self, rip: int | None) -> Registers:
        """The same with the instruction pointer of an access, where it is known."""
        if rip is None:
            return self
        regs = self.regs[:RIP_AT] + struct.pack("<Q", rip) + self.regs[RIP_AT + 8 :]
        return Registers(regs, self.sregs, self.msrs)


@dataclass(frozen=True, slots=True)
class PageRights:
    """What a page has: rights as the protocol has them, and the write bitmap."""

    rights: int
    bitmap: int


@dataclass(frozen=True, slots=True, eq=False)
class Fault:
    """An access that a tool's restriction refuses and that waits for it.

    ``gpa`` is where the page refuses it, ``access`` one of READ, WRITE and EXECUTE. ``token`` is the caller's.
    """

    vcpu: int
    gpa: int
    size: int
    access: int
    gva: int = NO_ADDRESS
    rip: int | None = None
    insn_len: int = 0
    token: Any = field(default=None)

    def refused_by(self, page: PageRights) -> bool:
        """Whether what the page has refuses the access."""
        if page.rights & self.access:
            return False
        if self.access != WRITE:
            return True
        first = self.gpa & 0xFFF
        last = min(first + max(self.size, 1), PAGE_SIZE) - 1
        touched = ((2 << (last >> 7)) - 1) & ~((1 << (first >> 7)) - 1)
        return bool(touched & ~page.bitmap)


@dataclass(frozen=True, slots=True, eq=False)
class RegisterLoad:
    """A load of a control register that waits for a tool. ``token`` is the caller's."""

    vcpu: int
    register: int
    old: int
    new: int
    token: Any


class Guest(Protocol):
    """The machine as it is now. ``vcpu`` is always an index. What cannot be is Refused."""

    def vcpus(self) -> int:
        """How many vCPUs there are."""

    def max_gfn(self) -> int:
        """The first page number behind all memory."""

    def has_memory(self, gfn: int) -> bool:
        """Whether a page lies in a memory slot."""

    def spp(self) -> bool:
        """Whether sub-page permissions are on or could be switched on."""

    def registers(self, vcpu: int, msrs: Sequence[int]) -> Registers:
        """The registers, and as many MSRs; 0 for one that the vCPU does not have."""

    def shown(self, vcpu: int) -> Registers:
        """The registers of an event, with the MSRs of ``events.EVENT_MSRS``; zeros where they cannot be read."""

    def cpuid(self, vcpu: int, function: int, index: int) -> tuple[int, int, int, int]:
        """A leaf: EAX, EBX, ECX, EDX."""

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of one page."""

    def translate(self, vcpu: int, gva: int) -> int:
        """Where the guest's page tables lead a linear address; NO_ADDRESS for nowhere."""

    def page(self, gfn: int) -> PageRights:
        """What a page in a memory slot has."""

    def resting(self) -> bool:
        """Whether no access runs."""


@dataclass(frozen=True, slots=True)
class PageChange:
    """What a page is to have; None leaves it be."""

    gfn: int
    rights: int | None = None
    bitmap: int | None = None


@dataclass(frozen=True, slots=True)
class SetPages:
    """Change pages in order; the first error is the answer. With ``first_ends`` nothing behind it is tried."""

    pages: tuple[PageChange, ...]
    first_ends: bool = False
    command: str = ""


@dataclass(frozen=True, slots=True)
class WriteMemory:
    """Write bytes of one page."""

    gpa: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SwitchSppOn:
    """Switch sub-page permissions on, as what comes after it needs them."""

    then: SetPages | None = None


Change = SetPages | WriteMemory | SwitchSppOn
