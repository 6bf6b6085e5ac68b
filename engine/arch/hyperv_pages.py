"""Pages and areas that a nested hypervisor shares with Hyper-V: assist pages, the enlightened part of a VMCB.

The VP assist page has one right layout. Two wrong ones were in kernels or patches of 2019; they are here to read what
such a kernel wrote, and nothing writes them.
Source: Microsoft TLFS, nested virtualization; Linux v5.3 before and after the layout fix; Linux 7.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from engine.arch.struct_layout import Field, Layout

# What a hypervisor of today reads of the VP assist page
VP_ASSIST_SIZE = 624

VP_ASSIST = Layout(
    "vp_assist_page",
    VP_ASSIST_SIZE,
    [
        Field("apic_assist", 0, 4),
        Field("vtl_entry_reason", 8, 4),
        Field("vtl_vina_status", 12, 1),
        Field("vtl_return_rax", 16, 8),
        Field("vtl_return_rcx", 24, 8),
        Field("nested_features", 32, 4),
        Field("hypercall_controls", 36, 4),
        Field("enlighten_vmentry", 40, 1, "count"),
        Field("current_nested_vmcs", 48, 8),
        Field("synthetic_timer_expired", 56, 1, "count"),
        Field("virtualization_fault", 64, 40, "bytes"),
        Field("intercept_message", 112, 256, "bytes"),
        Field("vtl_return_actions", 368, 256, "bytes"),
    ],
)

# nested_features
DIRECT_HYPERCALL = 1 << 0
VIRTUALIZATION_EXCEPTION = 1 << 1
# hypercall_controls
INTER_PARTITION_COMMUNICATION = 1 << 0


class AssistWriter(NamedTuple):
    """Where software of one time stores three fields of the VP assist page: offset and size of each."""

    control: tuple[int, int]
    enlighten: tuple[int, int]
    evmcs: tuple[int, int]


# As it is; before the fix of 2019; as the first version of the fix had it, which was never merged.
ASSIST_WRITERS: Mapping[str, AssistWriter] = MappingProxyType(
    {
        "correct": AssistWriter((32, 4), (40, 1), (48, 8)),
        "before-fix": AssistWriter((24, 8), (40, 4), (48, 8)),
        "first-fix": AssistWriter((32, 8), (48, 4), (56, 8)),
    }
)

PARTITION_ASSIST_SIZE = 0x1000
PARTITION_ASSIST = Layout("partition_assist_page", PARTITION_ASSIST_SIZE, [Field("tlb_lock_count", 0, 4, "count")])

# A VMCB, as far as flushes of a nested guest look at it: bit 0 of the byte at 0x90 is nested paging, bit 1 of the word
# at 0x10 the intercept of VMMCALL; then exit information, and two registers of the save area.
VMCB_CONTROL_NESTED_PAGING = 0x90
VMCB_CONTROL_NESTED_CR3 = 0xB0
VMCB_CONTROL_INTERCEPTS = 0x10
VMCB_INTERCEPT_VMMCALL = 1 << 1
VMCB_EXIT_CODE, VMCB_EXIT_INFO_1, VMCB_EXIT_INFO_2 = 0x70, 0x78, 0x80
VMCB_SAVE_RIP, VMCB_SAVE_RAX = 0x578, 0x5F8

# The last 32 bytes of a VMCB's control area, under clean bit 31
VMCB_ENLIGHTENMENTS_AT = 0x3E0
VMCB_CLEAN_ENLIGHTENMENTS = 31
VMCB_ENLIGHTENMENTS = Layout(
    "vmcb_enlightenments",
    32,
    [
        Field("hv_enlightenments_control", 0, 4),
        Field("hv_vp_id", 4, 4),
        Field("hv_vm_id", 8, 8),
        Field("partition_assist_page", 16, 8),
    ],
)
# The same in a whole VMCB, with the word of clean bits
ENLIGHTENED_VMCB = Layout(
    "enlightened_vmcb",
    0x1000,
    [Field("hv_clean_fields", 0xC0, 4)]
    + [field._replace(offset=field.offset + VMCB_ENLIGHTENMENTS_AT) for field in VMCB_ENLIGHTENMENTS.named],
)
# hv_enlightenments_control of a VMCB; bits 0 and 1 are those of the enlightened VMCS
ENLIGHTENED_NPT_TLB = 1 << 2

# Exits by which the lower hypervisor says that it flushed for L2 while the TLB lock count was not zero
VMX_EXIT_TRAP_AFTER_FLUSH = 0x1000_0031
SVM_EXIT_ENLIGHTENED = 0xF000_0000
SVM_TRAP_AFTER_FLUSH = 1


def read_assist(page: bytes, written: str = "correct") -> dict[str, int]:
    """Three fields of a VP assist page as software of one time stores them: ``control``, ``enlighten``, ``evmcs``."""
    writer = ASSIST_WRITERS[written]
    return {
        name: int.from_bytes(page[offset : offset + size], "little")
        for name, (offset, size) in writer._asdict().items()
    }


def write_assist(page: bytearray, fields: Mapping[str, int], written: str = "correct") -> None:
    """Store such fields."""
    for name, (offset, size) in ASSIST_WRITERS[written]._asdict().items():
        if name in fields:
            page[offset : offset + size] = fields[name].to_bytes(size, "little")
