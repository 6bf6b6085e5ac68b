"""Accesses that no processor makes: those of KVM's instruction emulator, and those of the host (kvm-spp 3.5).

Neither walks EPT, so neither faults, maps or arms. An emulated write obeys slots and, in later series, sub-pages: one
to a refused sub-page ends as the processor's own would. In the first series it goes past them. A write of the host
(a device model, a PV clock) goes past everything in every series.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch import exits
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import access_over_pages, sppt
from engine.cpu.host_physical_memory import find_slot
from engine.jit import kernel
from engine.kvm import bitmaps, choice_bits, dirty_marking
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.choice_bits import KVM_EMULATOR_CHECKS
from engine.kvm.slots import SLOT_FLAGS, SLOT_READ_ONLY

NO_EXIT = np.int64(exits.NONE)

# What a sub-page violation by a plain write says: read and execute allowed, linear address valid, final translation.
SYNTHETIC = exits.Q_WRITE | 1 << exits.Q_RIGHTS_SHIFT | 4 << exits.Q_RIGHTS_SHIFT | exits.Q_LINEAR_VALID | exits.Q_FINAL


@kernel
def obeys(m, source):
    """Whether writes from a source obey sub-page permissions."""
    return source == acc.GUEST or (source == acc.EMULATED and choice_bits.chooses(m, KVM_EMULATOR_CHECKS))


@kernel
def refused(m, source, access, at, size):
    """How an access to one page ends if not well: (resolution or COMPLETED, sub-pages that refuse it)."""
    slot = find_slot(m, at >> 12)
    if slot < 0:
        return res.MMIO, 0
    if access != acc.WRITE or source == acc.HOST:
        return res.COMPLETED, 0
    if m.slots[slot, SLOT_FLAGS] & SLOT_READ_ONLY:
        return res.MMIO, 0
    denied = sppt.touched(at, size) & ~bitmaps.effective(m, at >> 12) & FULL_ACCESS
    if denied and obeys(m, source):
        return res.VIOLATION, denied
    return res.COMPLETED, 0


@kernel
def execute(m, source, gpa, size, access, tally):
    """Run one access, low page first; nothing lands unless every page allows it.

    Returns as ``run.execute`` does; a violation carries the exit reason and qualification that it is made to look like.
    """
    if source == acc.HOST:
        tally[reg.HOST_WRITES] += access == acc.WRITE
    else:
        tally[reg.EMULATED] += access == acc.WRITE
    done = 0
    while done < size:
        at = access_over_pages.place(m, gpa, done)
        part = access_over_pages.page_part(at, at + size - done)
        ending, denied = refused(m, source, access, at, part)
        if ending == res.VIOLATION:
            return ending, exits.EPT_VIOLATION, SYNTHETIC, denied, at
        if ending != res.COMPLETED:
            return ending, NO_EXIT, 0, 0, at
        done += part
    if access == acc.WRITE:
        dirty_marking.note_host_write(m, gpa, size)
    return res.COMPLETED, NO_EXIT, 0, 0, gpa
