"""Dirty tracking: what is tracked, what was written, and what is still to be seen (kvm-spp 5; KVM_GET_DIRTY_LOG).

Two logs stand side by side, with a reader each that takes nothing from the other.

KVM's log      one bit a page of a slot with KVM_MEM_LOG_DIRTY_PAGES, read and cleared by KVM_GET_DIRTY_LOG. It is the
               log of the profile, with what that misses and what it says too much.
written map    32 bits a page: which sub-pages were written since the last harvest. It is exact. A machine that tracks
               whole pages stores all ones for a page that was written.

A write must be seen as long as one of them has something left to note about it. ``unseen`` says for which sub-pages
that is so; what the hardware may write by itself is what the policy allows and nothing is left to note about.
"""

import numpy as np

from engine.arch.sppt import FULL_ACCESS
from engine.cpu import radix, sppt
from engine.cpu.access_over_pages import page_part, place
from engine.cpu.frames import CAP_KVM, STATE_FRAME, read_word
from engine.cpu.memory_slots import SMM_PAGE, find_slot, home
from engine.jit import kernel
from engine.kvm import bitmaps, page_tracking
from engine.kvm import state_frame as reg
from engine.kvm.choice_bits import KVM_SAVED_BIT
from engine.kvm.slots import SLOT_FLAGS, SLOT_LOG_DIRTY

# Bits of register DIRTY_MODE: what the written map is kept of, how whole pages are watched, whether a slot has a log.
TRACK_PAGES = 1
TRACK_SUBPAGES = 2
BY_PML = 4
SLOT_LOGS = 8
TRACKED = TRACK_PAGES | TRACK_SUBPAGES

# A word of the written map: bits 31:0 written since the last harvest, bits 63:32 harvested and not acknowledged.
HARVESTED_SHIFT = 32

# KVM's log is a bitmap: 64 pages a word.
LOG_SHIFT = 6
LOG_MASK = 63

NOTHING = np.int64(0)
ONE = np.int64(1)
EVERYTHING = np.int64(FULL_ACCESS)


@kernel
def mode(m):
    """What is tracked: 0 where nothing is, and nothing below costs anything."""
    return read_word(m, STATE_FRAME, reg.DIRTY_MODE)


@kernel
def mode_for(m, gfn):
    """The same for one page: the written map waits for no fault of a page of address space 1.

    Its writes are noted as they land (``kvm.vcpu_run``), at the page of space 0 that is the same memory.
    """
    state = mode(m)
    return state & ~TRACKED if gfn >= SMM_PAGE else state


@kernel
def written(m, gfn):
    """Sub-pages of a page written since the last harvest."""
    return radix.read(m, reg.ROOT_WRITTEN, gfn) & FULL_ACCESS


@kernel
def harvested(m, gfn):
    """Sub-pages of a page that the outstanding harvest holds."""
    return (radix.read(m, reg.ROOT_WRITTEN, gfn) >> HARVESTED_SHIFT) & FULL_ACCESS


@kernel
def store_written(m, gfn, mask):
    """Replace what was written since the last harvest."""
    word = radix.read(m, reg.ROOT_WRITTEN, gfn)
    radix.write(m, reg.ROOT_WRITTEN, gfn, (word & ~FULL_ACCESS) | (mask & FULL_ACCESS))


@kernel
def logged(m, gfn):
    """Bit of a page in KVM's log."""
    return (radix.read(m, reg.ROOT_LOG, gfn >> LOG_SHIFT) >> (gfn & LOG_MASK)) & 1


@kernel
def store_logged(m, gfn, bit):
    """Set or clear the bit of a page in KVM's log."""
    word = radix.read(m, reg.ROOT_LOG, gfn >> LOG_SHIFT)
    place = ONE << (gfn & LOG_MASK)
    radix.write(m, reg.ROOT_LOG, gfn >> LOG_SHIFT, word | place if bit else word & ~place)


@kernel
def has_log(m, slot):
    """Whether a slot has KVM's log."""
    return m.slots[slot, SLOT_FLAGS] & SLOT_LOG_DIRTY != 0


@kernel
def watched(m, slot):
    """Whether anything is noted about the writes to a slot: its pages are mapped at 4 KBytes then."""
    state = mode(m)
    return state != 0 and (state & TRACKED != 0 or has_log(m, slot))


@kernel
def log_waits(m, gfn, slot):
    """Whether KVM's log has yet to note a page."""
    return mode(m) & SLOT_LOGS != 0 and has_log(m, slot) and not logged(m, gfn)


