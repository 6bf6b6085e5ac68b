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
from engine.arch import nested_state as abi
from engine.arch.struct_layout import Field, Layout
from engine.arch.vmx_msrs import EFER_LMA, EFER_LME, EFER_NX, EFER_SCE, EFER_SVME
from engine.nested.cpuid import cr4_allowed
from engine.nested.registers import CR0_PE, CR0_PG, CR4_PAE
from engine.nested.vcpu import NestedVcpu
from engine.nested.verdict import CheckReport, Verdict, report_in_order

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


@dataclass(frozen=True)
class SvmStep:
    """One check of SVM: ``refuses`` is true when the call ends with EINVAL."""

    check: str
    says: str
    refuses: Callable[[NestedVcpu, bytes], bool]


def _header(name: str, header: bytes) -> int:
    return abi.COMMON.get(header, name)


def _no_svm(vcpu: NestedVcpu, header: bytes) -> bool:
    flags = _header("flags", header)
    return not vcpu.registers["ia32_efer"] & EFER_SVME and flags not in (0, abi.GIF_SET)


_HEADER_STEPS: tuple[SvmStep, ...] = (
    SvmStep("S1", "format is not 1", lambda v, h: _header("format", h) != abi.FORMAT_SVM),
    SvmStep(
        "S2",
        "flags has more than GUEST_MODE, RUN_PENDING, GIF_SET",
        lambda v, h: bool(_header("flags", h) & ~_KNOWN_FLAGS),
    ),
    SvmStep("S3", "EFER.SVME is 0 and flags is neither 0 nor GIF_SET", _no_svm),
    SvmStep("S4", "L2 running in SMM", lambda v, h: v.smm and bool(_header("flags", h) & abi.GUEST_MODE)),
)
_GUEST_STEPS: tuple[SvmStep, ...] = (
    SvmStep("S6", "vmcb_pa is not a page address", lambda v, h: not v.page_valid(_vmcb_pa(h))),
    SvmStep("S7", "size is less than 4224", lambda v, h: _header("size", h) < abi.MAX_SIZE_SVM),
)


def _control_refused(vcpu: NestedVcpu, vmcb: bytes) -> bool:
    width = vcpu.maxphyaddr
    paging = VMCB.get(vmcb, "nested_ctl") & _NESTED_PAGING
    return (
        not VMCB.get(vmcb, "intercept_word4") & _INTERCEPT_VMRUN
        or not VMCB.get(vmcb, "asid")
        or (bool(paging) and bool(VMCB.get(vmcb, "nested_cr3") >> width))
        or not _map_valid(VMCB.get(vmcb, "msrpm_base_pa"), _MSR_MAP_SIZE, width)
        or not _map_valid(VMCB.get(vmcb, "iopm_base_pa"), _IO_MAP_SIZE, width)
        or (bool(VMCB.get(vmcb, "int_ctl") & _VIRTUAL_NMI) and not VMCB.get(vmcb, "intercept_word3") & _INTERCEPT_NMI)
        or not _event_valid(VMCB.get(vmcb, "event_inj"))
    )


def _map_valid(address: int, size: int, width: int) -> bool:
    return not ((address & ~0xFFF) + size - 1) >> width


def _event_valid(event: int) -> bool:
    if not event & _EVENT_VALID:
        return True
    kind = event >> 8 & 7
    return kind in _EVENT_TYPES and (kind != _EVENT_EXCEPTION or event & 0xFF in _EXCEPTIONS)


def _live_cr0_refused(vcpu: NestedVcpu, vmcb: bytes) -> bool:
    return vcpu.registers["cr0"] & (_CR0_CD | _CR0_NW) == _CR0_NW


def _save_refused(vcpu: NestedVcpu, vmcb: bytes) -> bool:
    cr0, cr4, efer = (VMCB.get(vmcb, name) for name in ("cr0", "cr4", "efer"))
    if cr0 & (CR0_PG | CR0_PE) != CR0_PG | CR0_PE or VMCB.get(vmcb, "rflags") & _RFLAGS_VM:
        return True
    if not efer & EFER_SVME or efer & ~_EFER_KNOWN:
        return True
    if cr0 & (_CR0_CD | _CR0_NW) == _CR0_NW or cr0 >> 32:
        return True
    if VMCB.get(vmcb, "dr6") >> 32 or VMCB.get(vmcb, "dr7") >> 32:
        return True
    attributes = VMCB.get(vmcb, "cs_attrib")
    both = attributes & _CS_LONG and attributes & _CS_DEFAULT
    if efer & EFER_LME and (not cr4 & CR4_PAE or VMCB.get(vmcb, "cr3") >> vcpu.maxphyaddr or both):
        return True
    return bool(cr4 & ~cr4_allowed(vcpu.cpuid))


_VMCB_STEPS: tuple[SvmStep, ...] = (
    SvmStep("S9", "the control area breaks a VMRUN rule", _control_refused),
    SvmStep("S10", "CR0 of L2 has NW without CD", _live_cr0_refused),
    SvmStep("S11", "the save area of L1 breaks a VMRUN rule", _save_refused),
    SvmStep("S12", "CR3 of L2 cannot be loaded", lambda v, b: bool(v.registers["cr3"] >> v.maxphyaddr)),
)


def set_state(vcpu: NestedVcpu, header: bytes, user: UserBuffer, parts: list[CheckReport] | None = None) -> Verdict:
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
        return Verdict("EFAULT", detail="S8", says="the VMCB cannot be read")
    refused = _first(_VMCB_STEPS, vcpu, vmcb, parts)
    if refused is not None:
        return refused
    state.guest_mode = True
    state.run_pending = bool(flags & abi.RUN_PENDING)
    state.gif = bool(flags & abi.GIF_SET)
    state.vmcb_pa = _vmcb_pa(header)
    state.vmcb12[:] = vmcb
    return Verdict(detail="S13", says="L2 is entered: done")


def get_state(vcpu: NestedVcpu) -> bytes:
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


def _first(
    steps: tuple[SvmStep, ...], vcpu: NestedVcpu, data: bytes, parts: list[CheckReport] | None
) -> Verdict | None:
    if parts is not None:
        parts.extend(report_in_order((step.check, step.says, partial(step.refuses, vcpu, data)) for step in steps))
    for step in steps:
        if step.refuses(vcpu, data):
            return Verdict("EINVAL", detail=step.check, says=step.says)
    return None
