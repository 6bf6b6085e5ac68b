"""A host without EPT: KVM shadows the guest's tables, nothing is walked, and the memory slots alone decide."""

from __future__ import annotations

from engine.cpu.access_over_pages import page_part, place
from engine.cpu.host_physical_memory import find_slot
from engine.jit import kernel
from engine.kvm.slots import PAGE_SHIFT, SLOT_FLAGS, SLOT_READ_ONLY


@kernel
def is_mmio(m, gpa, size, writes):
    """Whether KVM emulates an access because of its slots alone: a page without one, or a write to a read-only one."""
    done = 0
    while done < size:
        at = place(m, gpa, done)
        position = find_slot(m, at >> PAGE_SHIFT)
        if position < 0 or (writes and m.slots[position, SLOT_FLAGS] & SLOT_READ_ONLY):
            return True
        done += page_part(at, at + size - done)
    return False
