"""A host without EPT: KVM shadows the guest's tables, nothing is walked, and the memory slots alone decide."""

from __future__ import annotations

from engine.cpu.memory_slots import find_slot
from engine.jit import kernel
from engine.kvm.slots import PAGE_SHIFT, SLOT_FLAGS, SLOT_READ_ONLY


@kernel
def is_mmio(m, gpa, size, writes):
    """Whether KVM emulates an access because of its slots alone: a page without one, or a write to a read-only one."""
    for gfn in range(gpa >> PAGE_SHIFT, ((gpa + size - 1) >> PAGE_SHIFT) + 1):
        position = find_slot(m, gfn)
        if position < 0 or (writes and m.slots[position, SLOT_FLAGS] & SLOT_READ_ONLY):
            return True
    return False
