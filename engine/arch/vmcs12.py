"""struct vmcs12: the VMCS that KVM keeps for a guest hypervisor, as a table.

Packed, 998 bytes, in a page of 4096; the offsets are ABI and the same in every kernel from 2019 on. Natural-width
fields are 64 bits wide. Fields that newer kernels put into former padding are listed in ``SINCE_2020``: an older
kernel carries their bytes without looking at them.
Source: Linux v5.3 and v7.1; encodings as in the Intel SDM, volume 3, appendix B.
"""

from __future__ import annotations

from engine.arch.struct_layout import Field, Layout

VMCS12_REVISION = 0x11E57ED0
REVISION_MASK = 0x7FFF_FFFF
SHADOW_INDICATOR = 0x8000_0000
VMCS12_SIZE = 998
VMCS12_PAGE = 0x1000

# The version that an enlightened VMCS carries in its first word; KVM also takes VMCS12_REVISION there.
EVMCS_VERSION = 1

# name, offset, size, VMCS encoding (None: software state that no VMREAD reaches)
_TABLE: tuple[tuple[str, int, int, int | None], ...] = (
    # header
    ("revision", 0, 4, None),
    ("abort", 4, 4, None),
    ("launch_state", 8, 4, None),
    # 64-bit controls and addresses
    ("io_bitmap_a", 40, 8, 0x2000),
    ("io_bitmap_b", 48, 8, 0x2002),
    ("msr_bitmap", 56, 8, 0x2004),
    ("vm_exit_msr_store_addr", 64, 8, 0x2006),
    ("vm_exit_msr_load_addr", 72, 8, 0x2008),
    ("vm_entry_msr_load_addr", 80, 8, 0x200A),
    ("tsc_offset", 88, 8, 0x2010),
    ("virtual_apic_page_addr", 96, 8, 0x2012),
    ("apic_access_addr", 104, 8, 0x2014),
    ("posted_intr_desc_addr", 112, 8, 0x2016),
    ("ept_pointer", 120, 8, 0x201A),
    ("eoi_exit_bitmap0", 128, 8, 0x201C),
    ("eoi_exit_bitmap1", 136, 8, 0x201E),
    ("eoi_exit_bitmap2", 144, 8, 0x2020),
    ("eoi_exit_bitmap3", 152, 8, 0x2022),
    ("xss_exit_bitmap", 160, 8, 0x202C),
    ("guest_physical_address", 168, 8, 0x2400),
    ("vmcs_link_pointer", 176, 8, 0x2800),
    ("guest_ia32_debugctl", 184, 8, 0x2802),
    ("guest_ia32_pat", 192, 8, 0x2804),
    ("guest_ia32_efer", 200, 8, 0x2806),
    ("guest_ia32_perf_global_ctrl", 208, 8, 0x2808),
    ("guest_pdptr0", 216, 8, 0x280A),
    ("guest_pdptr1", 224, 8, 0x280C),
    ("guest_pdptr2", 232, 8, 0x280E),
    ("guest_pdptr3", 240, 8, 0x2810),
    ("guest_bndcfgs", 248, 8, 0x2812),
    ("host_ia32_pat", 256, 8, 0x2C00),
    ("host_ia32_efer", 264, 8, 0x2C02),
    ("host_ia32_perf_global_ctrl", 272, 8, 0x2C04),
    ("vmread_bitmap", 280, 8, 0x2026),
    ("vmwrite_bitmap", 288, 8, 0x2028),
    ("vm_function_control", 296, 8, 0x2018),
    ("eptp_list_address", 304, 8, 0x2024),
    ("pml_address", 312, 8, 0x200E),
    ("encls_exiting_bitmap", 320, 8, 0x202E),
    ("tsc_multiplier", 328, 8, 0x2032),
    # natural width
    ("cr0_guest_host_mask", 344, 8, 0x6000),
    ("cr4_guest_host_mask", 352, 8, 0x6002),
    ("cr0_read_shadow", 360, 8, 0x6004),
    ("cr4_read_shadow", 368, 8, 0x6006),
    ("cr3_target_value0", 376, 8, 0x6008),
    ("cr3_target_value1", 384, 8, 0x600A),
    ("cr3_target_value2", 392, 8, 0x600C),
    ("cr3_target_value3", 400, 8, 0x600E),
    ("exit_qualification", 408, 8, 0x6400),
    ("guest_linear_address", 416, 8, 0x640A),
    ("guest_cr0", 424, 8, 0x6800),
    ("guest_cr3", 432, 8, 0x6802),
    ("guest_cr4", 440, 8, 0x6804),
    ("guest_es_base", 448, 8, 0x6806),
    ("guest_cs_base", 456, 8, 0x6808),
    ("guest_ss_base", 464, 8, 0x680A),
    ("guest_ds_base", 472, 8, 0x680C),
    ("guest_fs_base", 480, 8, 0x680E),
    ("guest_gs_base", 488, 8, 0x6810),
    ("guest_ldtr_base", 496, 8, 0x6812),
    ("guest_tr_base", 504, 8, 0x6814),
    ("guest_gdtr_base", 512, 8, 0x6816),
    ("guest_idtr_base", 520, 8, 0x6818),
    ("guest_dr7", 528, 8, 0x681A),
    ("guest_rsp", 536, 8, 0x681C),
    ("guest_rip", 544, 8, 0x681E),
    ("guest_rflags", 552, 8, 0x6820),
    ("guest_pending_dbg_exceptions", 560, 8, 0x6822),
    ("guest_sysenter_esp", 568, 8, 0x6824),
    ("guest_sysenter_eip", 576, 8, 0x6826),
    ("host_cr0", 584, 8, 0x6C00),
    ("host_cr3", 592, 8, 0x6C02),
    ("host_cr4", 600, 8, 0x6C04),
    ("host_fs_base", 608, 8, 0x6C06),
    ("host_gs_base", 616, 8, 0x6C08),
    ("host_tr_base", 624, 8, 0x6C0A),
    ("host_gdtr_base", 632, 8, 0x6C0C),
    ("host_idtr_base", 640, 8, 0x6C0E),
    ("host_ia32_sysenter_esp", 648, 8, 0x6C10),
    ("host_ia32_sysenter_eip", 656, 8, 0x6C12),
    ("host_rsp", 664, 8, 0x6C14),
    ("host_rip", 672, 8, 0x6C16),
    ("host_s_cet", 680, 8, 0x6C18),
    ("host_ssp", 688, 8, 0x6C1A),
    ("host_ssp_tbl", 696, 8, 0x6C1C),
    ("guest_s_cet", 704, 8, 0x6828),
    ("guest_ssp", 712, 8, 0x682A),
    ("guest_ssp_tbl", 720, 8, 0x682C),
    # 32-bit
    ("pin_based_vm_exec_control", 744, 4, 0x4000),
    ("cpu_based_vm_exec_control", 748, 4, 0x4002),
    ("exception_bitmap", 752, 4, 0x4004),
    ("page_fault_error_code_mask", 756, 4, 0x4006),
    ("page_fault_error_code_match", 760, 4, 0x4008),
    ("cr3_target_count", 764, 4, 0x400A),
    ("vm_exit_controls", 768, 4, 0x400C),
    ("vm_exit_msr_store_count", 772, 4, 0x400E),
    ("vm_exit_msr_load_count", 776, 4, 0x4010),
    ("vm_entry_controls", 780, 4, 0x4012),
    ("vm_entry_msr_load_count", 784, 4, 0x4014),
    ("vm_entry_intr_info_field", 788, 4, 0x4016),
    ("vm_entry_exception_error_code", 792, 4, 0x4018),
    ("vm_entry_instruction_len", 796, 4, 0x401A),
    ("tpr_threshold", 800, 4, 0x401C),
    ("secondary_vm_exec_control", 804, 4, 0x401E),
    ("vm_instruction_error", 808, 4, 0x4400),
    ("vm_exit_reason", 812, 4, 0x4402),
    ("vm_exit_intr_info", 816, 4, 0x4404),
    ("vm_exit_intr_error_code", 820, 4, 0x4406),
    ("idt_vectoring_info_field", 824, 4, 0x4408),
    ("idt_vectoring_error_code", 828, 4, 0x440A),
    ("vm_exit_instruction_len", 832, 4, 0x440C),
    ("vmx_instruction_info", 836, 4, 0x440E),
    ("guest_es_limit", 840, 4, 0x4800),
    ("guest_cs_limit", 844, 4, 0x4802),
    ("guest_ss_limit", 848, 4, 0x4804),
    ("guest_ds_limit", 852, 4, 0x4806),
    ("guest_fs_limit", 856, 4, 0x4808),
    ("guest_gs_limit", 860, 4, 0x480A),
    ("guest_ldtr_limit", 864, 4, 0x480C),
    ("guest_tr_limit", 868, 4, 0x480E),
    ("guest_gdtr_limit", 872, 4, 0x4810),
    ("guest_idtr_limit", 876, 4, 0x4812),
    ("guest_es_ar_bytes", 880, 4, 0x4814),
    ("guest_cs_ar_bytes", 884, 4, 0x4816),
    ("guest_ss_ar_bytes", 888, 4, 0x4818),
    ("guest_ds_ar_bytes", 892, 4, 0x481A),
    ("guest_fs_ar_bytes", 896, 4, 0x481C),
    ("guest_gs_ar_bytes", 900, 4, 0x481E),
    ("guest_ldtr_ar_bytes", 904, 4, 0x4820),
    ("guest_tr_ar_bytes", 908, 4, 0x4822),
    ("guest_interruptibility_info", 912, 4, 0x4824),
    ("guest_activity_state", 916, 4, 0x4826),
    ("guest_sysenter_cs", 920, 4, 0x482A),
    ("host_ia32_sysenter_cs", 924, 4, 0x4C00),
    ("vmx_preemption_timer_value", 928, 4, 0x482E),
    # 16-bit
    ("virtual_processor_id", 960, 2, 0x0000),
    ("posted_intr_nv", 962, 2, 0x0002),
    ("guest_es_selector", 964, 2, 0x0800),
    ("guest_cs_selector", 966, 2, 0x0802),
    ("guest_ss_selector", 968, 2, 0x0804),
    ("guest_ds_selector", 970, 2, 0x0806),
    ("guest_fs_selector", 972, 2, 0x0808),
    ("guest_gs_selector", 974, 2, 0x080A),
    ("guest_ldtr_selector", 976, 2, 0x080C),
    ("guest_tr_selector", 978, 2, 0x080E),
    ("guest_intr_status", 980, 2, 0x0810),
    ("host_es_selector", 982, 2, 0x0C00),
    ("host_cs_selector", 984, 2, 0x0C02),
    ("host_ss_selector", 986, 2, 0x0C04),
    ("host_ds_selector", 988, 2, 0x0C06),
    ("host_fs_selector", 990, 2, 0x0C08),
    ("host_gs_selector", 992, 2, 0x0C0A),
    ("host_tr_selector", 994, 2, 0x0C0C),
    ("guest_pml_index", 996, 2, 0x0812),
)

