"""KVM_GET_DIRTY_LOG (virt/kvm/kvm_main.c).

struct kvm_dirty_log is 16 bytes: u32 slot (address space in bits 31:16), u32 padding, u64 pointer to the bitmap, which
has one bit for each page in whole 64-bit words.
"""

from __future__ import annotations

import struct

from engine.abi import VM, Call, Reply, failed
from engine.ioctls.registry import Ioctl, Target
from engine.kvm.slots import ADDRESS_SPACES
from engine.state.profiles import kvm_version

LOG = struct.Struct("<IIQ")


def get_dirty_log(target: Target, call: Call) -> Reply:
    """Copy a slot's log out and empty it.

    EFAULT for what cannot be read, EINVAL for a number that cannot be, ENOENT for a slot that is not logged; EFAULT
    when the bitmap cannot be written, and the log is empty all the same.
    """
    raw = call.user.copy_from(0, LOG.size)
    if raw is None:
        return failed("EFAULT")
    slot, _, pointer = LOG.unpack(raw)
    number, space = slot & 0xFFFF, slot >> 16
    if number >= kvm_version(target.profile).limits.user_slots or space >= ADDRESS_SPACES:
        return failed("EINVAL")
    bitmap = target.vm.dirty.take_log(number, space)
    return Reply(0) if call.memory.buffer(pointer).copy_to(0, bitmap) else failed("EFAULT")


ROWS = (Ioctl("KVM_GET_DIRTY_LOG", VM, get_dirty_log),)
