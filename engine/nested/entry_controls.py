"""VM-entry checks on the control fields of vmcs12, in the order in which KVM makes them.

Source: Intel SDM volume 3, "Checks on VMX controls"; Linux v5.3 and v7.1.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.arch import vmx_msrs as vmx
from engine.nested.entry_context import EntryCheck, EntryContext
from engine.state.profiles import ONLY_LATEST
from engine.vcpu.msrs import longest_list

_MSR_ENTRY_SIZE = 16
_EVENT_VALID = 1 << 31
_EVENT_ERROR_CODE = 1 << 11
_EVENT_RESERVED = 0x7FFF_F000
_NMI, _HARDWARE_EXCEPTION, _SOFT_INTERRUPT, _PRIVILEGED_EXCEPTION, _SOFT_EXCEPTION, _OTHER = 2, 3, 4, 5, 6, 7
_RESERVED_TYPE = 1
_MAX_INSTRUCTION = 15


def _control(name: str, field: str) -> Callable[[EntryContext], bool]:
    return lambda c: not c.capabilities.allows(name, c.get(field))


def _needs_page(bit: int, *names: str) -> Callable[[EntryContext], bool]:
    """The secondary control ``bit`` needs page addresses in ``names``."""
    return lambda c: bool(c.secondary & bit) and not all(c.page_valid(name) for name in names)


def _needs_ept(bit: int) -> Callable[[EntryContext], bool]:
    return lambda c: bool(c.secondary & bit) and not c.secondary & vmx.SEC_EPT


def _secondary(c: EntryContext) -> bool:
    return bool(c.proc & vmx.PROC_SECONDARY) and not c.capabilities.allows("secondary", c.secondary)


def _cr3_count(c: EntryContext) -> bool:
    return c.get("cr3_target_count") > c.capabilities.values["misc"] >> 16 & 0x1FF


def _io_bitmaps(c: EntryContext) -> bool:
    return bool(c.proc & vmx.PROC_IO_BITMAPS) and not (c.page_valid("io_bitmap_a") and c.page_valid("io_bitmap_b"))


def _msr_bitmap(c: EntryContext) -> bool:
    return bool(c.proc & vmx.PROC_MSR_BITMAPS) and not c.page_valid("msr_bitmap")


def _tpr_shadow(c: EntryContext) -> bool:
    return bool(c.proc & vmx.PROC_TPR_SHADOW) and not c.page_valid("virtual_apic_page_addr")


def _tpr_threshold(c: EntryContext) -> bool:
    delivered = c.secondary & vmx.SEC_INTERRUPT_DELIVERY
    return bool(c.proc & vmx.PROC_TPR_SHADOW) and not delivered and bool(c.get("tpr_threshold") >> 4)


def _apic_virtualization(c: EntryContext) -> bool:
    posted = c.pin & vmx.PIN_POSTED_INTERRUPTS
    delivery = c.secondary & vmx.SEC_INTERRUPT_DELIVERY
    if not posted and not c.secondary & (vmx.SEC_X2APIC | vmx.SEC_APIC_REGISTERS | vmx.SEC_INTERRUPT_DELIVERY):
        return False
    if c.secondary & vmx.SEC_X2APIC and c.secondary & vmx.SEC_APIC_ACCESSES:
        return True
    if delivery and not c.pin & vmx.PIN_EXTERNAL_INTERRUPT:
        return True
    return (bool(posted) and _posted_interrupts(c)) or not c.proc & vmx.PROC_TPR_SHADOW


def _posted_interrupts(c: EntryContext) -> bool:
    descriptor = c.get("posted_intr_desc_addr")
    return (
        not c.secondary & vmx.SEC_INTERRUPT_DELIVERY
        or not c.exit & vmx.EXIT_ACK_INTERRUPT
        or bool(c.get("posted_intr_nv") & 0xFF00)
        or bool(descriptor & 0x3F)
        or not c.legal(descriptor)
    )


def _nmi(c: EntryContext) -> bool:
    virtual = c.pin & vmx.PIN_VIRTUAL_NMIS
    if virtual and not c.pin & vmx.PIN_NMI_EXITING:
        return True
    return not virtual and bool(c.proc & vmx.PROC_NMI_WINDOW)


def _pml(c: EntryContext) -> bool:
    return bool(c.secondary & vmx.SEC_PML) and not (c.secondary & vmx.SEC_EPT and c.page_valid("pml_address"))


def _vpid(c: EntryContext) -> bool:
    return bool(c.secondary & vmx.SEC_VPID) and not c.get("virtual_processor_id")


def _save_timer(c: EntryContext) -> bool:
    return bool(c.exit & vmx.EXIT_SAVE_PREEMPTION_TIMER) and not c.pin & vmx.PIN_PREEMPTION_TIMER


def _ept_pointer(c: EntryContext) -> bool:
    if not c.secondary & vmx.SEC_EPT:
        return False
    pointer = c.get("ept_pointer")
    offered = c.capabilities.values["ept_vpid"]
    memory_type = {0: vmx.EPT_UNCACHEABLE, 6: vmx.EPT_WRITE_BACK}.get(pointer & 7, 0)
    levels = (pointer >> 3 & 7) + 1
    walk = {4: vmx.EPT_WALK_4, 5: vmx.EPT_WALK_5}[levels] if levels in c.kvm.entry.ept_walks else 0
    if c.kvm.entry.ept_walk_4_assumed:
        offered |= vmx.EPT_WALK_4
    accessed_dirty = vmx.EPT_ACCESSED_DIRTY if pointer & 0x40 else 0
    return (
        not offered & memory_type
        or not offered & walk
        or bool(pointer & 0xF80)
        or not c.legal(pointer)
        or bool(accessed_dirty & ~offered)
    )


def _vm_functions(c: EntryContext) -> bool:
    if not c.secondary & vmx.SEC_VMFUNC:
        return False
    functions = c.get("vm_function_control")
    if functions & ~c.capabilities.values["vmfunc"]:
        return True
    switching = functions & vmx.VMFUNC_EPTP_SWITCHING
    return bool(switching) and not (c.secondary & vmx.SEC_EPT and c.page_valid("eptp_list_address"))


def _tsc_scaling(c: EntryContext) -> bool:
    return bool(c.secondary & vmx.SEC_TSC_SCALING) and not c.get("tsc_multiplier")


def _msr_list(kind: str) -> Callable[[EntryContext], bool]:
    def fails(c: EntryContext) -> bool:
        count, address = c.get(f"vm_{kind}_count"), c.get(f"vm_{kind}_addr")
        if not count:
            return False
        if c.kvm.entry.msr_lists_limited and count > longest_list(c.vcpu):
            return True
        # 64-bit arithmetic: a list that wraps round the end of the address space is judged by where it ends.
        last = address + count * _MSR_ENTRY_SIZE - 1 & 0xFFFF_FFFF_FFFF_FFFF
        return bool(address & 0xF) or not c.legal(address) or not c.legal(last)

    return fails


def _event(c: EntryContext) -> bool:
    info = c.get("vm_entry_intr_info_field")
    if not info & _EVENT_VALID:
        return False
    vector, kind = info & 0xFF, info >> 8 & 7
    has_code = bool(info & _EVENT_ERROR_CODE)
    monitor_trap = c.capabilities.controls["proc"].may1 & vmx.PROC_MONITOR_TRAP
    if kind == _RESERVED_TYPE or (kind == _OTHER and not monitor_trap):
        return True
    if (kind == _NMI and vector != 2) or (kind == _HARDWARE_EXCEPTION and vector > 31) or (kind == _OTHER and vector):
        return True
    if _error_code_mismatch(c, kind, vector, has_code):
        return True
    if has_code and c.get("vm_entry_exception_error_code") >> c.kvm.entry.error_code_bits:
        return True
    if info & _EVENT_RESERVED:
        return True
    if kind not in (_SOFT_INTERRUPT, _PRIVILEGED_EXCEPTION, _SOFT_EXCEPTION):
        return False
    length = c.get("vm_entry_instruction_len")
    zero_allowed = c.capabilities.values["misc"] & vmx.MISC_ZERO_LENGTH_INJECTION
    return length > _MAX_INSTRUCTION or (not length and not zero_allowed)


def _error_code_mismatch(c: EntryContext, kind: int, vector: int, has_code: bool) -> bool:
    protected = not c.secondary & vmx.SEC_UNRESTRICTED_GUEST or bool(c.get("guest_cr0") & 1)
    if kind != _HARDWARE_EXCEPTION or not protected:
        return has_code
    if c.kvm.entry.error_code_relaxable and c.capabilities.values["basic"] & vmx.BASIC_NO_ERROR_CODE_CHECK:
        return False
    return has_code != (vector in c.kvm.entry.error_code_vectors)


def _outside_evmcs(name: str, field: str) -> Callable[[EntryContext], bool]:
    return lambda c: c.vcpu.evmcs_visible and bool(c.get(field) & ~vmx.EVMCS_SUPPORTED[name])


def _vmfunc_outside_evmcs(c: EntryContext) -> bool:
    return c.vcpu.evmcs_visible and bool(c.get("vm_function_control") & ~vmx.EVMCS_SUPPORTED_VMFUNC)


CONTROL_FIELDS = (
    ("pin", "pin_based_vm_exec_control"),
    ("proc", "cpu_based_vm_exec_control"),
    ("secondary", "secondary_vm_exec_control"),
    ("exit", "vm_exit_controls"),
    ("entry", "vm_entry_controls"),
)

CONTROL_CHECKS: tuple[EntryCheck, ...] = (
    EntryCheck("ctl:pin", "pin-based controls within the capability MSR", _control("pin", CONTROL_FIELDS[0][1])),
    EntryCheck(
        "ctl:proc", "primary processor-based controls within the capability MSR", _control("proc", CONTROL_FIELDS[1][1])
    ),
    EntryCheck("ctl:sec", "secondary controls, if activated, within the capability MSR", _secondary),
    EntryCheck("ctl:cr3count", "no more CR3 targets than IA32_VMX_MISC advertises", _cr3_count),
    EntryCheck("ctl:iobitmap", "page addresses of both I/O bitmaps if they are used", _io_bitmaps),
    EntryCheck("ctl:msrbitmap", "a page address of the MSR bitmap if it is used", _msr_bitmap),
    EntryCheck("ctl:tpr", "a page address of the virtual APIC page if the TPR shadow is used", _tpr_shadow),
    EntryCheck(
        "ctl:tprthreshold",
        "TPR threshold below 16 with the TPR shadow and without virtual-interrupt delivery",
        _tpr_threshold,
        ONLY_LATEST,
    ),
    EntryCheck(
        "ctl:apicaccess",
        "a page address of the APIC-access page if accesses are virtualized",
        _needs_page(vmx.SEC_APIC_ACCESSES, "apic_access_addr"),
    ),
    EntryCheck(
        "ctl:apicv",
        "consistent x2APIC, APIC-register, interrupt-delivery and posted-interrupt controls",
        _apic_virtualization,
    ),
    EntryCheck("ctl:vnmi", "NMI exiting with virtual NMIs, and virtual NMIs with NMI-window exiting", _nmi),
    EntryCheck("ctl:pml", "EPT and a page address of the log with page-modification logging", _pml),
    EntryCheck("ctl:ug", "EPT with unrestricted guest", _needs_ept(vmx.SEC_UNRESTRICTED_GUEST)),
    EntryCheck("ctl:mbec", "EPT with mode-based execute control", _needs_ept(vmx.SEC_MODE_BASED_EXECUTE)),
    EntryCheck(
        "ctl:shadow",
        "page addresses of the VMREAD and VMWRITE bitmaps with VMCS shadowing",
        _needs_page(vmx.SEC_SHADOW_VMCS, "vmread_bitmap", "vmwrite_bitmap"),
    ),
    EntryCheck("ctl:vpid", "a VPID other than 0 if VPIDs are enabled", _vpid),
    EntryCheck("ctl:savetimer", "the preemption timer if its value is to be saved", _save_timer),
    EntryCheck(
        "ctl:eptp", "an EPT pointer of an advertised memory type and walk length without reserved bits", _ept_pointer
    ),
    EntryCheck(
        "ctl:vmfunc", "advertised VM functions; EPT and a page address of the list for EPTP switching", _vm_functions
    ),
    EntryCheck("ctl:tscscaling", "a TSC multiplier other than 0 with TSC scaling", _tsc_scaling, ONLY_LATEST),
    EntryCheck("ctl:exit", "VM-exit controls within the capability MSR", _control("exit", CONTROL_FIELDS[3][1])),
    EntryCheck(
        "ctl:exitload", "a VM-exit MSR-load list that is aligned, in range and not too long", _msr_list("exit_msr_load")
    ),
    EntryCheck(
        "ctl:exitstore",
        "a VM-exit MSR-store list that is aligned, in range and not too long",
        _msr_list("exit_msr_store"),
    ),
    EntryCheck("ctl:entry", "VM-entry controls within the capability MSR", _control("entry", CONTROL_FIELDS[4][1])),
    EntryCheck("ctl:event", "a well-formed event to inject, if any", _event),
    EntryCheck(
        "ctl:entryload",
        "a VM-entry MSR-load list that is aligned, in range and not too long",
        _msr_list("entry_msr_load"),
    ),
    *(
        EntryCheck(
            f"ctl:evmcs {field}",
            "only bits that the enlightened VMCS supports",
            _outside_evmcs(name, field),
            ONLY_LATEST,
        )
        for name, field in CONTROL_FIELDS
    ),
    EntryCheck(
        "ctl:evmcs vm_function_control", "no VM function with the enlightened VMCS", _vmfunc_outside_evmcs, ONLY_LATEST
    ),
)
