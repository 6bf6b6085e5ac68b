"""The structures in which KVM takes and gives registers, events and MSRs of a vCPU. Little-endian, packed by size.

Source: Linux uapi headers (asm/kvm.h), v5.3 and v7.1; the layouts are the same, a newer kernel uses one reserved byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from engine.arch.struct_layout import Field, Layout

GENERAL_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("rip", "rflags"),
)
REGS = Layout("regs", 144, [Field(name, 8 * position, 8) for position, name in enumerate(GENERAL_REGISTERS)])

# struct kvm_segment: 24 bytes; the flags are one byte each.
SEGMENT_SIZE = 24
SEGMENT_ORDER = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr")
_SEGMENT = (
    ("base", 0, 8),
    ("limit", 8, 4),
    ("selector", 12, 2),
    *((name, 14 + at, 1) for at, name in enumerate(("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable"))),
)


class AccessBit(NamedTuple):
    """Where a flag of struct kvm_segment is in the access rights of a VMCS."""

    name: str
    shift: int
    mask: int


ACCESS_BITS = (
    AccessBit("type", 0, 0xF),
    AccessBit("s", 4, 1),
    AccessBit("dpl", 5, 3),
    AccessBit("present", 7, 1),
    AccessBit("avl", 12, 1),
    AccessBit("l", 13, 1),
    AccessBit("db", 14, 1),
    AccessBit("g", 15, 1),
)
ACCESS_PRESENT = 1 << 7
ACCESS_UNUSABLE = 1 << 16


def _sregs() -> Iterator[Field]:
    for position, segment in enumerate(SEGMENT_ORDER):
        for name, offset, size in _SEGMENT:
            yield Field(f"{segment}_{name}", SEGMENT_SIZE * position + offset, size)
    at = SEGMENT_SIZE * len(SEGMENT_ORDER)
    for table in ("gdtr", "idtr"):
        yield Field(f"{table}_base", at, 8)
        yield Field(f"{table}_limit", at + 8, 2)
        at += 16
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "ia32_efer", "apic_base"):
        yield Field(name, at, 8)
        at += 8
    yield Field("interrupt_bitmap", at, 32, "bytes")


SREGS = Layout("sregs", 312, _sregs())

EVENTS = Layout(
    "vcpu_events",
    64,
    [
        Field("exception_injected", 0, 1),
        Field("exception_nr", 1, 1),
        Field("exception_has_error_code", 2, 1),
        Field("exception_pending", 3, 1),
        Field("exception_error_code", 4, 4),
        Field("interrupt_injected", 8, 1),
        Field("interrupt_nr", 9, 1),
        Field("interrupt_soft", 10, 1),
        Field("interrupt_shadow", 11, 1),
        Field("nmi_injected", 12, 1),
        Field("nmi_pending", 13, 1),
        Field("nmi_masked", 14, 1),
        Field("sipi_vector", 16, 4),
        Field("flags", 20, 4),
        Field("smi_smm", 24, 1),
        Field("smi_pending", 25, 1),
        Field("smi_smm_inside_nmi", 26, 1),
        Field("smi_latched_init", 27, 1),
        Field("triple_fault_pending", 28, 1),
        Field("exception_has_payload", 55, 1),
        Field("exception_payload", 56, 8),
    ],
)
EVENT_NMI_PENDING = 0x01
EVENT_SIPI_VECTOR = 0x02
EVENT_SHADOW = 0x04
EVENT_SMM = 0x08
EVENT_PAYLOAD = 0x10
EVENT_TRIPLE_FAULT = 0x20
SHADOW_MOV_SS = 0x1
SHADOW_STI = 0x2

# struct kvm_msrs: u32 nmsrs, u32 pad, then entries of u32 index, u32 reserved, u64 data.
MSRS_HEADER = 8
MSR_ENTRY = 16
MAX_MSRS = 256

MP_RUNNABLE, MP_UNINITIALIZED, MP_INIT_RECEIVED, MP_HALTED, MP_SIPI_RECEIVED = range(5)
MP_AP_RESET_HOLD = 9

DEBUGREGS = Layout(
    "debugregs",
    128,
    [*(Field(name, 8 * at, 8) for at, name in enumerate(("dr0", "dr1", "dr2", "dr3", "dr6", "dr7", "flags")))],
)

# struct kvm_xcrs: u32 nr_xcrs, u32 flags, 16 entries of u32 xcr, u32 reserved, u64 value, then padding.
XCRS_SIZE = 392
XCRS_HEADER = 8
XCR_ENTRY = 16
MAX_XCRS = 16

# struct kvm_xsave: the uncompacted format of XSAVE (SDM vol. 1, 13.4) in 4096 bytes.
XSAVE_SIZE = 4096

# struct kvm_lapic_state: the first kilobyte of the APIC's page.
LAPIC_SIZE = 1024

# struct kvm_run, which user space maps, as far as it says something without guest code; then struct kvm_sync_regs.
RUN_SYNC_AT = 304
RUN = Layout(
    "run",
    RUN_SYNC_AT,
    [
        Field("request_interrupt_window", 0, 1),
        Field("immediate_exit", 1, 1),
        Field("exit_reason", 8, 4),
        Field("ready_for_interrupt_injection", 12, 1),
        Field("if_flag", 13, 1),
        Field("flags", 14, 2),
        Field("cr8", 16, 8),
        Field("apic_base", 24, 8),
        Field("hardware_entry_failure_reason", 32, 8),
        Field("cpu", 40, 4),
        Field("kvm_valid_regs", 288, 8),
        Field("kvm_dirty_regs", 296, 8),
    ],
)
RUN_SMM, RUN_GUEST_MODE = 1 << 0, 1 << 2
SYNC_REGS, SYNC_SREGS, SYNC_EVENTS = 1 << 0, 1 << 1, 1 << 2
SYNC_ALL = SYNC_REGS | SYNC_SREGS | SYNC_EVENTS

VCPU_MMAP_SIZE = 3 * 4096  # struct kvm_run, port data, coalesced MMIO
