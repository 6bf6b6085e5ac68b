"""A GPA of a nested guest as one of its hypervisor: through the tables that the hypervisor made, for a read.

Only the tables in guest memory count, as they are: nothing is cached and no flag is set. None is a violation or a
misconfiguration, which the caller does not tell apart.

EPT entries mean what they mean to the processor's own walk (``cpu.ept.classify``), with the physical-address width and
the capabilities of the vCPU. Entries of AMD's nested paging are those of four-level paging, every access a user's (APM
volume 2, 15.25); bit 8 of an entry that names a table is reserved in the upper two levels (Linux, mmu.c). The
hypervisor's EFER.NXE is taken as set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.arch import ept as bits
from engine.arch import paging, vmx_msrs
from engine.arch.hyperv_pages import (
    VMCB_CONTROL_INTERCEPTS,
    VMCB_CONTROL_NESTED_CR3,
    VMCB_CONTROL_NESTED_PAGING,
    VMCB_INTERCEPT_VMMCALL,
)
from engine.arch.vmcs12 import get
from engine.arch.words import signed
from engine.cpu import ept, guest_paging
from engine.kvm.memory_views import ReadsMemory
from engine.vcpu.registers import active_secondary
from engine.vcpu.vcpu import Vcpu

_NPT_LEVELS = 4


@dataclass(frozen=True)
class _Format:
    """Tables of nested paging: how many levels, the bit of each entry that lets an access read, what an entry is.

    ``classify`` takes an entry, as a signed word, and its level, and answers as ``cpu.ept.classify`` does.
    """

    levels: int
    readable: int
    classify: Callable[[int, int], int]


def in_use(vcpu: Vcpu) -> bool:
    """Whether the nested guest that the vCPU runs has nested paging."""
    if vcpu.svm.guest_mode:
        return bool(vcpu.svm.vmcb12[VMCB_CONTROL_NESTED_PAGING] & 1)
    return vcpu.vmx.guest_mode and bool(active_secondary(vcpu.vmx.vmcs12) & vmx_msrs.SEC_EPT)


def root_of(vcpu: Vcpu) -> int:
    """Address of the hypervisor's top table, 0 without nested paging."""
    if not in_use(vcpu):
        return 0
    if vcpu.svm.guest_mode:
        at = VMCB_CONTROL_NESTED_CR3
        return int.from_bytes(vcpu.svm.vmcb12[at : at + 8], "little") & bits.ADDRESS
    return get(vcpu.vmx.vmcs12, "ept_pointer") & bits.ADDRESS


def translate(vcpu: Vcpu, memory: ReadsMemory, gpa: int) -> int | None:
    """The address that the vCPU's nested guest means by a GPA."""
    tables = _npt(vcpu) if vcpu.svm.guest_mode else _ept(vcpu)
    if gpa >> bits.LEVEL_SHIFT[tables.levels] + 9:
        return None
    table = root_of(vcpu)
    for level in range(tables.levels, 0, -1):
        raw = memory.read(table + 8 * ept.index_of(gpa, level), 8)
        if raw is None:
            return None
        entry = int.from_bytes(raw, "little", signed=True)
        kind = tables.classify(entry, level)
        if kind in (ept.NOT_PRESENT, ept.MISCONFIGURED) or not entry & tables.readable:
            return None
        if kind == ept.COMPLETE:
            inside = (1 << bits.LEVEL_SHIFT[level]) - 1
            return entry & bits.ADDRESS & ~inside | gpa & inside
        table = entry & bits.ADDRESS
    return None


def _ept(vcpu: Vcpu) -> _Format:
    levels = ((get(vcpu.vmx.vmcs12, "ept_pointer") & bits.EPTP_WALK_MASK) >> bits.EPTP_WALK_SHIFT) + 1
    mode = ept.MODE_MBEC if active_secondary(vcpu.vmx.vmcs12) & vmx_msrs.SEC_MODE_BASED_EXECUTE else 0
    width = bits.reserved_address(vcpu.maxphyaddr)
    capabilities = signed(vcpu.capabilities.values["ept_vpid"])
    return _Format(levels, bits.READ, lambda entry, level: ept.classify(entry, level, mode, width, capabilities))


def _npt(vcpu: Vcpu) -> _Format:
    width = bits.reserved_address(vcpu.maxphyaddr)

    def classify(entry: int, level: int) -> int:
        if not entry & paging.PRESENT:
            return ept.NOT_PRESENT
        leaf = ept.is_leaf(entry, level)
        global_ = paging.GLOBAL if level >= 3 and not leaf else 0
        if entry & (width | global_ | guest_paging.reserved_at(entry, level)):
            return ept.MISCONFIGURED
        return ept.COMPLETE if leaf else ept.TABLE

    return _Format(_NPT_LEVELS, paging.USER, classify)


def intercepts_vmmcall(vcpu: Vcpu) -> bool:
    """Whether the guest hypervisor wants an exit for VMMCALL."""
    return bool(vcpu.svm.vmcb12[VMCB_CONTROL_INTERCEPTS] & VMCB_INTERCEPT_VMMCALL)
