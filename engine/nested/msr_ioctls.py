"""MSRs through the binary ABI: which there are, KVM_GET_MSRS, KVM_SET_MSRS and the two lists.

A kernel refuses MSRs that it does not know. The numbers here are those of KVM on the described host; the instructions
and the MSR lists of a VM entry, which ``engine.nested.msrs`` serves, take any.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from engine.abi import UserBuffer
from engine.arch import vmx_msrs as vmx
from engine.arch.kvm_vcpu_structs import MAX_MSRS, MSR_ENTRY, MSRS_HEADER
from engine.kvm.trial_memory import GuestMemory
from engine.nested.operations import set_msr
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_ASSIST_PAGE, HV_VP_INDEX
from engine.vcpu.msrs import read_msr
from engine.vcpu.vcpu import NestedHost, NestedVcpu

# KVM_GET_MSR_INDEX_LIST: what a migration has to carry.
SAVED_MSRS = (
    *(0x174, 0x176, 0x175, 0xC000_0081, 0xC000_0083, 0xC000_0084, 0xC000_0082, 0xC000_0102),
    *(0x10, 0x277, 0xC001_0117, vmx.IA32_FEATURE_CONTROL, 0xC000_0103, 0xD90, 0x1A0, 0x3B, 0x6E0, 0x179, 0x17A, 0x9E),
    *(0x11, 0x12, 0x4B56_4D00, 0x4B56_4D01, 0x4B56_4D02, 0x4B56_4D03, 0x4B56_4D04),
    *(HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_INDEX, 0x4000_0003, 0x4000_0020, 0x4000_0021, HV_VP_ASSIST_PAGE),
)
# Known besides: EFER and other registers, MTRRs, machine check, microcode, what needs no carrying.
_FURTHER_MSRS = frozenset(
    {
        *(vmx.EFER, 0x1D9, 0xC000_0080, 0xC000_0100, 0xC000_0101, 0x1B, 0x17, 0x2A, 0x8B, 0xCD, 0xCE, 0xFE, 0x17B),
        *(0x198, 0x199, 0x19A, 0x1DB, 0x1DC, 0x1DD, 0x1DE, 0xDA0, 0x140, 0x10A, 0x48),
        *range(0x200, 0x210),
        *(0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF),
        *range(0x400, 0x480),
        *range(vmx.VMX_MSR_FIRST, vmx.VMX_MSR_LAST + 1),
        *range(0x4000_0080, 0x4000_00A0),
        *range(0x800, 0x840),
    }
)
KNOWN_MSRS = frozenset(SAVED_MSRS) | _FURTHER_MSRS
_MICROCODE, _ARCH_CAPABILITIES = 0x8B, 0x10A
# CR4 bits of the described processor: all that are defined up to PKE, but for the one between SMXE and FSGSBASE.
_HOST_CR4 = 0x0077_7FFF


def feature_msrs(host: NestedHost) -> tuple[int, ...]:
    """KVM_GET_MSR_FEATURE_INDEX_LIST: MSRs that describe the host, VMX capabilities only with nesting."""
    vmx_msrs = tuple(range(vmx.VMX_MSR_FIRST, vmx.VMX_MSR_LAST + 1)) if host.intel and host.nested else ()
    return *vmx_msrs, _MICROCODE, _ARCH_CAPABILITIES


def read_feature(host: NestedHost, profile: str, number: int) -> int | None:
    """KVM_GET_MSRS on the system device: the value, None for what is no feature."""
    if number not in feature_msrs(host):
        return None
    if number in (_MICROCODE, _ARCH_CAPABILITIES):
        return 0
    if number == vmx.MSR_BY_NAME["IA32_VMX_CR4_FIXED1"]:
        return _HOST_CR4
    return host.capabilities(profile).read(number)


def list_numbers(user: UserBuffer, numbers: tuple[int, ...]) -> str | None:
    """struct kvm_msr_list: the count goes out before it is compared with the room."""
    raw = user.copy_from(0, 4)
    if raw is None or not user.copy_to(0, len(numbers).to_bytes(4, "little")):
        return "EFAULT"
    if int.from_bytes(raw, "little") < len(numbers):
        return "E2BIG"
    body = b"".join(number.to_bytes(4, "little") for number in numbers)
    return None if user.copy_to(4, body) else "EFAULT"


def _entries(user: UserBuffer) -> tuple[list[tuple[int, int, int]], str | None]:
    raw = user.copy_from(0, MSRS_HEADER)
    if raw is None:
        return [], "EFAULT"
    count = int.from_bytes(raw[:4], "little")
    if count >= MAX_MSRS:
        return [], "E2BIG"
    body = user.copy_from(MSRS_HEADER, count * MSR_ENTRY)
    if body is None:
        return [], "EFAULT"
    return [struct.unpack_from("<IIQ", body, at) for at in range(0, len(body), MSR_ENTRY)], None


def get_msrs(user: UserBuffer, read: Callable[[int], int | None]) -> tuple[int, str | None]:
    """KVM_GET_MSRS: how many were read before the first that could not be; all entries are copied back."""
    entries, errno = _entries(user)
    if errno is not None:
        return -1, errno
    done, body = 0, b""
    for number, reserved, data in entries:
        value = read(number) if done == len(body) // MSR_ENTRY else None
        done += value is not None
        body += struct.pack("<IIQ", number, reserved, data if value is None else value)
    return (done, None) if user.copy_to(MSRS_HEADER, body) else (-1, "EFAULT")


def set_msrs(vcpu: NestedVcpu, memory: GuestMemory, user: UserBuffer) -> tuple[int, str | None]:
    """KVM_SET_MSRS: how many were written before the first that could not be."""
    entries, errno = _entries(user)
    if errno is not None:
        return -1, errno
    for done, (number, _, value) in enumerate(entries):
        if number not in KNOWN_MSRS or not set_msr(vcpu, memory, number, value):
            return done, None
    return len(entries), None


def read_known(vcpu: NestedVcpu, number: int) -> int | None:
    """A host read of an MSR, None for one that the kernel does not know."""
    return read_msr(vcpu, number, host=True) if number in KNOWN_MSRS else None
