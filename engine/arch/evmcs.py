"""The enlightened VMCS of Hyper-V, version 1: layout, clean-field groups, which way KVM copies each field.

A page of guest memory of which 1024 bytes are used. The kernels of 2019 had a packed structure of 1020 bytes without
the padding after ``hv_vp_id``: everything from ``hv_vm_id`` on is read and written 4 bytes too low there, while guests
use the layout of the TLFS. Fields have the names of their vmcs12 twins, which give the VMCS encodings.
Source: Microsoft TLFS; Linux v5.3 and v7.1.
"""

from __future__ import annotations

from typing import NamedTuple

from engine.arch.struct_layout import Field, Layout
from engine.arch.vmcs12 import ENCODINGS

EVMCS_SIZE = 1024
EVMCS_SIZE_PACKED = 1020

# Bits of hv_clean_fields: 1 means unchanged since the last entry, so the copy may be skipped.
CLEAN_BITS = {
    "IO_BITMAP": 0,
    "MSR_BITMAP": 1,
    "CONTROL_GRP2": 2,
    "CONTROL_GRP1": 3,
    "CONTROL_PROC": 4,
    "CONTROL_EVENT": 5,
    "CONTROL_ENTRY": 6,
    "CONTROL_EXCPN": 7,
    "CRDR": 8,
    "CONTROL_XLAT": 9,
    "GUEST_BASIC": 10,
    "GUEST_GRP1": 11,
    "GUEST_GRP2": 12,
    "HOST_POINTER": 13,
    "HOST_GRP1": 14,
    "ENLIGHTENMENTSCONTROL": 15,
}
CLEAN_ALL = 0xFFFF

# hv_enlightenments_control
NESTED_FLUSH_HYPERCALL = 0x1
ENLIGHTENED_MSR_BITMAP = 0x2


class EvmcsField(NamedTuple):
    """One field: where it is, which clean bit covers it ("" none, NONE, ALL or a name), which way KVM copies it.

    ``copies``: ``I`` into vmcs12 at entry, ``i`` the same but only in today's kernel, ``O`` back after an exit.
    """

    name: str
    offset: int
    size: int
    group: str
    copies: str

    @property
    def encoding(self) -> int | None:
        """VMCS encoding, None for fields that only the enlightened VMCS has."""
        return ENCODINGS.get(self.name)


