"""CPUID through the binary ABI: what is supported, what Hyper-V's leaves are, and what a vCPU has.

struct kvm_cpuid2 is u32 nent, u32 padding, then 40-byte entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from engine.abi import SYSTEM, Call, Reply, failed
from engine.arch.hyperv_cpuid import ENTRY_SIZE, HEADER_SIZE, CpuidEntry, pack_entry, unpack_entries
from engine.ioctls.registry import Ioctl, Target, offered
from engine.ioctls.vcpu_rows import changing, done, host_of, reading
from engine.kvm.memory_views import GuestMemory
from engine.nested.operations import set_cpuid
from engine.state.profiles import kvm_version
from engine.vcpu.cpuid import supported_cpuid
from engine.vcpu.hv_cpuid import supported_hv_cpuid, system_hv_cpuid
from engine.vcpu.runtime_cpuid import current_cpuid
from engine.vcpu.vcpu import Vcpu

CAP_EXT_CPUID = 7
CAP_HYPERV_CPUID = 167
CAP_SYS_HYPERV_CPUID = 191


def get_supported_cpuid(target: Target, call: Call) -> Reply:
    """KVM_GET_SUPPORTED_CPUID."""
    host = host_of(target)
    return _list(call, supported_cpuid(host.vendor, host.nested, host.maxphyaddr))


def get_system_hv_cpuid(target: Target, call: Call) -> Reply:
    """KVM_GET_SUPPORTED_HV_CPUID on the system device: EINVAL where there is no such ioctl."""
    entries = system_hv_cpuid(target.profile, host_of(target))
    return failed("EINVAL") if entries is None else _list(call, entries)


def get_hv_cpuid(vcpu: Vcpu, _: GuestMemory, call: Call) -> Reply:
    """KVM_GET_SUPPORTED_HV_CPUID on a vCPU."""
    return _list(call, supported_hv_cpuid(vcpu))


def set_cpuid2(vcpu: Vcpu, _: GuestMemory, call: Call) -> Reply:
    """KVM_SET_CPUID2: E2BIG for more entries than the kernel takes."""
    raw = call.user.copy_from(0, HEADER_SIZE)
    if raw is None:
        return failed("EFAULT")
    count = int.from_bytes(raw[:4], "little")
    if count > vcpu.kvm.vcpu.max_cpuid_entries:
        return failed("E2BIG")
    body = call.user.copy_from(HEADER_SIZE, count * ENTRY_SIZE)
    return failed("EFAULT") if body is None else done(set_cpuid(vcpu, unpack_entries(body)))


def get_cpuid2(vcpu: Vcpu, _: GuestMemory, call: Call) -> Reply:
    """KVM_GET_CPUID2: what was set, by the state of now; only today's kernel stores the count."""
    return _list(call, current_cpuid(vcpu), stores_count=vcpu.kvm.vcpu.reports_cpuid_count)


def _list(call: Call, entries: Sequence[CpuidEntry], *, stores_count: bool = True) -> Reply:
    """Header in, too small a table is E2BIG and leaves everything as it was, entries out, header out."""
    raw = call.user.copy_from(0, HEADER_SIZE)
    if raw is None:
        return failed("EFAULT")
    if int.from_bytes(raw[:4], "little") < len(entries):
        return failed("E2BIG")
    header = len(entries).to_bytes(4, "little") + raw[4:] if stores_count else raw
    stored = call.user.copy_to(HEADER_SIZE, b"".join(pack_entry(entry) for entry in entries))
    return Reply(0) if stored and call.user.copy_to(0, header) else failed("EFAULT")


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType(
    {
        CAP_EXT_CPUID: offered,
        CAP_HYPERV_CPUID: offered,
        CAP_SYS_HYPERV_CPUID: lambda target: int(kvm_version(target.profile).hyperv.leaves_without_vcpu),
    }
)

ROWS = (
    Ioctl("KVM_GET_SUPPORTED_CPUID", SYSTEM, get_supported_cpuid, changes=False),
    Ioctl("KVM_GET_SUPPORTED_HV_CPUID", SYSTEM, get_system_hv_cpuid, changes=False),
    reading("KVM_GET_SUPPORTED_HV_CPUID", get_hv_cpuid),
    changing("KVM_SET_CPUID2", set_cpuid2),
    reading("KVM_GET_CPUID2", get_cpuid2),
)
