"""KVM_GET and KVM_SET of LAPIC, XSAVE, XCRS and DEBUGREGS: state that is kept and checked as KVM does.

Source: Linux 5.3 and 7.1, arch/x86/kvm/x86.c; sizes are in ``engine.arch.kvm_vcpu_structs``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from engine.arch import kvm_vcpu_structs as abi
from engine.ioctls.registry import Target, offered
from engine.ioctls.vcpu_rows import getting, setting
from engine.kvm.memory_views import GuestMemory
from engine.state.profiles import ONLY_LATEST
from engine.vcpu import extended_state, lapic
from engine.vcpu.registers import DR7_FIXED
from engine.vcpu.vcpu import Vcpu

CAP_DEBUGREGS, CAP_XSAVE = 50, 55

DR6_AT_RESET = 0xFFFF_0FF0
_DEBUG_REGISTERS = {"dr0": 0, "dr1": 0, "dr2": 0, "dr3": 0, "dr6": DR6_AT_RESET, "dr7": DR7_FIXED}
_XCR = struct.Struct("<IIQ")


def without_lapic(vcpu: Vcpu) -> str | None:
    """A vCPU whose local APIC is not in the kernel has no state of one there."""
    return None if vcpu.lapic_in_kernel else "EINVAL"


def set_lapic(vcpu: Vcpu, _: GuestMemory, raw: bytes) -> None:
    """KVM_SET_LAPIC."""
    lapic.set_state(vcpu, raw)


def set_xsave(vcpu: Vcpu, _: GuestMemory, raw: bytes) -> str | None:
    """KVM_SET_XSAVE."""
    return extended_state.set_area(vcpu, raw)


def xcrs_bytes(vcpu: Vcpu) -> bytes:
    """struct kvm_xcrs: XCR0 is the only one."""
    entry = _XCR.pack(0, 0, extended_state.xcr0(vcpu))
    return (struct.pack("<II", 1, 0) + entry).ljust(abi.XCRS_SIZE, b"\0")


def set_xcrs(vcpu: Vcpu, _: GuestMemory, raw: bytes) -> str | None:
    """KVM_SET_XCRS: the first entry that is of XCR0 counts; none is fine."""
    count, flags = struct.unpack_from("<II", raw)
    if count > abi.MAX_XCRS or flags:
        return "EINVAL"
    for at in range(count):
        number, _reserved, value = _XCR.unpack_from(raw, abi.XCRS_HEADER + at * abi.XCR_ENTRY)
        if number == 0:
            if extended_state.xcr0_refused(vcpu, value):
                return "EINVAL"
            vcpu.registers["xcr0"] = value
            return None
    return None


def debugregs_bytes(vcpu: Vcpu) -> bytes:
    """struct kvm_debugregs."""
    raw = bytearray(abi.DEBUGREGS.size)
    for name, first in _DEBUG_REGISTERS.items():
        abi.DEBUGREGS.put(raw, name, vcpu.registers.get(name, first))
    return bytes(raw)


def set_debugregs(vcpu: Vcpu, _: GuestMemory, raw: bytes) -> str | None:
    """KVM_SET_DEBUGREGS: DR6 and DR7 have 32 bits and no flag is known; the addresses may be anything."""
    given = {name: abi.DEBUGREGS.get(raw, name) for name in _DEBUG_REGISTERS}
    if abi.DEBUGREGS.get(raw, "flags") or given["dr6"] >> 32 or given["dr7"] >> 32:
        return "EINVAL"
    vcpu.registers.update(given)
    return None


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType({CAP_DEBUGREGS: offered, CAP_XSAVE: offered})

ROWS = (
    getting("LAPIC", lapic.state_bytes, without_lapic),
    setting("LAPIC", abi.LAPIC_SIZE, set_lapic, without_lapic),
    getting("XSAVE", extended_state.area_bytes),
    replace(getting("XSAVE2", extended_state.area_bytes), profiles=ONLY_LATEST),
    setting("XSAVE", abi.XSAVE_SIZE, set_xsave),
    getting("XCRS", xcrs_bytes),
    setting("XCRS", abi.XCRS_SIZE, set_xcrs),
    getting("DEBUGREGS", debugregs_bytes),
    setting("DEBUGREGS", abi.DEBUGREGS.size, set_debugregs),
)
