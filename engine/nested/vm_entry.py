"""VMX instructions of L1: VMXON, VMXOFF, VMCLEAR, VMPTRLD, VMPTRST, VMLAUNCH and VMRESUME.

Operands are guest physical addresses. Instruction error numbers are those of the Intel SDM, volume 3, "VM instruction
error numbers". Where a kernel leaves RIP in place and so makes the guest loop, the result is ``retry``.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch import vmx_msrs as vmx_bits
from engine.arch.kvm_nested_state import NO_ADDRESS
from engine.arch.vmcs12 import VMCS12_PAGE, VMCS12_REVISION, get, put
from engine.errors import Conflict
from engine.kvm.memory_views import GuestMemory
from engine.nested import enlightened
from engine.nested.entry_checks import first_failure
from engine.nested.entry_context import is_shadow, revision_matches
from engine.nested.operations import prepare_run
from engine.nested.transitions import (
    FAILED_VM_ENTRY,
    drop_operation,
    enter_guest,
    enter_operation,
    resume_host,
    synchronise,
)
from engine.vcpu.msrs import load_msr_list
from engine.vcpu.registers import active_secondary, privilege_level
from engine.vcpu.vcpu import Vcpu

VMCLEAR_INVALID_ADDRESS = 2
VMCLEAR_VMXON_POINTER = 3
VMLAUNCH_NONCLEAR = 4
VMRESUME_NONLAUNCHED = 5
INVALID_CONTROL = 7
INVALID_HOST_STATE = 8
VMPTRLD_INVALID_ADDRESS = 9
VMPTRLD_VMXON_POINTER = 10
VMPTRLD_WRONG_REVISION = 11
VMXON_IN_ROOT = 15
BLOCKED_BY_MOV_SS = 26

EXIT_INVALID_GUEST_STATE = 33
EXIT_MSR_LOADING = 34
QUALIFICATION_PDPTE = 2
QUALIFICATION_LINK = 4

_CR4_VMXE = 1 << 13
_VMXON_NEEDS = vmx_bits.FEATURE_CONTROL_LOCKED | vmx_bits.FEATURE_CONTROL_VMXON
_LAUNCH_STATE_OFFSET = 8
_EVENT_VALID = 1 << 31
_RFLAGS_IF = 1 << 9
_INTERRUPT_WINDOW = 1 << 2
_NMI_WINDOW = 1 << 22


@dataclass(frozen=True)
class InstructionResult:
    """Outcome of one VMX instruction.

    ``result``: ``succeed``; ``entered`` (L2 runs); ``#UD`` or ``#GP``; ``vmfail-invalid``; ``vmfail-valid`` with
    ``vm_instruction_error``; ``entry-failure``, a VM exit with ``exit_reason`` and ``exit_qualification``; ``retry``,
    the guest executes the instruction again; ``internal-error``, the run ends. ``check`` names the VM-entry check or
    the rule that decided. ``value`` is what VMPTRST stores.
    """

    result: str
    vm_instruction_error: int | None = None
    check: str | None = None
    exit_reason: int | None = None
    exit_qualification: int | None = None
    value: int | None = None


def vmxon(vcpu: Vcpu, memory: GuestMemory, address: int) -> InstructionResult:
    """VMXON: the region's first word must be the plain revision."""
    _outside_guest(vcpu)
    if not vcpu.vmx_allowed or not vcpu.registers["cr4"] & _CR4_VMXE:
        return InstructionResult("#UD")
    if privilege_level(vcpu.registers):
        return InstructionResult("#GP")
    if vcpu.vmx.vmxon:
        return _fail(vcpu, VMXON_IN_ROOT)
    if vcpu.msrs.get(vmx_bits.IA32_FEATURE_CONTROL, 0) & _VMXON_NEEDS != _VMXON_NEEDS:
        return InstructionResult("#GP")
    word = memory.read(address, 4) if vcpu.page_valid(address) else None
    if word is None or int.from_bytes(word, "little") != VMCS12_REVISION:
        return InstructionResult("vmfail-invalid")
    enter_operation(vcpu.vmx, address)
    return InstructionResult("succeed")


def vmxoff(vcpu: Vcpu) -> InstructionResult:
    """VMXOFF: leaves VMX operation; a current VMCS that was not cleared is lost."""
    refused = _permission(vcpu)
    if refused is None:
        drop_operation(vcpu.vmx)
    return refused or InstructionResult("succeed")


