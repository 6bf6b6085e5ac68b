"""What user space does to a vCPU besides nested state, as far as nesting notices: CPUID, MSRs, SMM, the first run."""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch.hyperv_cpuid import CpuidEntry, find_leaf
from engine.arch.vmx_msrs import IA32_FEATURE_CONTROL
from engine.kvm.memory_views import GuestMemory
from engine.nested.transitions import leave_nested, map_pending, synchronise
from engine.vcpu.msrs import write_msr
from engine.vcpu.runtime_cpuid import current_cpuid, with_state
from engine.vcpu.vcpu import Vcpu

_LINEAR_WIDTHS = (0, 48, 57)


@dataclass(frozen=True)
class RunResult:
    """Outcome of preparing a run: ``exit`` is None, ``internal-error`` (suberror 1) or ``shutdown``."""

    exit: str | None = None
    suberror: int | None = None


def set_cpuid(vcpu: Vcpu, entries: tuple[CpuidEntry, ...]) -> str | None:
    """KVM_SET_CPUID2. None, or the errno.

    Today's kernel refuses new contents once the vCPU has run and while it is in L2; in 2019 it takes them any time.
    What follows the state of the vCPU is no content.
    Linear addresses must be 48 or 57 bits wide, or of no stated width.
    """
    frozen = vcpu.kvm.vcpu.cpuid_freezes and (vcpu.has_run or vcpu.vmx.guest_mode or vcpu.svm.guest_mode)
    if frozen and with_state(vcpu, entries) != current_cpuid(vcpu):
        return "EINVAL"
    leaf = find_leaf(entries, 0x8000_0008)
    refused = leaf is not None and leaf.eax >> 8 & 0xFF not in _LINEAR_WIDTHS
    if not refused or vcpu.kvm.vcpu.refused_cpuid_sticks:
        vcpu.cpuid = entries
    return "EINVAL" if refused else None


def set_msr(vcpu: Vcpu, memory: GuestMemory, number: int, value: int) -> bool:
    """KVM_SET_MSRS for one MSR; False when it is refused. FEATURE_CONTROL := 0 leaves nested mode."""
    if not write_msr(vcpu, memory, number, value, host=True):
        return False
    if number == IA32_FEATURE_CONTROL and not value and vcpu.host.intel:
        leave_nested(vcpu, memory)
    return True


def set_smm(vcpu: Vcpu, memory: GuestMemory, smm: bool) -> None:
    """The smi.smm flag of KVM_SET_VCPU_EVENTS. In today's kernel a change leaves nested mode."""
    if smm != vcpu.smm and vcpu.kvm.nested.smm_leaves_nested:
        leave_nested(vcpu, memory)
    vcpu.smm = smm


def reset(vcpu: Vcpu, memory: GuestMemory) -> None:
    """INIT of a vCPU: whatever it was nested in is gone."""
    leave_nested(vcpu, memory)


def prepare_run(vcpu: Vcpu, memory: GuestMemory) -> RunResult:
    """What KVM_RUN does before the guest moves: resolve pages, attach a restored enlightened VMCS, write it back.

    In L2 the pending entry counts as made. Guest code itself is not run here.
    """
    vcpu.has_run = True
    if vcpu.triple_fault:
        vcpu.triple_fault = False
        return RunResult("shutdown")
    if not map_pending(vcpu, memory):
        return RunResult("internal-error", 1)
    vcpu.vmx.pages_pending = False
    synchronise(vcpu, memory)
    if vcpu.vmx.guest_mode:
        vcpu.vmx.run_pending = False
    return RunResult()
