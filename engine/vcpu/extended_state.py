"""x87, SSE and AVX state of a vCPU in the format of XSAVE, and XCR0 (SDM vol. 1, chapter 13).

What was set is kept as it came; a GET shows of it what the kernel would have kept. The host has the components of leaf
0xD of its CPUID: x87, SSE and AVX. Source: Linux 5.3, arch/x86/kvm/x86.c (load_xsave, fill_xsave, __kvm_set_xcr);
Linux 7.1, arch/x86/kernel/fpu (copy_uabi_to_xstate, __copy_xstate_to_uabi_buf).
"""

from __future__ import annotations

from engine.arch.hyperv_cpuid import find_leaf
from engine.arch.kvm_vcpu_structs import XSAVE_SIZE
from engine.vcpu.vcpu import Vcpu

X87, SSE, AVX = 1 << 0, 1 << 1, 1 << 2
HOST_COMPONENTS = X87 | SSE | AVX

MXCSR_AT, ST_AT, XMM_AT, XMM_END, SOFTWARE_AT = 24, 32, 160, 416, 464
HEADER_AT, AVX_AT, AREA_SIZE = 512, 576, 832
_FCW_AT_RESET, _MXCSR_AT_RESET = 0x37F, 0x1F80
_MXCSR_MASK = {"intel": 0xFFFF, "amd": 0x2_FFFF}

# The words that the kernel of today leaves for signal handlers: a magic, sizes and the components.
_SOFTWARE_WORDS = (0x4650_5853, AREA_SIZE + 4, HOST_COMPONENTS, 0, AREA_SIZE)


def xcr0(vcpu: Vcpu) -> int:
    """The value, x87 alone after RESET."""
    return vcpu.registers.get("xcr0", X87)


def guest_components(vcpu: Vcpu) -> int:
    """The components that the guest may enable: those of its leaf 0xD that the host has."""
    leaf = find_leaf(vcpu.cpuid, 0xD)
    return 0 if leaf is None else (leaf.eax | leaf.edx << 32) & HOST_COMPONENTS


def xcr0_refused(vcpu: Vcpu, value: int) -> bool:
    """Whether XCR0 cannot have a value: x87 always, AVX with SSE only, nothing that the guest has not."""
    if not value & X87 or (value & AVX and not value & SSE):
        return True
    return bool(value & ~(guest_components(vcpu) | X87))


def area_bytes(vcpu: Vcpu) -> bytes:
    """struct kvm_xsave."""
    kept = vcpu.xsave.ljust(AREA_SIZE, b"\0") if vcpu.xsave else bytes(_initial(0))
    present = _word(kept, HEADER_AT, 8) & (guest_components(vcpu) | X87 | SSE)
    area = bytearray(AREA_SIZE)
    if vcpu.kvm.vcpu.xsave_normalised:
        _copy_components(area, kept, present, _MXCSR_MASK[vcpu.host.vendor])
    else:
        area[:HEADER_AT] = kept[:HEADER_AT]
    area[HEADER_AT : HEADER_AT + 8] = present.to_bytes(8, "little")
    if present & AVX:
        area[AVX_AT:] = kept[AVX_AT:AREA_SIZE]
    return bytes(area).ljust(XSAVE_SIZE, b"\0")


def set_area(vcpu: Vcpu, raw: bytes) -> str | None:
    """Take struct kvm_xsave; None, or the errno.

    The kernel of 2019 looks at the components and MXCSR. Today's wants the rest of the header to be 0, too, and looks
    at MXCSR where a component has it.
    """
    present, mxcsr = _word(raw, HEADER_AT, 8), _word(raw, MXCSR_AT, 4)
    today = vcpu.kvm.vcpu.xsave_normalised
    if present & ~HOST_COMPONENTS or (today and any(raw[HEADER_AT + 8 : AVX_AT])):
        return "EINVAL"
    if (present or not today) and mxcsr & ~_MXCSR_MASK[vcpu.host.vendor]:
        return "EINVAL"
    vcpu.xsave = bytes(raw[:AREA_SIZE])
    return None


def _initial(mask: int) -> bytearray:
    area = bytearray(AREA_SIZE)
    area[:2] = _FCW_AT_RESET.to_bytes(2, "little")
    area[MXCSR_AT:ST_AT] = _MXCSR_AT_RESET.to_bytes(4, "little") + mask.to_bytes(4, "little")
    return area


def _copy_components(area: bytearray, kept: bytes, present: int, mask: int) -> None:
    """The legacy part with what is not present in its initial state."""
    area[:] = _initial(mask)
    if present & X87:
        area[:MXCSR_AT], area[ST_AT:XMM_AT] = kept[:MXCSR_AT], kept[ST_AT:XMM_AT]
    if present & (SSE | AVX):
        area[MXCSR_AT:ST_AT] = kept[MXCSR_AT:ST_AT]
    if present & SSE:
        area[XMM_AT:XMM_END] = kept[XMM_AT:XMM_END]
    for at, word in enumerate(_SOFTWARE_WORDS):
        area[SOFTWARE_AT + 4 * at : SOFTWARE_AT + 4 * at + 4] = word.to_bytes(4, "little")


def _word(raw: bytes, at: int, size: int) -> int:
    return int.from_bytes(raw[at : at + size], "little")