@kernel
def unseen(m, gfn, slot, mask):
    """Sub-pages whose next write must be seen by a fault; ``mask`` is the effective map of the page.

    A page that a policy protects in part is watched for KVM's log in other ways: not at all in the first series, whose
    write protection leaves an armed leaf as it is, and by the saved bit later (``saved``).
    """
    state = mode_for(m, gfn)
    if state == 0:
        return 0
    left = 0
    if state & TRACK_SUBPAGES or (state & TRACK_PAGES and not state & BY_PML):
        left = ~written(m, gfn) & FULL_ACCESS
    if mask == FULL_ACCESS and not state & BY_PML and log_waits(m, gfn, slot):
        left = FULL_ACCESS
    return left


@kernel
def permitted(m, gfn, slot):
    """Sub-pages that the hardware may write by itself: allowed, and nothing is left to note about them."""
    mask = bitmaps.effective(m, gfn)
    return mask & ~unseen(m, gfn, slot, mask)


@kernel
def saved(m, gfn, slot, mask):
    """Whether an armed leaf keeps bit 61 in its saved bit, so that the next write tells KVM's log (v11)."""
    if mask == FULL_ACCESS or not m.caps[CAP_KVM] & KVM_SAVED_BIT or mode(m) & BY_PML:
        return False
    return log_waits(m, gfn, slot)


@kernel
def flag_waits(m, gfn, slot):
    """Whether the dirty flag of a leaf must be 0, for the processor to log the next write to the page."""
    state = mode_for(m, gfn)
    if not state & BY_PML:
        return False
    if state & TRACK_PAGES and written(m, gfn) == 0:
        return True
    return log_waits(m, gfn, slot)


@kernel
def note_log(m, gfn, slot):
    """A page was written, as KVM's log has it."""
    if log_waits(m, gfn, slot):
        store_logged(m, gfn, ONE)


@kernel
def note_written(m, gfn, mask):
    """Sub-pages were written, as the written map has it: that of memory which address space 0 has."""
    page = home(m, gfn)
    state = mode_for(m, page)
    if state & TRACK_SUBPAGES:
        store_written(m, page, written(m, page) | mask)
    elif state & TRACK_PAGES:
        store_written(m, page, EVERYTHING)


@kernel
def note_fault(m, gfn, slot, mask):
    """A write faults on a page that is not mapped, or that KVM itself forbids to write: it gets permission now.

    What is written is not known, and for a page that is protected in part not even whether anything will be. KVM's
    later log notes such a page all the same; the first series never faults for it. A page that is protected whole,
    without sub-page protection, gets no permission.
    """
    state = mode_for(m, gfn)
    if state == 0 or state & BY_PML:
        return
    if mask == FULL_ACCESS:
        note_log(m, gfn, slot)
        if state & TRACK_PAGES:
            store_written(m, gfn, EVERYTHING)
    elif m.caps[CAP_KVM] & KVM_SAVED_BIT and not page_tracking.active(m):
        note_log(m, gfn, slot)


@kernel
def note_refused(m, gfn, slot, mask, denied):
    """A write was refused by an armed page, of whose map ``denied`` names the sub-pages that were closed.

    Returns whether the logs alone had closed them: they are noted then, and may be opened. A write that sub-page
    permissions do not serve (``denied`` is 0) opens the whole page, where no policy protects a part of it.
    """
    state = mode(m)
    if state == 0 or denied & ~mask or not watched(m, slot):
        return False
    if denied == 0 and mask != FULL_ACCESS:
        return False
    note_written(m, gfn, denied or EVERYTHING)
    if mask == FULL_ACCESS and not state & BY_PML:
        note_log(m, gfn, slot)
    return True


@kernel
def note_page(m, gfn, slot):
    """The processor logged a page: that much is known, not which of its sub-pages."""
    note_log(m, gfn, slot)
    if mode_for(m, gfn) & TRACK_PAGES:
        store_written(m, gfn, EVERYTHING)


@kernel
def note_host_write(m, gpa, size):
    """Bytes were stored by the host, or by the hypervisor for the guest: nothing stopped them, and all logs know."""
    if mode(m) == 0:
        return
    done = 0
    while done < size:
        at = place(m, gpa, done)
        part = page_part(at, at + size - done)
        slot = find_slot(m, at >> 12)
        if slot >= 0:
            note_log(m, at >> 12, slot)
            note_written(m, at >> 12, sppt.touched(at, part))
        done += part


@kernel
def forget_page(m, gfn):
    """Forget what was noted of a page that is gone; an outstanding harvest is what it was."""
    if mode(m) != 0:
        store_written(m, gfn, NOTHING)
        store_logged(m, gfn, NOTHING)


@kernel
def anything_noted(m, gfn):
    """Whether something may have been noted in the 2-MByte region of a page."""
    return radix.leaf_of(m, reg.ROOT_WRITTEN, gfn) != 0 or radix.leaf_of(m, reg.ROOT_LOG, gfn >> LOG_SHIFT) != 0