_COUNTS = frozenset(
    {
        "cr3_target_count",
        "guest_activity_state",
        "launch_state",
        "vm_entry_instruction_len",
        "vm_entry_msr_load_count",
        "vm_exit_instruction_len",
        "vm_exit_msr_load_count",
        "vm_exit_msr_store_count",
        "vm_instruction_error",
    }
)

# Padding in the kernels of 2019.
SINCE_2020 = frozenset(
    {
        "encls_exiting_bitmap",
        "tsc_multiplier",
        "host_s_cet",
        "host_ssp",
        "host_ssp_tbl",
        "guest_s_cet",
        "guest_ssp",
        "guest_ssp_tbl",
    }
)
# Read by the kernels of 2019, dead space since.
UNTIL_2020 = frozenset(f"cr3_target_value{index}" for index in range(4))

VMCS12 = Layout(
    "vmcs12",
    VMCS12_SIZE,
    [Field(name, offset, size, "count" if name in _COUNTS else "word") for name, offset, size, _ in _TABLE],
)

ENCODINGS: dict[str, int] = {name: encoding for name, _, _, encoding in _TABLE if encoding is not None}
_BY_ENCODING = {encoding: name for name, encoding in ENCODINGS.items()}


def field_index(encoding: int) -> int:
    """Index of a VMCS field in KVM's encoding table: the 16-bit encoding rotated left by 6."""
    return (encoding << 6 | encoding >> 10) & 0xFFFF


def locate(encoding: int) -> Field | None:
    """The bytes of vmcs12 that a VMCS encoding names, None for one that vmcs12 does not have.

    A 64-bit field answers to its high alias (encoding + 1) too: the upper 4 bytes.
    """
    name = _BY_ENCODING.get(encoding)
    if name is not None:
        return VMCS12.by_name[name]
    full = _BY_ENCODING.get(encoding & ~1)
    if full is None or encoding >> 13 & 3 != 1:
        return None
    field = VMCS12.by_name[full]
    return Field(f"{full}_high", field.offset + 4, 4)


def get(page: bytes | bytearray, name: str) -> int:
    """The field ``name`` of a vmcs12 page."""
    return VMCS12.get(page, name)


def put(page: bytearray, name: str, value: int) -> None:
    """Store ``value``, cut to the field's width, in a vmcs12 page."""
    VMCS12.put(page, name, value)
