"""The events: which there are, what each carries, and how a message of one is made.

A message is a part that all have (its own size, vCPU, event, then the registers) and a part of its own. Clients read
CR3, RIP and the mode from the first one, so it is always whole.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from service.kvmi.guest import Registers
from service.kvmi.wire import V6, V7

# Header ids of a message to the tool, and of its answer.
EVENT, EVENT_REPLY = 1, 0

UNHOOK, CR, MSR, XSETBV, BREAKPOINT, HYPERCALL, PF, TRAP = range(8)
DESCRIPTOR, CREATE_VCPU, PAUSE_VCPU, SINGLESTEP, CMD_ERROR, CPUID = range(8, 14)

# size of this part, vCPU, event, padding; then mode, padding, view, padding.
_COMMON = struct.Struct("<HHB3xBxH4x")
# sysenter_cs, _esp, _eip, efer, star, lstar, cstar, pat, shadow_gs: the MSRs behind the registers of an event.
EVENT_MSRS = (0x174, 0x175, 0x176, 0xC000_0080, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0x277, 0xC000_0102)
_MSRS = struct.Struct(f"<{len(EVENT_MSRS)}Q")
COMMON_SIZE = 544
_REGISTERS = COMMON_SIZE - _COMMON.size

# gva, gpa, access, padding, view, padding.
_PF = struct.Struct("<QQBxHI")
# Which register, padding, what it has, what it is to have.
_CR = struct.Struct("<H6xQQ")
# What it gets, after the start of the answer.
CR_ANSWER = struct.Struct("<Q")
# Whether the step failed, padding; v7 only.
_SINGLESTEP = struct.Struct("<B7x")

# vCPU header, action, event, padding: the start of an answer; what follows is of the event.
ANSWER = struct.Struct("<HHIBB6s")
# ctx_addr, ctx_size, v6: step one instruction, rep_complete, padding, and 256 bytes of data: the rest of PF's.
PF_ANSWER = struct.Struct("<QIBBH256s")
MOST_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class EventKind:
    """An event. ``sent`` says when it is sent here, empty for one that never comes; ``switch`` is the command that
    enables it; ``answer_size`` what may follow the start of an answer."""

    id: int
    name: str
    switch: str = "CONTROL_EVENTS"
    sent: str = ""
    answer_size: int = 0
    dialects: tuple[str, ...] = (V7, V6)


EVENTS = {
    kind.id: kind
    for kind in (
        EventKind(
            UNHOOK,
            "UNHOOK",
            "CONTROL_VM_EVENTS",
            "when the attachment is deleted, the VM is, or the service stops; the tool closes then",
        ),
        EventKind(
            CR,
            "CR",
            "CONTROL_EVENTS, CONTROL_CR",
            "before a `mov-cr3` of a trace that asks; CR0 and CR4: never",
            answer_size=CR_ANSWER.size,
        ),
        EventKind(MSR, "MSR", answer_size=8),
        EventKind(XSETBV, "XSETBV"),
        EventKind(BREAKPOINT, "BREAKPOINT"),
        EventKind(HYPERCALL, "HYPERCALL"),
        EventKind(
            PF,
            "PF",
            sent="an access that asks (`on_violation=ask`) is refused by what this tool set",
            answer_size=PF_ANSWER.size,
        ),
        EventKind(TRAP, "TRAP"),
        EventKind(DESCRIPTOR, "DESCRIPTOR"),
        EventKind(
            CREATE_VCPU, "CREATE_VCPU", "CONTROL_VM_EVENTS", "when a vCPU is created while the tool is connected"
        ),
        EventKind(PAUSE_VCPU, "PAUSE_VCPU", "PAUSE_VCPU", "after PAUSE_VCPU, once for each"),
        EventKind(
            SINGLESTEP,
            "SINGLESTEP",
            "CONTROL_EVENTS, CONTROL_SINGLESTEP",
            "after the answer to PF, while that one access lands: a step is a record, not an instruction",
        ),
        EventKind(CMD_ERROR, "CMD_ERROR", "CONTROL_VM_EVENTS", dialects=(V7,)),
        EventKind(CPUID, "CPUID", dialects=(V7,)),
    )
}

# What each of the two commands that enable events takes; PAUSE_VCPU is nobody's.
OF_THE_VM = frozenset({UNHOOK, CREATE_VCPU, CMD_ERROR})
OF_A_VCPU = frozenset(EVENTS) - OF_THE_VM - {PAUSE_VCPU}


def common_part(vcpu: int, event: int, registers: Registers) -> bytes:
    """What every event of a vCPU begins with. ``registers`` has the MSRs of EVENT_MSRS."""
    start = _COMMON.pack(COMMON_SIZE, vcpu, event, registers.mode, 0)
    return start + registers.regs + registers.sregs + _MSRS.pack(*registers.msrs)


def unhook_part() -> bytes:
    """UNHOOK, which has no registers."""
    return _COMMON.pack(COMMON_SIZE, 0, UNHOOK, 0, 0) + bytes(_REGISTERS)


def pf_part(gva: int, gpa: int, access: int) -> bytes:
    """What PF has of its own."""
    return _PF.pack(gva, gpa, access, 0, 0)


def cr_part(register: int, old: int, new: int) -> bytes:
    """What CR has of its own."""
    return _CR.pack(register, old, new)


def singlestep_part(dialect: str) -> bytes:
    """What SINGLESTEP has of its own."""
    return _SINGLESTEP.pack(0) if dialect == V7 else b""
