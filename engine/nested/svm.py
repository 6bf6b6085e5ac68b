"""Nested state on AMD hosts, where only today's kernel has it.

A failing SET up to the last check leaves the old state alone. GET gives the VMCB page back as SET stored it: the
kernel composes it from its own copies of the control and save areas and drops fields it does not know.
Source: Linux v7.1; AMD APM volume 2, "VMRUN" consistency checks and the VMCB layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.abi import UserBuffer
from engine.arch import kvm_nested_state as abi
from engine.arch.struct_layout import Field, Layout
from engine.arch.vmx_msrs import EFER_LMA, EFER_LME, EFER_NX, EFER_SCE, EFER_SVME
from engine.nested.verdict import CheckReport, Facts, Verdict, report_in_order
from engine.vcpu.cpuid import cr4_allowed
from engine.vcpu.registers import CR0_PE, CR0_PG, CR4_PAE
from engine.vcpu.vcpu import Vcpu

_KNOWN_FLAGS = abi.GUEST_MODE | abi.RUN_PENDING | abi.GIF_SET

VMCB = Layout(
    "vmcb",
    abi.VMCB_PAGE,
    [
        Field("intercept_word3", 0x0C, 4),
        Field("intercept_word4", 0x10, 4),
        Field("iopm_base_pa", 0x40, 8),
        Field("msrpm_base_pa", 0x48, 8),
        Field("asid", 0x58, 4),
        Field("int_ctl", 0x60, 4),
        Field("nested_ctl", 0x90, 8),
        Field("event_inj", 0xA8, 4),
        Field("nested_cr3", 0xB0, 8),
        Field("cs_attrib", 0x412, 2),
        Field("efer", 0x4D0, 8),
        Field("cr4", 0x548, 8),
        Field("cr3", 0x550, 8),
        Field("cr0", 0x558, 8),
        Field("dr7", 0x560, 8),
        Field("dr6", 0x568, 8),
        Field("rflags", 0x570, 8),
    ],
)

_INTERCEPT_NMI = 1 << 1
_INTERCEPT_VMRUN = 1 << 0
_NESTED_PAGING = 1 << 0
_VIRTUAL_NMI = 1 << 26
_MSR_MAP_SIZE = 0x2000
_IO_MAP_SIZE = 0x3000
_EVENT_VALID = 1 << 31
_EVENT_TYPES = (0, 2, 3, 4)
_EVENT_EXCEPTION = 3
# Defined vectors except #NMI; #CP and #VC need features that the described guest does not have.
_EXCEPTIONS = frozenset({0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 28, 30})
_CR0_NW, _CR0_CD = 1 << 29, 1 << 30
_RFLAGS_VM = 1 << 17
_CS_LONG, _CS_DEFAULT = 1 << 9, 1 << 10
_EFER_KNOWN = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX | EFER_SVME


_UNREADABLE = "the VMCB cannot be read"

# Where a rule about a VMCB binds.
Where = Callable[[bytes], bool]


@dataclass(frozen=True)
class Rule:
    """What one field must be: ``found`` reads it from the vCPU and the header or VMCB, ``holds`` judges it."""

    field: str
    required: str
    found: Callable[[Vcpu, bytes], int]
    holds: Callable[[Vcpu, bytes], bool]

    def facts(self, vcpu: Vcpu, data: bytes) -> Facts:
        """The rule in words."""
        return Facts(self.field, f"{self.found(vcpu, data):#x}", self.required)


@dataclass(frozen=True)
class SvmStep:
    """One check of SVM: the call ends with EINVAL unless all its ``rules`` hold."""

    check: str
    says: str
    rules: tuple[Rule, ...]

    def broken(self, vcpu: Vcpu, data: bytes) -> Rule | None:
        """The first rule that does not hold."""
        return next((rule for rule in self.rules if not rule.holds(vcpu, data)), None)

    def inspect(self, vcpu: Vcpu, data: bytes) -> tuple[bool, Facts]:
        """Whether the check refuses, and what it looked at last."""
        broken = self.broken(vcpu, data)
        return broken is not None, (broken or self.rules[-1]).facts(vcpu, data)


def _header(name: str, header: bytes) -> int:
    return abi.COMMON.get(header, name)


def _of_header(name: str, required: str, holds: Callable[[Vcpu, int], bool]) -> Rule:
    return Rule(name, required, lambda v, h: _header(name, h), lambda v, h: holds(v, _header(name, h)))


def _of_vmcb(name: str, required: str, holds: Callable[[Vcpu, int], bool], where: Where | None = None) -> Rule:
    """A rule about a field of the VMCB, which binds where ``where`` says so."""
    return Rule(
        f"vmcb12.{name}",
        required,
        lambda v, b: VMCB.get(b, name),
        lambda v, b: (where is not None and not where(b)) or holds(v, VMCB.get(b, name)),
    )


def _of_register(name: str, required: str, holds: Callable[[Vcpu, int], bool]) -> Rule:
    return Rule(f"registers.{name}", required, lambda v, _: v.registers[name], lambda v, _: holds(v, v.registers[name]))


def _flag(name: str, mask: int) -> Where:
    return lambda vmcb: bool(VMCB.get(vmcb, name) & mask)


def _map_valid(address: int, size: int, width: int) -> bool:
    return not ((address & ~0xFFF) + size - 1) >> width


def _event_valid(event: int) -> bool:
    if not event & _EVENT_VALID:
        return True
    kind = event >> 8 & 7
    return kind in _EVENT_TYPES and (kind != _EVENT_EXCEPTION or event & 0xFF in _EXCEPTIONS)


def _efer_valid(vcpu: Vcpu, efer: int) -> bool:
    return bool(efer & EFER_SVME) and not efer & ~_EFER_KNOWN


def _cache_bits_valid(vcpu: Vcpu, cr0: int) -> bool:
    return cr0 & (_CR0_CD | _CR0_NW) != _CR0_NW


_IN_WIDTH = "within the guest's physical address width"
_LONG = _flag("efer", EFER_LME)

_HEADER_STEPS: tuple[SvmStep, ...] = (
    SvmStep("S1", "format is not 1", (_of_header("format", "0x1 (SVM)", lambda v, f: f == abi.FORMAT_SVM),)),
    SvmStep(
        "S2",
        "flags has more than GUEST_MODE, RUN_PENDING, GIF_SET",
        (_of_header("flags", f"no bit outside {_KNOWN_FLAGS:#x}", lambda v, f: not f & ~_KNOWN_FLAGS),),
    ),
    SvmStep(
        "S3",
        "EFER.SVME is 0 and flags is neither 0 nor GIF_SET",
        (
            _of_header(
                "flags",
                f"0 or GIF_SET ({abi.GIF_SET:#x}) while EFER.SVME is 0",
                lambda v, f: bool(v.registers["ia32_efer"] & EFER_SVME) or f in (0, abi.GIF_SET),
            ),
        ),
    ),
    SvmStep(
        "S4",
        "L2 running in SMM",
        (
            _of_header(
                "flags",
                f"no GUEST_MODE ({abi.GUEST_MODE:#x}) while the vCPU is in SMM",
                lambda v, f: not (v.smm and f & abi.GUEST_MODE),
            ),
        ),
    ),
)
_GUEST_STEPS: tuple[SvmStep, ...] = (
    SvmStep(
        "S6",
        "vmcb_pa is not a page address",
        (
            Rule(
                "svm.vmcb_pa",
                f"a multiple of 4096 {_IN_WIDTH}",
                lambda v, h: _vmcb_pa(h),
                lambda v, h: v.page_valid(_vmcb_pa(h)),
            ),
        ),
    ),
    SvmStep(
        "S7",
        "size is less than 4224",
        (_of_header("size", f"at least {abi.MAX_SIZE_SVM:#x}", lambda v, size: size >= abi.MAX_SIZE_SVM),),
    ),
)

# APM volume 2, 15.5.1: what VMRUN refuses.
_CONTROL_RULES = (
    _of_vmcb("intercept_word4", "bit 0: VMRUN is intercepted", lambda v, word: bool(word & _INTERCEPT_VMRUN)),
    _of_vmcb("asid", "another than 0", lambda v, asid: asid != 0),
    _of_vmcb("nested_cr3", _IN_WIDTH, lambda v, cr3: not cr3 >> v.maxphyaddr, _flag("nested_ctl", _NESTED_PAGING)),
    _of_vmcb("msrpm_base_pa", f"8 KiB {_IN_WIDTH}", lambda v, at: _map_valid(at, _MSR_MAP_SIZE, v.maxphyaddr)),
    _of_vmcb("iopm_base_pa", f"12 KiB {_IN_WIDTH}", lambda v, at: _map_valid(at, _IO_MAP_SIZE, v.maxphyaddr)),
    _of_vmcb(
        "intercept_word3",
        "bit 1: NMIs are intercepted where they are virtual",
        lambda v, word: bool(word & _INTERCEPT_NMI),
        _flag("int_ctl", _VIRTUAL_NMI),
    ),
    _of_vmcb("event_inj", "a well-formed event, if any", lambda v, event: _event_valid(event)),
)
_SAVE_RULES = (
    _of_vmcb("cr0", "PE and PG", lambda v, cr0: cr0 & (CR0_PG | CR0_PE) == CR0_PG | CR0_PE),
    _of_vmcb("rflags", "without VM", lambda v, flags: not flags & _RFLAGS_VM),
    _of_vmcb("efer", f"SVME, and no bit outside {_EFER_KNOWN:#x}", _efer_valid),
    _of_vmcb("cr0", "no NW without CD, and 32 bits", lambda v, cr0: _cache_bits_valid(v, cr0) and not cr0 >> 32),
    _of_vmcb("dr6", "32 bits", lambda v, dr6: not dr6 >> 32),
    _of_vmcb("dr7", "32 bits", lambda v, dr7: not dr7 >> 32),
    _of_vmcb("cr4", "PAE with EFER.LME", lambda v, cr4: bool(cr4 & CR4_PAE), _LONG),
    _of_vmcb("cr3", f"{_IN_WIDTH} with EFER.LME", lambda v, cr3: not cr3 >> v.maxphyaddr, _LONG),
    _of_vmcb(
        "cs_attrib",
        "not both L and D with EFER.LME",
        lambda v, cs: cs & (_CS_LONG | _CS_DEFAULT) != _CS_LONG | _CS_DEFAULT,
        _LONG,
    ),
    _of_vmcb("cr4", "no bit that the guest's CPUID does not give it", lambda v, cr4: not cr4 & ~cr4_allowed(v.cpuid)),
)

_VMCB_STEPS: tuple[SvmStep, ...] = (
    SvmStep("S9", "the control area breaks a VMRUN rule", _CONTROL_RULES),
    SvmStep("S10", "CR0 of L2 has NW without CD", (_of_register("cr0", "no NW without CD", _cache_bits_valid),)),
    SvmStep("S11", "the save area of L1 breaks a VMRUN rule", _SAVE_RULES),
    SvmStep(
        "S12",
        "CR3 of L2 cannot be loaded",
        (_of_register("cr3", _IN_WIDTH, lambda v, cr3: not cr3 >> v.maxphyaddr),),
    ),
)


def set_state(vcpu: Vcpu, header: bytes, user: UserBuffer, parts: list[CheckReport] | None = None) -> Verdict:
    """The SVM part of KVM_SET_NESTED_STATE. The verdict's detail is the id of the deciding check.

    Reports of the checks that were made go to ``parts``.
    """
    refused = _first(_HEADER_STEPS, vcpu, header, parts)
    if refused is not None:
        return refused
    state, flags = vcpu.svm, _header("flags", header)
    if not flags & abi.GUEST_MODE:
        state.guest_mode = state.run_pending = False
        state.gif = bool(flags & abi.GIF_SET)
        return Verdict(detail="S5", says="GUEST_MODE is clear: leaves L2 and takes GIF over, done")
    refused = _first(_GUEST_STEPS, vcpu, header, parts)
    if refused is not None:
        return refused
    vmcb = user.copy_from(abi.DATA_OFFSET, abi.VMCB_PAGE)
    if vmcb is None:
        if parts is not None:
            parts.append(CheckReport("S8", _UNREADABLE, "decides", None, *_facts_of_copy(user)))
        return Verdict("EFAULT", detail="S8", says=_UNREADABLE)
    refused = _first(_VMCB_STEPS, vcpu, vmcb, parts)
    if refused is not None:
        return refused
    state.guest_mode = True
    state.run_pending = bool(flags & abi.RUN_PENDING)
    state.gif = bool(flags & abi.GIF_SET)
    state.vmcb_pa = _vmcb_pa(header)
    state.vmcb12[:] = vmcb
    return Verdict(detail="S13", says="L2 is entered: done")


def get_state(vcpu: Vcpu) -> bytes:
    """Header, and in L2 the VMCB page: 128 or 4224 bytes."""
    state = vcpu.svm
    flags = abi.GIF_SET if state.gif else 0
    if state.guest_mode:
        flags |= abi.GUEST_MODE | (abi.RUN_PENDING if state.run_pending else 0)
    size = abi.MAX_SIZE_SVM if state.guest_mode else abi.HEADER_SIZE
    blob = bytearray(size)
    for name, value in (("flags", flags), ("format", abi.FORMAT_SVM), ("size", size)):
        abi.COMMON.put(blob, name, value)
    if state.guest_mode:
        blob[abi.COMMON.size : abi.COMMON.size + 8] = state.vmcb_pa.to_bytes(8, "little")
        blob[abi.DATA_OFFSET :] = state.vmcb12
    return bytes(blob)


def _vmcb_pa(header: bytes) -> int:
    return abi.SVM_HEADER.get(header[abi.COMMON.size :], "vmcb_pa")


def _facts_of_copy(user: UserBuffer) -> Facts:
    given = len(user.data or b"") - user.base
    return Facts("data", f"{given} bytes", f"{abi.VMCB_PAGE} bytes at offset {abi.DATA_OFFSET} that can be read")


def _first(steps: tuple[SvmStep, ...], vcpu: Vcpu, data: bytes, parts: list[CheckReport] | None) -> Verdict | None:
    if parts is not None:
        parts.extend(report_in_order((step.check, step.says, partial(step.inspect, vcpu, data)) for step in steps))
    for step in steps:
        if step.broken(vcpu, data) is not None:
            return Verdict("EINVAL", detail=step.check, says=step.says)
    return None
