"""A host without EPT: KVM shadows the guest's tables, nothing is walked, and the memory slots alone decide.

What the shadow tables cannot map exits as a page fault (basic exit reason 0). They keep what page tracking and page
access take from whole pages, as EPT does elsewhere; sub-page protection there is none.
"""

from __future__ import annotations

import numpy as np

from engine.arch import access as acc
from engine.arch import exits
from engine.cpu.access_over_pages import page_part, place
from engine.cpu.memory_slots import find_slot, within
from engine.jit import kernel
from engine.kvm import dirty_marking, emulator
from engine.kvm import resolutions as res
from engine.kvm.slots import PAGE_SHIFT, SLOT_FLAGS, SLOT_READ_ONLY

NO_REASON = np.int64(exits.NONE)


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


@kernel
def decide(m, gpa, size, access):
    """How an access ends, low page first: (resolution or COMPLETED, sub-pages that refuse it, GPA of that)."""
    done = 0
    while done < size:
        at = place(m, gpa, done)
        part = page_part(at, at + size - done)
        ending, denied = emulator.refused(m, np.int64(acc.GUEST), access, at, part)
        if ending != res.COMPLETED:
            return ending, denied, at
        done += part
    return res.COMPLETED, 0, gpa


@kernel
def execute(m, gpa, size, access):
    """Run one access; returns as ``vcpu_run.execute`` does, with basic exit reason 0."""
    ending, denied, at = decide(m, gpa, size, access)
    if ending == res.COMPLETED and access == acc.WRITE:
        dirty_marking.note_host_write(m, gpa, size)
    return ending, NO_REASON, NO_REASON, denied, within(at)
