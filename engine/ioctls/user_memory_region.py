"""KVM_SET_USER_MEMORY_REGION and its second form (virt/kvm/kvm_main.c, the order of tests included).

struct kvm_userspace_memory_region is 32 bytes: u32 slot (address space in bits 31:16), u32 flags, u64
guest_phys_addr, u64 memory_size, u64 userspace_addr. KVM_SET_USER_MEMORY_REGION2 of today begins alike and has 160.
"""

from __future__ import annotations

import struct

from engine.abi import VM, Call, Reply, failed
from engine.ioctls.registry import Ioctl, Target
from engine.kvm.slots import (
    ADDRESS_SPACES,
    MAX_SLOT_PAGES,
    PAGE_SHIFT,
    PAGE_SIZE,
    SLOT_LOG_DIRTY,
    SLOT_READ_ONLY,
    USER_TOP,
    SlotSpec,
)
from engine.state.profiles import ONLY_LATEST, kvm_version

REGION = struct.Struct("<IIQQQ")
REGION2_SIZE = 160
FLAGS = SLOT_LOG_DIRTY | SLOT_READ_ONLY


def set_user_memory_region(target: Target, call: Call) -> Reply:
    """struct kvm_userspace_memory_region."""
    return _set(target, call.user.copy_from(0, REGION.size))


def set_user_memory_region2(target: Target, call: Call) -> Reply:
    """The same with room for a guest_memfd, of which there is none: KVM_MEM_GUEST_MEMFD is EINVAL, the rest ignored."""
    return _set(target, call.user.copy_from(0, REGION2_SIZE))


def _set(target: Target, raw: bytes | None) -> Reply:
    """Size 0 deletes; a known slot may move or change its logging, and keeps its size, host address and read-only flag.

    EFAULT for what cannot be read, EEXIST for an overlap within the address space, EINVAL for everything else.
    """
    if raw is None:
        return failed("EFAULT")
    slot, flags, gpa, size, address = REGION.unpack_from(raw)
    number, space = slot & 0xFFFF, slot >> 16
    if number >= kvm_version(target.profile).limits.user_slots or space >= ADDRESS_SPACES or flags & ~FLAGS:
        return failed("EINVAL")
    if (size | gpa | address) % PAGE_SIZE or address + size > USER_TOP or gpa + size >= 1 << 64:
        return failed("EINVAL")
    if size >> PAGE_SHIFT > MAX_SLOT_PAGES:
        return failed("EINVAL")
    slots = target.vm.memory_slots
    known = slots.find(number, space)
    if not size:
        if known is None:
            return failed("EINVAL")
        slots.delete(number, space)
        return Reply(0)
    slots.set(
        SlotSpec(
            slot=number,
            gpa=gpa,
            size=size,
            read_only=bool(flags & SLOT_READ_ONLY),
            host_page_size=known.host_page_size if known is not None else PAGE_SIZE,
            address_space=space,
            log_dirty=bool(flags & SLOT_LOG_DIRTY),
            userspace_addr=address,
            backing=known.backing if known is not None else None,
        )
    )
    return Reply(0)


ROWS = (
    Ioctl("KVM_SET_USER_MEMORY_REGION", VM, set_user_memory_region),
    Ioctl("KVM_SET_USER_MEMORY_REGION2", VM, set_user_memory_region2, profiles=ONLY_LATEST),
)
