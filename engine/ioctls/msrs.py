"""MSRs through the binary ABI: which there are, KVM_GET_MSRS, KVM_SET_MSRS and the two lists.

A kernel refuses MSRs that it does not know. The numbers here are those of KVM on the described host; the instructions
and the MSR lists of a VM entry, which ``engine.vcpu.msrs`` serves, take any.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.abi import SYSTEM, Call, Reply, failed
from engine.arch import vmx_msrs as vmx
from engine.arch.kvm_vcpu_structs import MAX_MSRS, MSR_ENTRY, MSRS_HEADER
from engine.ioctls.registry import Ioctl, Target, offered
from engine.ioctls.vcpu_rows import changing, host_of, reading
from engine.kvm.memory_views import GuestMemory
from engine.nested.operations import set_msr
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_ASSIST_PAGE, HV_VP_INDEX, K7_HWCR
from engine.vcpu.msrs import read_msr
from engine.vcpu.vcpu import Vcpu, VcpuHost

CAP_GET_MSR_FEATURES = 153

# KVM_GET_MSR_INDEX_LIST: what a migration has to carry.
SAVED_MSRS = (
    *(0x174, 0x176, 0x175, 0xC000_0081, 0xC000_0083, 0xC000_0084, 0xC000_0082, 0xC000_0102),
    *(0x10, 0x277, 0xC001_0117, vmx.IA32_FEATURE_CONTROL, 0xC000_0103, 0xD90, 0x1A0, 0x3B, 0x6E0, 0x179, 0x17A, 0x9E),
    *(0x11, 0x12, 0x4B56_4D00, 0x4B56_4D01, 0x4B56_4D02, 0x4B56_4D03, 0x4B56_4D04),
    *(HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_INDEX, 0x4000_0003, 0x4000_0020, 0x4000_0021, HV_VP_ASSIST_PAGE),
    K7_HWCR,
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


def feature_msrs(host: VcpuHost) -> tuple[int, ...]:
    """KVM_GET_MSR_FEATURE_INDEX_LIST: MSRs that describe the host, VMX capabilities only with nesting."""
    vmx_msrs = tuple(range(vmx.VMX_MSR_FIRST, vmx.VMX_MSR_LAST + 1)) if host.intel and host.nested else ()
    return *vmx_msrs, _MICROCODE, _ARCH_CAPABILITIES


def read_feature(host: VcpuHost, profile: str, number: int) -> int | None:
    """KVM_GET_MSRS on the system device: the value, None for what is no feature."""
    if number not in feature_msrs(host):
        return None
    if number in (_MICROCODE, _ARCH_CAPABILITIES):
        return 0
    if number == vmx.MSR_BY_NAME["IA32_VMX_CR4_FIXED1"]:
        return _HOST_CR4
    return host.capabilities(profile).read(number)


def _list(call: Call, numbers: tuple[int, ...]) -> Reply:
    """struct kvm_msr_list: the count goes out before it is compared with the room."""
    raw = call.user.copy_from(0, 4)
    if raw is None or not call.user.copy_to(0, len(numbers).to_bytes(4, "little")):
        return failed("EFAULT")
    if int.from_bytes(raw, "little") < len(numbers):
        return failed("E2BIG")
    body = b"".join(number.to_bytes(4, "little") for number in numbers)
    return Reply(0) if call.user.copy_to(4, body) else failed("EFAULT")


def _entries(call: Call) -> list[tuple[int, int, int]] | Reply:
    """Index, reserved word and value of each entry, or the answer that ends the call."""
    raw = call.user.copy_from(0, MSRS_HEADER)
    if raw is None:
        return failed("EFAULT")
    count = int.from_bytes(raw[:4], "little")
    if count >= MAX_MSRS:
        return failed("E2BIG")
    body = call.user.copy_from(MSRS_HEADER, count * MSR_ENTRY)
    if body is None:
        return failed("EFAULT")
    return [struct.unpack_from("<IIQ", body, at) for at in range(0, len(body), MSR_ENTRY)]


def _get(call: Call, read: Callable[[int], int | None]) -> Reply:
    """How many were read before the first that could not be; all entries are copied back."""
    entries = _entries(call)
    if isinstance(entries, Reply):
        return entries
    count, body = 0, b""
    for number, reserved, data in entries:
        value = read(number) if count == len(body) // MSR_ENTRY else None
        count += value is not None
        body += struct.pack("<IIQ", number, reserved, data if value is None else value)
    return Reply(count) if call.user.copy_to(MSRS_HEADER, body) else failed("EFAULT")


def get_features(target: Target, call: Call) -> Reply:
    """KVM_GET_MSRS on the system device."""
    host = host_of(target)
    return _get(call, lambda number: read_feature(host, target.profile, number))


def get_msrs(vcpu: Vcpu, _: GuestMemory, call: Call) -> Reply:
    """KVM_GET_MSRS on a vCPU."""
    return _get(call, lambda number: read_msr(vcpu, number, host=True) if number in KNOWN_MSRS else None)


def set_msrs(vcpu: Vcpu, memory: GuestMemory, call: Call) -> Reply:
    """KVM_SET_MSRS: how many were written before the first that could not be."""
    entries = _entries(call)
    if isinstance(entries, Reply):
        return entries
    for written, (number, _, value) in enumerate(entries):
        if number not in KNOWN_MSRS or not set_msr(vcpu, memory, number, value):
            return Reply(written)
    return Reply(len(entries))


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType({CAP_GET_MSR_FEATURES: offered})

ROWS = (
    Ioctl("KVM_GET_MSR_INDEX_LIST", SYSTEM, lambda _, call: _list(call, SAVED_MSRS), changes=False),
    Ioctl(
        "KVM_GET_MSR_FEATURE_INDEX_LIST",
        SYSTEM,
        lambda target, call: _list(call, feature_msrs(host_of(target))),
        changes=False,
    ),
    Ioctl("KVM_GET_MSRS", SYSTEM, get_features, changes=False),
    reading("KVM_GET_MSRS", get_msrs),
    changing("KVM_SET_MSRS", set_msrs),
)
