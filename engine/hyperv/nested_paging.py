"""A GPA of a nested guest as one of its hypervisor: through the tables that the hypervisor made, for a read.

Only the tables in guest memory count, as they are: nothing is cached and no flag is set. None is a violation or a
misconfiguration, which the caller does not tell apart.
"""

from __future__ import annotations

from engine.arch import vmx_msrs
from engine.arch.hyperv_pages import (
    VMCB_CONTROL_INTERCEPTS,
    VMCB_CONTROL_NESTED_CR3,
    VMCB_CONTROL_NESTED_PAGING,
    VMCB_INTERCEPT_VMMCALL,
)
from engine.arch.vmcs12 import get
from engine.kvm.guest_memory import ReadsMemory
from engine.vcpu.registers import active_secondary
from engine.vcpu.vcpu import Vcpu

_ADDRESS = 0x000F_FFFF_FFFF_F000
_LARGE = 1 << 7
_EPT_READ = 0b001
_EPT_ANY = 0b111
_NPT_PRESENT_USER = 0b101
_LARGEST_LEAF = 3


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
        return int.from_bytes(vcpu.svm.vmcb12[at : at + 8], "little") & _ADDRESS
    return get(vcpu.vmx.vmcs12, "ept_pointer") & _ADDRESS


def translate(vcpu: Vcpu, memory: ReadsMemory, gpa: int) -> int | None:
    """The address that the vCPU's nested guest means by a GPA."""
    if vcpu.svm.guest_mode:
        depth, needed, present = 4, _NPT_PRESENT_USER, 1
    else:
        depth = (get(vcpu.vmx.vmcs12, "ept_pointer") >> 3 & 7) + 1
        needed, present = _EPT_READ, _EPT_ANY
    if gpa >> (12 + 9 * depth):
        return None
    table = root_of(vcpu)
    for level in range(depth, 0, -1):
        shift = 12 + 9 * (level - 1)
        raw = memory.read(table + 8 * (gpa >> shift & 511), 8)
        entry = 0 if raw is None else int.from_bytes(raw, "little")
        if not entry & present or entry & needed != needed:
            return None
        if level == 1 or (entry & _LARGE and level <= _LARGEST_LEAF):
            inside = (1 << shift) - 1
            return entry & _ADDRESS & ~inside | gpa & inside
        table = entry & _ADDRESS
    return None


def intercepts_vmmcall(vcpu: Vcpu) -> bool:
    """Whether the guest hypervisor wants an exit for VMMCALL."""
    return bool(vcpu.svm.vmcb12[VMCB_CONTROL_INTERCEPTS] & VMCB_INTERCEPT_VMMCALL)
