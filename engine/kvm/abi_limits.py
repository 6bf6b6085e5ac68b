"""What the binary ABI of each era allows beside sub-pages: how many slots and vCPUs.

include/asm/kvm_host.h of Linux 5.3 and of 6.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

ADDRESS_SPACES = 2  # 0, and 1 for system-management mode
MAX_SLOT_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
USER_TOP = (1 << 47) - 0x1000  # TASK_SIZE_MAX with four levels of paging


@dataclass(frozen=True)
class AbiLimits:
    """``user_slots`` slots of an address space, ``vcpus`` of a machine, ``vcpu_ids`` ids to choose from."""

    user_slots: int
    soft_vcpus: int
    vcpus: int
    vcpu_ids: int


LIMITS: Mapping[str, AbiLimits] = MappingProxyType(
    {
        "kvm-2019": AbiLimits(user_slots=509, soft_vcpus=240, vcpus=288, vcpu_ids=1023),
        "kvm-latest": AbiLimits(user_slots=32764, soft_vcpus=1024, vcpus=1024, vcpu_ids=4096),
    }
)
