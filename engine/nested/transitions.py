"""Between L1 and L2: entering, exiting, and leaving nested mode altogether."""

from __future__ import annotations

from engine.arch import vmx_msrs as vmx_bits
from engine.arch.kvm_nested_state import NO_ADDRESS
from engine.arch.vmcs12 import get, put
from engine.kvm.memory_views import GuestMemory
from engine.nested import enlightened
from engine.nested.entry_checks import cr3_refusal
from engine.vcpu.msrs import load_msr_list, store_msr_list
from engine.vcpu.registers import TOUCHED_BY_FAILURE, active_secondary, load_guest, load_host, save_guest
from engine.vcpu.vcpu import EVMPTR_PENDING, Vcpu, VmxState

_EVENT_VALID = 1 << 31
FAILED_VM_ENTRY = 1 << 31
_TIMER_RATE = 5


def enter_guest(vcpu: Vcpu, memory: GuestMemory, from_vm_entry: bool) -> str | None:
    """Switch to L2 with the cached vmcs12. None on success, else what refused: ``cr3`` or ``pdpte``.

    On failure some registers already hold L2's values, as they do in the kernel.
    """
    state = vcpu.vmx
    refusal = cr3_refusal(vcpu, memory, from_vm_entry)
    loaded = dict(vcpu.registers)
    load_guest(loaded, state.vmcs12, state.run_pending)
    if refusal is not None:
        vcpu.registers.update({name: loaded[name] for name in TOUCHED_BY_FAILURE})
        return refusal
    vcpu.registers = loaded
    state.guest_mode = True
    state.pages_pending = not from_vm_entry
    timer = get(state.vmcs12, "pin_based_vm_exec_control") & vmx_bits.PIN_PREEMPTION_TIMER
    if timer and state.deadline is None:
        ticks = (vcpu.tsc >> _TIMER_RATE) + get(state.vmcs12, "vmx_preemption_timer_value")
        state.deadline = ticks & 0xFFFF_FFFF_FFFF_FFFF
    if state.evmcs_mapped and vcpu.kvm.nested.map_pending:
        enlightened.mark_clean(vcpu, memory)
    return None


def refresh_vmcs12(vcpu: Vcpu) -> None:
    """Bring the cached vmcs12 up to date with the live state of L2."""
    state = vcpu.vmx
    save_guest(vcpu.registers, state.vmcs12, vcpu.mp_state)
    timer = get(state.vmcs12, "pin_based_vm_exec_control") & vmx_bits.PIN_PREEMPTION_TIMER
    saved = get(state.vmcs12, "vm_exit_controls") & vmx_bits.EXIT_SAVE_PREEMPTION_TIMER
    if vcpu.kvm.nested.reports_timer and timer and saved and not state.run_pending and state.deadline is not None:
        left = max(0, state.deadline - (vcpu.tsc >> _TIMER_RATE))
        put(state.vmcs12, "vmx_preemption_timer_value", min(left, 0xFFFF_FFFF))


def exit_to_l1(
    vcpu: Vcpu, memory: GuestMemory, reason: int | None, qualification: int = 0, interruption: int = 0
) -> None:
    """Leave L2 for L1. ``reason`` None is the synthetic exit by which a kernel leaves nested mode.

    A synthetic exit saves the guest state and leaves the exit information alone. L1 continues with the host state of
    vmcs12; the cached shadow vmcs12 goes back to guest memory.
    """
    state = vcpu.vmx
    if state.pages_pending and state.evmptr == EVMPTR_PENDING:
        map_pending(vcpu, memory)
    state.guest_mode = False
    state.run_pending = False
    state.mtf_pending = False
    state.pages_pending = False
    refresh_vmcs12(vcpu)
    if reason is not None:
        _record_exit(vcpu, memory, reason, qualification, interruption)
    link = get(state.vmcs12, "vmcs_link_pointer")
    if active_secondary(state.vmcs12) & vmx_bits.SEC_SHADOW_VMCS and link != NO_ADDRESS:
        memory.write(link, bytes(state.shadow))
    vcpu.mp_state = "runnable"
    resume_host(vcpu, memory)
    if reason is not None:
        state.sync_pending = True
        synchronise(vcpu, memory)