def vmclear(vcpu: Vcpu, memory: GuestMemory, address: int) -> InstructionResult:
    """VMCLEAR: writes a current VMCS back and marks it clear in memory.

    While the assist page asks for enlightened entry the address is taken for an enlightened VMCS and not written to;
    today's kernel then detaches it if it is the attached one.
    """
    refused = _permission(vcpu)
    if refused is not None:
        return refused
    if not vcpu.page_valid(address):
        return _fail(vcpu, VMCLEAR_INVALID_ADDRESS)
    if address == vcpu.vmx.vmxon_pa:
        return _fail(vcpu, VMCLEAR_VMXON_POINTER)
    if vcpu.evmcs_visible and enlightened.current_evmcs(vcpu, memory) is not None:
        if vcpu.kvm.nested.map_pending and address == vcpu.vmx.evmptr:
            vcpu.vmx.release_evmcs()
        return InstructionResult("succeed")
    if address == vcpu.vmx.current_pa:
        _release_current(vcpu, memory)
    memory.write(address + _LAUNCH_STATE_OFFSET, bytes(4))
    return InstructionResult("succeed")


def vmptrld(vcpu: Vcpu, memory: GuestMemory, address: int) -> InstructionResult:
    """VMPTRLD: loads all 4096 bytes of the page. With an enlightened VMCS attached it does nothing, RIP included."""
    refused = _permission(vcpu)
    if refused is not None:
        return refused
    if not vcpu.page_valid(address):
        return _fail(vcpu, VMPTRLD_INVALID_ADDRESS)
    if address == vcpu.vmx.vmxon_pa:
        return _fail(vcpu, VMPTRLD_VMXON_POINTER)
    if vcpu.vmx.evmcs_mapped:
        return InstructionResult("retry")
    if vcpu.vmx.current_pa != address:
        page = memory.read(address, VMCS12_PAGE)
        word = 0 if page is None else get(page, "revision")
        shadowing = vcpu.capabilities.controls["secondary"].may1 & vmx_bits.SEC_SHADOW_VMCS
        if page is None or not revision_matches(word) or (is_shadow(word) and not shadowing):
            return _fail(vcpu, VMPTRLD_WRONG_REVISION)
        _release_current(vcpu, memory)
        vcpu.vmx.vmcs12[:] = page
        vcpu.vmx.current_pa = address
    return InstructionResult("succeed")


def vmptrst(vcpu: Vcpu) -> InstructionResult:
    """VMPTRST: the current VMCS pointer as ``value``. With an enlightened VMCS attached it does nothing."""
    refused = _permission(vcpu)
    if refused is None and vcpu.vmx.evmcs_mapped:
        refused = InstructionResult("retry")
    return refused or InstructionResult("succeed", value=vcpu.vmx.current_pa)


def vm_entry(vcpu: Vcpu, memory: GuestMemory, launch: bool = True) -> InstructionResult:
    """VMLAUNCH, or VMRESUME when ``launch`` is False.

    Attaches the enlightened VMCS that the assist page names, makes the VM-entry checks and enters L2. Raises Conflict
    when the vCPU is in L2 already.
    """
    _outside_guest(vcpu)
    prepared = prepare_run(vcpu, memory)
    if prepared.exit is not None:
        return InstructionResult(prepared.exit)
    result = _permission(vcpu) or _attach(vcpu, memory, launch) or _enter(vcpu, memory, launch)
    synchronise(vcpu, memory)
    return result


def _attach(vcpu: Vcpu, memory: GuestMemory, launch: bool) -> InstructionResult | None:
    attached = enlightened.attach(vcpu, memory, launch)
    if attached in ("unmapped", "bad-revision"):
        if not vcpu.kvm.nested.map_pending:
            return InstructionResult("retry", check=f"evmcs {attached}")
        result = "#UD" if attached == "unmapped" else "vmfail-invalid"
        return InstructionResult(result, check=f"evmcs {attached}")
    state = vcpu.vmx
    if not state.evmcs_mapped and state.current_pa == NO_ADDRESS:
        return InstructionResult("vmfail-invalid", check="no current VMCS")
    if is_shadow(get(state.vmcs12, "revision")):
        return InstructionResult("vmfail-invalid", check="shadow VMCS")
    if state.evmcs_mapped:
        enlightened.copy_in(vcpu, memory, enlightened.clean_fields(vcpu, memory))
        # An enlightened VMCS has no launch state: it is whatever the instruction needs.
        put(state.vmcs12, "launch_state", 0 if launch else 1)
    return None


def _enter(vcpu: Vcpu, memory: GuestMemory, launch: bool) -> InstructionResult:
    page = vcpu.vmx.vmcs12
    if vcpu.mov_ss_blocking:
        return _fail(vcpu, BLOCKED_BY_MOV_SS, "MOV SS blocking")
    if bool(get(page, "launch_state")) == launch:
        return _fail(vcpu, VMLAUNCH_NONCLEAR if launch else VMRESUME_NONLAUNCHED, "launch state")
    failed = first_failure(vcpu, memory, "ctl")
    if failed is not None:
        return _fail(vcpu, INVALID_CONTROL, failed.name)
    wide = bool(get(page, "vm_exit_controls") & vmx_bits.EXIT_HOST_64BIT)
    if vcpu.kvm.entry.checks_address_space and wide != bool(vcpu.registers["ia32_efer"] & vmx_bits.EFER_LMA):
        return _fail(vcpu, INVALID_HOST_STATE, "host:address space")
    failed = first_failure(vcpu, memory, "host")
    if failed is not None:
        return _fail(vcpu, INVALID_HOST_STATE, failed.name)
    return _load_guest(vcpu, memory)


