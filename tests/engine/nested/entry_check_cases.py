"""Changes to ``MIN32`` of which each fails one VM-entry check."""

from __future__ import annotations

from engine.arch import vmx_msrs as vmx
from tests.engine.nested.support import MIN64

PROC2 = 0x8400_6172
WIDE = 1 << 39


def secondary(bits: int, **more: int) -> dict[str, int]:
    return {"cpu_based_vm_exec_control": PROC2, "secondary_vm_exec_control": bits, **more}


EPT = vmx.SEC_EPT
GOOD_EPT = {"ept_pointer": 0x1E}
VALID = 1 << 31
APIC = 1 << 21 | PROC2

# check, changes to MIN32, RP wanted, eVMCS visible
CASES: list[tuple[str, dict[str, int]]] = [
    ("ctl:pin", {"pin_based_vm_exec_control": 0x116}),
    ("ctl:proc", {"cpu_based_vm_exec_control": 0x0400_6170}),
    ("ctl:iobitmap", {"cpu_based_vm_exec_control": 0x0600_6172, "io_bitmap_b": 1}),
    ("ctl:msrbitmap", {"cpu_based_vm_exec_control": 0x1400_6172, "msr_bitmap": WIDE}),
    ("ctl:tpr", {"cpu_based_vm_exec_control": 0x0420_6172, "virtual_apic_page_addr": 8}),
    ("ctl:tprthreshold", {"cpu_based_vm_exec_control": 0x0420_6172, "tpr_threshold": 16}),
    ("ctl:apicaccess", secondary(vmx.SEC_APIC_ACCESSES, apic_access_addr=4)),
    ("ctl:apicv", secondary(vmx.SEC_X2APIC)),
    ("ctl:apicv", secondary(vmx.SEC_X2APIC | vmx.SEC_APIC_ACCESSES, cpu_based_vm_exec_control=APIC)),
    ("ctl:apicv", secondary(vmx.SEC_INTERRUPT_DELIVERY, cpu_based_vm_exec_control=APIC)),
    ("ctl:apicv", {"pin_based_vm_exec_control": 0x97, "cpu_based_vm_exec_control": APIC}),
    ("ctl:vnmi", {"pin_based_vm_exec_control": 0x36}),
    ("ctl:vnmi", {"cpu_based_vm_exec_control": 0x0440_6172}),
    ("ctl:pml", secondary(vmx.SEC_PML)),
    ("ctl:pml", secondary(vmx.SEC_PML | EPT, **GOOD_EPT, pml_address=1)),
    ("ctl:ug", secondary(vmx.SEC_UNRESTRICTED_GUEST)),
    ("ctl:mbec", secondary(vmx.SEC_MODE_BASED_EXECUTE)),
    ("ctl:shadow", secondary(vmx.SEC_SHADOW_VMCS, vmwrite_bitmap=1)),
    ("ctl:vpid", secondary(vmx.SEC_VPID)),
    ("ctl:savetimer", {"vm_exit_controls": 0x0043_6DFB}),
    ("ctl:eptp", secondary(EPT)),
    ("ctl:eptp", secondary(EPT, ept_pointer=0x18)),
    ("ctl:eptp", secondary(EPT, ept_pointer=0x16)),
    ("ctl:eptp", secondary(EPT, ept_pointer=0x9E)),
    ("ctl:eptp", secondary(EPT, ept_pointer=WIDE | 0x1E)),
    ("ctl:vmfunc", secondary(vmx.SEC_VMFUNC, vm_function_control=2)),
    ("ctl:vmfunc", secondary(vmx.SEC_VMFUNC, vm_function_control=1)),
    ("ctl:vmfunc", secondary(vmx.SEC_VMFUNC | EPT, **GOOD_EPT, vm_function_control=1, eptp_list_address=1)),
    ("ctl:tscscaling", secondary(vmx.SEC_TSC_SCALING)),
    ("ctl:exit", {"vm_exit_controls": 0x36DFA}),
    ("ctl:exitload", {"vm_exit_msr_load_count": 1, "vm_exit_msr_load_addr": 8}),
    ("ctl:exitload", {"vm_exit_msr_load_count": 2, "vm_exit_msr_load_addr": WIDE - 16}),
    ("ctl:exitstore", {"vm_exit_msr_store_count": 1, "vm_exit_msr_store_addr": WIDE}),
    ("ctl:entry", {"vm_entry_controls": 0x11FA}),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 1 << 8}),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 2 << 8 | 3}),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 3 << 8 | 32}),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 7 << 8 | 1}),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 3 << 8 | 13}),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 1 << 11 | 3 << 8 | 6}),
    (
        "ctl:event",
        {"vm_entry_intr_info_field": VALID | 1 << 11 | 3 << 8 | 13, "vm_entry_exception_error_code": 1 << 16},
    ),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 1 << 12}),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 4 << 8}),
    ("ctl:event", {"vm_entry_intr_info_field": VALID | 6 << 8, "vm_entry_instruction_len": 16}),
    ("ctl:entryload", {"vm_entry_msr_load_count": 1, "vm_entry_msr_load_addr": 1}),
    ("host:hostcr", {"host_cr4": 0}),
    ("host:hostcr", {"host_cr0": 1 << 32 | 0x8000_0021}),
    ("host:host cr3", {"host_cr3": WIDE}),
    ("host:host sysenter", {"host_ia32_sysenter_eip": 1 << 47}),
    ("host:host pat", {"vm_exit_controls": 0x000B_6DFB, "host_ia32_pat": 2}),
    ("host:host perf", {"vm_exit_controls": 0x0003_7DFB, "host_ia32_perf_global_ctrl": 1}),
    ("host:host pae", {"vm_exit_controls": 0x36FFB}),
    ("host:host legacy", {"host_cr4": 0x2_2000}),
    ("host:host legacy", {"vm_entry_controls": 0x13FB, "guest_cr4": 0x2020}),
    ("host:host legacy", {"host_rip": 1 << 32}),
    ("host:host selectors", {"host_ds_selector": 3}),
    ("host:host selectors", {"host_cs_selector": 0}),
    ("host:host selectors", {"host_ss_selector": 0}),
    ("host:host selectors", {"host_tr_selector": 0}),
    ("host:host bases", {"host_idtr_base": 1 << 63}),
    ("host:host rip", {**MIN64, "host_rip": 1 << 48}),
    ("host:host efer", {"vm_exit_controls": 0x0023_6DFB, "host_ia32_efer": 0x500}),
    ("host:host efer", {"vm_exit_controls": 0x0023_6DFB, "host_ia32_efer": 2}),
    ("host:host cet state", {"vm_exit_controls": 0x1003_6DFB, "host_ssp": 1}),
    ("host:host cet state", {"vm_exit_controls": 0x1003_6DFB, "host_ssp": 1 << 32}),
    ("host:host cet state", {**MIN64, "vm_exit_controls": 0x1003_6FFB, "host_ssp": 1 << 50}),
    ("guest:guest cr", {"guest_cr4": 0}),
    ("guest:guest cr", {"guest_cr0": 0x21}),
    ("guest:guest debug", {"vm_entry_controls": 0x11FF, "guest_dr7": 1 << 32}),
    ("guest:guest debug", {"vm_entry_controls": 0x11FF, "guest_ia32_debugctl": 4}),
    ("guest:guest pat", {"vm_entry_controls": 0x51FB, "guest_ia32_pat": 3}),
    ("guest:link", {"vmcs_link_pointer": 0x1_0000_0000}),
    ("guest:link", {"vmcs_link_pointer": 8}),
    ("guest:link", {"vmcs_link_pointer": 0x6000}),
    ("guest:guest perf", {"vm_entry_controls": 0x31FB, "guest_ia32_perf_global_ctrl": 1}),
    ("guest:guest paging", secondary(EPT | vmx.SEC_UNRESTRICTED_GUEST, **GOOD_EPT, guest_cr0=0x8000_0020)),
    ("guest:guest ia32e", {**MIN64, "guest_cr4": 0x2000}),
    ("guest:guest bndcfgs", {"vm_entry_controls": 0x0001_11FB, "guest_bndcfgs": 4}),
    ("guest:guest bndcfgs", {"vm_entry_controls": 0x0001_11FB, "guest_bndcfgs": 1 << 50}),
    ("guest:guest cet state", {"vm_entry_controls": 0x0010_11FB, "guest_ssp": 2}),
    ("guest:guest cet state", {"vm_entry_controls": 0x0010_11FB, "guest_s_cet": 0x40}),
    ("guest:activity", {"guest_activity_state": 2}),
]