EVMCS_FIELDS: tuple[EvmcsField, ...] = tuple(
    EvmcsField(*row)
    for row in (
        ("revision_id", 0, 4, "", ""),
        ("abort", 4, 4, "", ""),
        ("host_es_selector", 8, 2, "HOST_GRP1", "I"),
        ("host_cs_selector", 10, 2, "HOST_GRP1", "I"),
        ("host_ss_selector", 12, 2, "HOST_GRP1", "I"),
        ("host_ds_selector", 14, 2, "HOST_GRP1", "I"),
        ("host_fs_selector", 16, 2, "HOST_GRP1", "I"),
        ("host_gs_selector", 18, 2, "HOST_GRP1", "I"),
        ("host_tr_selector", 20, 2, "HOST_GRP1", "I"),
        ("host_ia32_pat", 24, 8, "HOST_GRP1", "I"),
        ("host_ia32_efer", 32, 8, "HOST_GRP1", "I"),
        ("host_cr0", 40, 8, "HOST_GRP1", "I"),
        ("host_cr3", 48, 8, "HOST_GRP1", "I"),
        ("host_cr4", 56, 8, "HOST_GRP1", "I"),
        ("host_ia32_sysenter_esp", 64, 8, "HOST_GRP1", "I"),
        ("host_ia32_sysenter_eip", 72, 8, "HOST_GRP1", "I"),
        ("host_rip", 80, 8, "HOST_GRP1", "I"),
        ("host_ia32_sysenter_cs", 88, 4, "HOST_GRP1", "I"),
        ("pin_based_vm_exec_control", 92, 4, "CONTROL_GRP1", "I"),
        ("vm_exit_controls", 96, 4, "CONTROL_GRP1", "I"),
        ("secondary_vm_exec_control", 100, 4, "CONTROL_GRP1", "I"),
        ("io_bitmap_a", 104, 8, "IO_BITMAP", "I"),
        ("io_bitmap_b", 112, 8, "IO_BITMAP", "I"),
        ("msr_bitmap", 120, 8, "MSR_BITMAP", "I"),
        ("guest_es_selector", 128, 2, "GUEST_GRP2", "IO"),
        ("guest_cs_selector", 130, 2, "GUEST_GRP2", "IO"),
        ("guest_ss_selector", 132, 2, "GUEST_GRP2", "IO"),
        ("guest_ds_selector", 134, 2, "GUEST_GRP2", "IO"),
        ("guest_fs_selector", 136, 2, "GUEST_GRP2", "IO"),
        ("guest_gs_selector", 138, 2, "GUEST_GRP2", "IO"),
        ("guest_ldtr_selector", 140, 2, "GUEST_GRP2", "IO"),
        ("guest_tr_selector", 142, 2, "GUEST_GRP2", "IO"),
        ("guest_es_limit", 144, 4, "GUEST_GRP2", "IO"),
        ("guest_cs_limit", 148, 4, "GUEST_GRP2", "IO"),
        ("guest_ss_limit", 152, 4, "GUEST_GRP2", "IO"),
        ("guest_ds_limit", 156, 4, "GUEST_GRP2", "IO"),
        ("guest_fs_limit", 160, 4, "GUEST_GRP2", "IO"),
        ("guest_gs_limit", 164, 4, "GUEST_GRP2", "IO"),
        ("guest_ldtr_limit", 168, 4, "GUEST_GRP2", "IO"),
        ("guest_tr_limit", 172, 4, "GUEST_GRP2", "IO"),
        ("guest_gdtr_limit", 176, 4, "GUEST_GRP2", "IO"),
        ("guest_idtr_limit", 180, 4, "GUEST_GRP2", "IO"),
        ("guest_es_ar_bytes", 184, 4, "GUEST_GRP2", "IO"),
        ("guest_cs_ar_bytes", 188, 4, "GUEST_GRP2", "IO"),
        ("guest_ss_ar_bytes", 192, 4, "GUEST_GRP2", "IO"),
        ("guest_ds_ar_bytes", 196, 4, "GUEST_GRP2", "IO"),
        ("guest_fs_ar_bytes", 200, 4, "GUEST_GRP2", "IO"),
        ("guest_gs_ar_bytes", 204, 4, "GUEST_GRP2", "IO"),
        ("guest_ldtr_ar_bytes", 208, 4, "GUEST_GRP2", "IO"),
        ("guest_tr_ar_bytes", 212, 4, "GUEST_GRP2", "IO"),
        ("guest_es_base", 216, 8, "GUEST_GRP2", "IO"),
        ("guest_cs_base", 224, 8, "GUEST_GRP2", "IO"),
        ("guest_ss_base", 232, 8, "GUEST_GRP2", "IO"),
        ("guest_ds_base", 240, 8, "GUEST_GRP2", "IO"),
        ("guest_fs_base", 248, 8, "GUEST_GRP2", "IO"),
        ("guest_gs_base", 256, 8, "GUEST_GRP2", "IO"),
        ("guest_ldtr_base", 264, 8, "GUEST_GRP2", "IO"),
        ("guest_tr_base", 272, 8, "GUEST_GRP2", "IO"),
        ("guest_gdtr_base", 280, 8, "GUEST_GRP2", "IO"),
        ("guest_idtr_base", 288, 8, "GUEST_GRP2", "IO"),
        ("vm_exit_msr_store_addr", 320, 8, "ALL", ""),
        ("vm_exit_msr_load_addr", 328, 8, "ALL", ""),
        ("vm_entry_msr_load_addr", 336, 8, "ALL", ""),
        ("cr3_target_value0", 344, 8, "ALL", ""),
        ("cr3_target_value1", 352, 8, "ALL", ""),
        ("cr3_target_value2", 360, 8, "ALL", ""),
        ("cr3_target_value3", 368, 8, "ALL", ""),
        ("page_fault_error_code_mask", 376, 4, "ALL", ""),
        ("page_fault_error_code_match", 380, 4, "ALL", ""),
        ("cr3_target_count", 384, 4, "ALL", ""),
        ("vm_exit_msr_store_count", 388, 4, "ALL", ""),
        ("vm_exit_msr_load_count", 392, 4, "ALL", ""),
        ("vm_entry_msr_load_count", 396, 4, "ALL", ""),
        ("tsc_offset", 400, 8, "CONTROL_GRP2", "I"),
        ("virtual_apic_page_addr", 408, 8, "CONTROL_GRP2", "I"),
        ("vmcs_link_pointer", 416, 8, "GUEST_GRP1", "I"),
        ("guest_ia32_debugctl", 424, 8, "GUEST_GRP1", "I"),
        ("guest_ia32_pat", 432, 8, "GUEST_GRP1", "IO"),
        ("guest_ia32_efer", 440, 8, "GUEST_GRP1", "IO"),
        ("guest_pdptr0", 448, 8, "GUEST_GRP1", "IO"),
        ("guest_pdptr1", 456, 8, "GUEST_GRP1", "IO"),
        ("guest_pdptr2", 464, 8, "GUEST_GRP1", "IO"),
        ("guest_pdptr3", 472, 8, "GUEST_GRP1", "IO"),
        ("guest_pending_dbg_exceptions", 480, 8, "GUEST_GRP1", "IO"),
        ("guest_sysenter_esp", 488, 8, "GUEST_GRP1", "IO"),
        ("guest_sysenter_eip", 496, 8, "GUEST_GRP1", "IO"),
        ("guest_activity_state", 504, 4, "GUEST_GRP1", "IO"),
        ("guest_sysenter_cs", 508, 4, "GUEST_GRP1", "IO"),
        ("cr0_guest_host_mask", 512, 8, "CRDR", "I"),
        ("cr4_guest_host_mask", 520, 8, "CRDR", "I"),
        ("cr0_read_shadow", 528, 8, "CRDR", "I"),
        ("cr4_read_shadow", 536, 8, "CRDR", "I"),
        ("guest_cr0", 544, 8, "CRDR", "IO"),
        ("guest_cr3", 552, 8, "CRDR", "IO"),
        ("guest_cr4", 560, 8, "CRDR", "IO"),
        ("guest_dr7", 568, 8, "CRDR", "IO"),
        ("host_fs_base", 576, 8, "HOST_POINTER", "I"),
        ("host_gs_base", 584, 8, "HOST_POINTER", "I"),
        ("host_tr_base", 592, 8, "HOST_POINTER", "I"),
        ("host_gdtr_base", 600, 8, "HOST_POINTER", "I"),
        ("host_idtr_base", 608, 8, "HOST_POINTER", "I"),
        ("host_rsp", 616, 8, "HOST_POINTER", "I"),
        ("ept_pointer", 624, 8, "CONTROL_XLAT", "I"),
        ("virtual_processor_id", 632, 2, "CONTROL_XLAT", "I"),
        ("guest_physical_address", 680, 8, "NONE", "O"),
        ("vm_instruction_error", 688, 4, "NONE", "O"),
        ("vm_exit_reason", 692, 4, "NONE", "O"),
        ("vm_exit_intr_info", 696, 4, "NONE", "O"),
        ("vm_exit_intr_error_code", 700, 4, "NONE", "O"),
        ("idt_vectoring_info_field", 704, 4, "NONE", "O"),
        ("idt_vectoring_error_code", 708, 4, "NONE", "O"),
        ("vm_exit_instruction_len", 712, 4, "NONE", "O"),
        ("vmx_instruction_info", 716, 4, "NONE", "O"),
        ("exit_qualification", 720, 8, "NONE", "O"),
        ("exit_io_instruction_ecx", 728, 8, "", ""),
        ("exit_io_instruction_esi", 736, 8, "", ""),
        ("exit_io_instruction_edi", 744, 8, "", ""),
        ("exit_io_instruction_eip", 752, 8, "", ""),
        ("guest_linear_address", 760, 8, "NONE", "O"),
        ("guest_rsp", 768, 8, "GUEST_BASIC", "IO"),
        ("guest_rflags", 776, 8, "GUEST_BASIC", "IO"),
        ("guest_interruptibility_info", 784, 4, "GUEST_BASIC", "IO"),
        ("cpu_based_vm_exec_control", 788, 4, "CONTROL_PROC", "IO"),
        ("exception_bitmap", 792, 4, "CONTROL_EXCPN", "I"),
        ("vm_entry_controls", 796, 4, "CONTROL_ENTRY", "IO"),
        ("vm_entry_intr_info_field", 800, 4, "CONTROL_EVENT", "IO"),
        ("vm_entry_exception_error_code", 804, 4, "CONTROL_EVENT", "IO"),
        ("vm_entry_instruction_len", 808, 4, "CONTROL_EVENT", "IO"),
        ("tpr_threshold", 812, 4, "NONE", "I"),
        ("guest_rip", 816, 8, "NONE", "IO"),
        ("hv_clean_fields", 824, 4, "", ""),
        ("hv_synthetic_controls", 832, 4, "", ""),
        ("hv_enlightenments_control", 836, 4, "", ""),
        ("hv_vp_id", 840, 4, "", ""),
        ("hv_vm_id", 848, 8, "", ""),
        ("partition_assist_page", 856, 8, "", ""),
        ("guest_bndcfgs", 896, 8, "GUEST_GRP1", "IO"),
        ("guest_ia32_perf_global_ctrl", 904, 8, "GUEST_GRP1", "i"),
        ("guest_ia32_s_cet", 912, 8, "", ""),
        ("guest_ssp", 920, 8, "", ""),
        ("guest_ia32_int_ssp_table_addr", 928, 8, "", ""),
        ("guest_ia32_lbr_ctl", 936, 8, "", ""),
        ("xss_exit_bitmap", 960, 8, "CONTROL_GRP2", "I"),
        ("encls_exiting_bitmap", 968, 8, "CONTROL_GRP2", "i"),
        ("host_ia32_perf_global_ctrl", 976, 8, "HOST_GRP1", "i"),
        ("tsc_multiplier", 984, 8, "CONTROL_GRP2", "i"),
        ("host_ia32_s_cet", 992, 8, "", ""),
        ("host_ssp", 1000, 8, "", ""),
        ("host_ia32_int_ssp_table_addr", 1008, 8, "", ""),
    )
)

