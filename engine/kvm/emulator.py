"""Accesses that no processor makes: those of KVM's instruction emulator, and those of the host (kvm-spp 3.5).

Neither walks EPT, so neither faults, maps or arms. An emulated write obeys slots and, in later series, sub-pages: one
to a refused sub-page ends as the processor's own would. In the first series it goes past them. Page access holds for
whatever is emulated, in every series, and so do pages that are tracked without sub-page protection: KVMI asks from the
emulator's own reads, writes and fetches (kvm_page_track_preread, _prewrite, _preexec; kvm-spp 9.2). An access of the
host (a device model, a PV clock) goes past everything in every series.

An emulated access finds the slots of the address space that its vCPU is in, and what is tracked of them, but the maps
of sub-pages in space 0 (is_emulator_spp_protected); the host's are to space 0.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.arch import exits
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import access_over_pages, sppt
from engine.cpu.memory_slots import find_slot, within
from engine.jit import kernel
from engine.kvm import bitmaps, choice_bits, dirty_marking, kvmi_rights, page_tracking
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.choice_bits import KVM_EMULATOR_CHECKS
from engine.kvm.slots import SLOT_FLAGS, SLOT_READ_ONLY

NO_EXIT = np.int64(exits.NONE)

# What a violation says of a plain access, beside what it wanted and the rights of its page: linear address valid, final
# translation.
SYNTHETIC = exits.Q_LINEAR_VALID | exits.Q_FINAL


@kernel
def obeys(m, source):
    """Whether writes from a source obey what the maps say."""
    if source == acc.EMULATED:
        return choice_bits.chooses(m, KVM_EMULATOR_CHECKS) or page_tracking.active(m)
    return source == acc.GUEST


@kernel
def map_of(m, at):
    """The page whose map speaks for a place."""
    return at >> 12 if page_tracking.active(m) else within(at) >> 12


@kernel
def violation_of(m, at, access):
    """Exit qualification of the EPT violation by a plain access that the page of a place refuses."""
    rights = kvmi_rights.KEPT & ~kvmi_rights.lacking(m, at >> 12)
    if bitmaps.effective(m, map_of(m, at)) == FULL_ACCESS:
        rights |= bits.WRITE
    return 1 << access | rights << exits.Q_RIGHTS_SHIFT | SYNTHETIC


@kernel
def closed_to(m, source, at):
    """Sub-pages of the page of a place that writes from a source may not touch."""
    if not obeys(m, source):
        return kvmi_rights.closed(m, at >> 12)
    page = map_of(m, at)
    return ~bitmaps.effective(m, page) if find_slot(m, page) >= 0 else 0


@kernel
def refused(m, source, access, at, size):
    """How an access to one page, at a place, ends if not well: (resolution or COMPLETED, sub-pages that refuse it)."""
    gfn = at >> 12
    slot = find_slot(m, gfn)
    if slot < 0:
        return res.MMIO, 0
    if source == acc.HOST:
        return res.COMPLETED, 0
    if access != acc.WRITE:
        return res.VIOLATION if kvmi_rights.lacking(m, gfn) & 1 << access else res.COMPLETED, 0
    if m.slots[slot, SLOT_FLAGS] & SLOT_READ_ONLY:
        return res.MMIO, 0
    denied = sppt.touched(at, size) & closed_to(m, source, at) & FULL_ACCESS
    return res.VIOLATION if denied else res.COMPLETED, denied


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
            return ending, exits.EPT_VIOLATION, violation_of(m, at, access), denied, at
        if ending != res.COMPLETED:
            return ending, NO_EXIT, 0, 0, at
        done += part
    if access == acc.WRITE:
        dirty_marking.note_host_write(m, gpa, size)
    return res.COMPLETED, NO_EXIT, 0, 0, gpa
