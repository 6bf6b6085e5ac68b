"""What a hypercall leaves in the registers of its caller, and the exit by which L1 hears of one of L2."""

from __future__ import annotations

from engine.arch import hyperv_pages as pages
from engine.arch.vmcs12 import put
from engine.hyperv.l2_hypercalls import Exit
from engine.hyperv.outcome import Outcome
from engine.kvm.memory_views import GuestMemory
from engine.nested import transitions
from engine.vcpu.vcpu import Vcpu

_WORD = (1 << 64) - 1


def rip_of(vcpu: Vcpu) -> int:
    """The instruction pointer of what the vCPU runs."""
    return _load(vcpu, pages.VMCB_SAVE_RIP) if vcpu.svm.guest_mode else vcpu.registers["rip"]


def finish_in_guest(vcpu: Vcpu, done: Outcome) -> int:
    """Move the caller's RIP; returns where it is. A nested guest's is in its VMCB, with RAX, while SVM runs it."""
    if vcpu.svm.guest_mode:
        rip = (_load(vcpu, pages.VMCB_SAVE_RIP) + done.rip_advance) & _WORD
        _save(vcpu, pages.VMCB_SAVE_RIP, rip)
        if "rax" in done.registers:
            _save(vcpu, pages.VMCB_SAVE_RAX, done.registers["rax"])
        vcpu.registers["rip"] = rip
        return rip
    vcpu.registers["rip"] = (vcpu.registers["rip"] + done.rip_advance) & _WORD
    return vcpu.registers["rip"]


def exit_to_l1(vcpu: Vcpu, memory: GuestMemory, why: Exit) -> None:
    """The VM exit. With SVM the VMCB goes back to guest memory; what L1 saved of itself is not modelled."""
    if not vcpu.svm.guest_mode:
        put(vcpu.vmx.vmcs12, "vm_exit_instruction_len", why.instruction_length)
        transitions.exit_to_l1(vcpu, memory, why.reason, why.qualification, why.information)
        return
    _save(vcpu, pages.VMCB_EXIT_CODE, why.reason)
    _save(vcpu, pages.VMCB_EXIT_INFO_1, why.qualification)
    _save(vcpu, pages.VMCB_EXIT_INFO_2, why.information)
    memory.write(vcpu.svm.vmcb_pa, bytes(vcpu.svm.vmcb12))
    vcpu.svm.guest_mode = False
    vcpu.svm.run_pending = False


def _load(vcpu: Vcpu, at: int) -> int:
    return int.from_bytes(vcpu.svm.vmcb12[at : at + 8], "little")


def _save(vcpu: Vcpu, at: int, value: int) -> None:
    vcpu.svm.vmcb12[at : at + 8] = value.to_bytes(8, "little")
