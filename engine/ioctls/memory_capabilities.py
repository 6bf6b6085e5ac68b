"""Capabilities of memory slots and vCPUs, by number (include/uapi/linux/kvm.h)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.ioctls.registry import Target, offered
from engine.kvm.slots import ADDRESS_SPACES
from engine.state.profiles import kvm_version

CAP_USER_MEMORY = 3
CAP_NR_VCPUS = 9
CAP_NR_MEMSLOTS = 10
CAP_SYNC_MMU = 16
CAP_DESTROY_MEMORY_REGION_WORKS = 21
CAP_JOIN_MEMORY_REGIONS_WORKS = 30
CAP_ENABLE_CAP = 54
CAP_MAX_VCPUS = 66
CAP_READONLY_MEM = 81
CAP_ENABLE_CAP_VM = 98
CAP_CHECK_EXTENSION_VM = 105
CAP_X86_SMM = 117
CAP_MULTI_ADDRESS_SPACE = 118
CAP_MAX_VCPU_ID = 128


def _most_vcpus(target: Target) -> int:
    """Later kernels say what the VM has room for."""
    limits = kvm_version(target.profile).limits
    if target.machine is None or not limits.tells_room:
        return limits.vcpus
    return min(limits.vcpus, target.machine.config.vcpu_records)


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType(
    {
        CAP_USER_MEMORY: offered,
        CAP_NR_VCPUS: lambda target: kvm_version(target.profile).limits.soft_vcpus,
        CAP_NR_MEMSLOTS: lambda target: kvm_version(target.profile).limits.user_slots,
        CAP_SYNC_MMU: offered,
        CAP_DESTROY_MEMORY_REGION_WORKS: offered,
        CAP_JOIN_MEMORY_REGIONS_WORKS: offered,
        CAP_ENABLE_CAP: offered,
        CAP_MAX_VCPUS: _most_vcpus,
        CAP_READONLY_MEM: offered,
        CAP_ENABLE_CAP_VM: offered,
        CAP_CHECK_EXTENSION_VM: offered,
        CAP_X86_SMM: offered,
        CAP_MULTI_ADDRESS_SPACE: lambda _: ADDRESS_SPACES,
        CAP_MAX_VCPU_ID: lambda target: kvm_version(target.profile).limits.vcpu_ids,
    }
)
