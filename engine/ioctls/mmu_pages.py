"""KVM_SET_NR_MMU_PAGES, and in 2019 KVM_GET_NR_MMU_PAGES: how many pages the shadow MMU may keep.

The number is kept; tables are not dropped for it, ``max_table_frames`` is what bounds them. Source: Linux 5.3,
kvm_mmu_calculate_default_mmu_pages and kvm_mmu_change_mmu_pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.abi import VM, Call, Reply, failed
from engine.ioctls.registry import Ioctl, Target, offered
from engine.state.profiles import ONLY_2019

CAP_MMU_SHADOW_CACHE_CONTROL = 2
FEWEST = 64
_PER_MILLE = 20


def set_nr_mmu_pages(target: Target, call: Call) -> Reply:
    """The argument is the number: EINVAL for less than 64."""
    if call.arg < FEWEST:
        return failed("EINVAL")
    target.vm.memory_slots.want_mmu_pages(call.arg)
    return Reply(0)


def get_nr_mmu_pages(target: Target, _: Call) -> Reply:
    """The number that was set, or a fiftieth of the pages in slots; ioctl(2) returns 32 bits of it."""
    slots = target.vm.memory_slots
    pages = sum(slot.pages for slot in slots.all())
    usual = max(FEWEST, pages * _PER_MILLE // 1000) if pages else 0
    wanted = (slots.wanted_mmu_pages or usual) & 0xFFFF_FFFF
    return Reply(wanted - (1 << 32) if wanted >> 31 else wanted)


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType({CAP_MMU_SHADOW_CACHE_CONTROL: offered})

ROWS = (
    Ioctl("KVM_SET_NR_MMU_PAGES", VM, set_nr_mmu_pages),
    Ioctl("KVM_GET_NR_MMU_PAGES", VM, get_nr_mmu_pages, changes=False, profiles=ONLY_2019),
)