def _load_guest(vcpu: Vcpu, memory: GuestMemory) -> InstructionResult:
    state = vcpu.vmx
    page = state.vmcs12
    state.run_pending = True
    state.deadline = None
    failed = first_failure(vcpu, memory, "guest")
    if failed is not None:
        qualification = QUALIFICATION_LINK if failed.name == "guest:link" else 0
        return _entry_failure(vcpu, memory, EXIT_INVALID_GUEST_STATE, qualification, failed.name)
    refused = enter_guest(vcpu, memory, from_vm_entry=True)
    if refused is not None:
        qualification = QUALIFICATION_PDPTE if refused == "pdpte" else 0
        return _entry_failure(vcpu, memory, EXIT_INVALID_GUEST_STATE, qualification, refused)
    bad = load_msr_list(vcpu, memory, get(page, "vm_entry_msr_load_addr"), get(page, "vm_entry_msr_load_count"))
    if bad:
        state.guest_mode = False
        return _entry_failure(vcpu, memory, EXIT_MSR_LOADING, bad, "MSR load")
    _cache_shadow(vcpu, memory)
    _set_activity(vcpu)
    return InstructionResult("entered")


def _entry_failure(vcpu: Vcpu, memory: GuestMemory, reason: int, qualification: int, check: str) -> InstructionResult:
    state = vcpu.vmx
    state.run_pending = False
    resume_host(vcpu, memory)
    reason |= FAILED_VM_ENTRY
    put(state.vmcs12, "vm_exit_reason", reason)
    put(state.vmcs12, "exit_qualification", qualification)
    state.sync_pending = True
    return InstructionResult("entry-failure", None, check, reason, qualification)


def _cache_shadow(vcpu: Vcpu, memory: GuestMemory) -> None:
    link = get(vcpu.vmx.vmcs12, "vmcs_link_pointer")
    if link == NO_ADDRESS or not active_secondary(vcpu.vmx.vmcs12) & vmx_bits.SEC_SHADOW_VMCS:
        return
    page = memory.read(link, VMCS12_PAGE)
    if page is not None:
        vcpu.vmx.shadow[:] = page


def _set_activity(vcpu: Vcpu) -> None:
    page = vcpu.vmx.vmcs12
    activity = get(page, "guest_activity_state")
    windows = get(page, "cpu_based_vm_exec_control")
    awake = (
        get(page, "vm_entry_intr_info_field") & _EVENT_VALID
        or windows & _NMI_WINDOW
        or (windows & _INTERRUPT_WINDOW and get(page, "guest_rflags") & _RFLAGS_IF)
    )
    if activity == 1 and not awake:
        vcpu.vmx.run_pending = False
        vcpu.mp_state = "halted"
    elif activity == 3:
        vcpu.vmx.run_pending = False
        vcpu.mp_state = "wait-for-sipi"


def _permission(vcpu: Vcpu) -> InstructionResult | None:
    _outside_guest(vcpu)
    if not vcpu.vmx.vmxon:
        return InstructionResult("#UD", check="not in VMX operation")
    if privilege_level(vcpu.registers):
        return InstructionResult("#GP", check="privilege level")
    return None


def _outside_guest(vcpu: Vcpu) -> None:
    if vcpu.vmx.guest_mode:
        raise Conflict("the vCPU runs L2: its VMX instructions are L2's business", field="vcpu", value=vcpu.vcpu_id)


def _fail(vcpu: Vcpu, error: int, check: str | None = None) -> InstructionResult:
    """VMfail: with a VMCS the error number goes into it, without one there is only the carry flag."""
    state = vcpu.vmx
    if state.current_pa == NO_ADDRESS and not state.evmcs_mapped:
        return InstructionResult("vmfail-invalid", check=check)
    put(state.vmcs12, "vm_instruction_error", error)
    state.sync_pending = state.sync_pending or (state.evmcs_mapped and vcpu.kvm.nested.map_pending)
    return InstructionResult("vmfail-valid", error, check)


def _release_current(vcpu: Vcpu, memory: GuestMemory) -> None:
    if vcpu.vmx.current_pa != NO_ADDRESS:
        memory.write(vcpu.vmx.current_pa, bytes(vcpu.vmx.vmcs12))
        vcpu.vmx.current_pa = NO_ADDRESS