def resume_host(vcpu: Vcpu, memory: GuestMemory) -> None:
    """Load L1's registers and MSRs from the host state. An MSR that cannot be loaded is a VMX abort."""
    page = vcpu.vmx.vmcs12
    load_host(vcpu.registers, page)
    if load_msr_list(vcpu, memory, get(page, "vm_exit_msr_load_addr"), get(page, "vm_exit_msr_load_count")):
        vcpu.triple_fault = True


def synchronise(vcpu: Vcpu, memory: GuestMemory) -> None:
    """Write a cached vmcs12 that is newer back to the enlightened VMCS, if one is attached."""
    state = vcpu.vmx
    if not state.sync_pending:
        return
    if not vcpu.kvm.nested.map_pending and vcpu.evmcs_enabled and not state.evmcs_mapped:
        enlightened.attach(vcpu, memory, launch=False)
    if state.evmcs_mapped:
        enlightened.copy_out(vcpu, memory)
    state.sync_pending = False


def map_pending(vcpu: Vcpu, memory: GuestMemory) -> bool:
    """Map the enlightened VMCS that a restore announced. False when it cannot be: an internal error of the run.

    Without Hyper-V in the guest CPUID it stays pending; with the assist page off it is dropped.
    """
    if vcpu.vmx.evmptr != EVMPTR_PENDING or not vcpu.evmcs_visible:
        return True
    if enlightened.attach(vcpu, memory, launch=False) in ("unmapped", "bad-revision"):
        return False
    vcpu.vmx.sync_pending = True
    return True


def leave_nested(vcpu: Vcpu, memory: GuestMemory) -> None:
    """Leave VMX operation, from L2 by way of a synthetic exit. Does nothing to a vCPU that is not in it.

    SMM's memory of having interrupted L2 is not cleared: the kernels do not either.
    """
    if vcpu.vmx.guest_mode:
        exit_to_l1(vcpu, memory, None)
    drop_operation(vcpu.vmx)


def drop_operation(state: VmxState) -> None:
    """Forget VMXON, the current VMCS, its cached pages and the enlightened VMCS."""
    if not state.in_operation:
        return
    state.vmxon = state.smm_vmxon = False
    state.vmxon_pa = state.current_pa = NO_ADDRESS
    state.release_evmcs()
    state.sync_pending = state.pages_pending = False
    state.vmcs12[:] = bytes(len(state.vmcs12))
    state.shadow[:] = bytes(len(state.shadow))


def enter_operation(state: VmxState, vmxon_pa: int) -> None:
    """VMXON: fresh zero pages, no current VMCS."""
    state.vmxon_pa = vmxon_pa
    state.vmcs12[:] = bytes(len(state.vmcs12))
    state.shadow[:] = bytes(len(state.shadow))
    state.vmxon = True


def _record_exit(vcpu: Vcpu, memory: GuestMemory, reason: int, qualification: int, interruption: int) -> None:
    page = vcpu.vmx.vmcs12
    put(page, "vm_exit_reason", reason)
    put(page, "exit_qualification", qualification)
    put(page, "vm_exit_intr_info", interruption)
    put(page, "idt_vectoring_info_field", 0)
    if not reason & FAILED_VM_ENTRY:
        put(page, "launch_state", 1)
        put(page, "vm_entry_intr_info_field", get(page, "vm_entry_intr_info_field") & ~_EVENT_VALID)
        count = get(page, "vm_exit_msr_store_count")
        if store_msr_list(vcpu, memory, get(page, "vm_exit_msr_store_addr"), count):
            vcpu.triple_fault = True