# What the packed structure of 2019 does with the fields behind hv_vp_id: moves them or does not have them.
PACKED_OFFSETS: dict[str, int] = {
    "hv_vm_id": 844,
    "partition_assist_page": 852,
    "guest_bndcfgs": 892,
    "xss_exit_bitmap": 956,
}
PACKED_ABSENT = frozenset(
    {
        "guest_ia32_perf_global_ctrl",
        "guest_ia32_s_cet",
        "guest_ssp",
        "guest_ia32_int_ssp_table_addr",
        "guest_ia32_lbr_ctl",
        "encls_exiting_bitmap",
        "host_ia32_perf_global_ctrl",
        "tsc_multiplier",
        "host_ia32_s_cet",
        "host_ssp",
        "host_ia32_int_ssp_table_addr",
    }
)


def _layout(name: str, size: int, fields: tuple[EvmcsField, ...]) -> Layout:
    return Layout(name, size, [Field(field.name, field.offset, field.size) for field in fields])


EVMCS_FIELDS_PACKED: tuple[EvmcsField, ...] = tuple(
    field._replace(offset=PACKED_OFFSETS.get(field.name, field.offset))
    for field in EVMCS_FIELDS
    if field.name not in PACKED_ABSENT
)

# TLFS, selftests, today's kernel; and what a kernel of 2019 believes.
EVMCS = _layout("evmcs", EVMCS_SIZE, EVMCS_FIELDS)
EVMCS_PACKED = _layout("evmcs", EVMCS_SIZE_PACKED, EVMCS_FIELDS_PACKED)
