"""Pages in KVM's EPT: mapped, armed for sub-page protection, write-protected, aged, dropped (kvm-spp 3, 5).

Four states of a page matter beside "not mapped" (kvm-spp 3.1): writable; armed, with write permission off and bit 61
on; saved, where KVM itself forbids writes and keeps bit 61 aside (later series); and read-only for the host's sake.
Where the processor has no accessed flag, a page that was aged has no rights at all, and software bits keep them.
"""

import numpy as np

from engine.arch import ept as bits
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import ept, fastpath, radix, tlb
from engine.cpu.frames import STATE_FRAME, ample, read_word, write_word
from engine.cpu.host_physical_memory import read_entry, write_entry
from engine.cpu.memory_slots import home, twin, within
from engine.jit import kernel
from engine.kvm import (
    access_tracking,
    bitmaps,
    choice_bits,
    dirty_marking,
    ept_tables,
    host_frames,
    page_tracking,
    regions,
    sppt_tables,
    write_protection,
)
from engine.kvm import state_frame as reg
from engine.kvm.choice_bits import KVM_FILL_IN_SET, KVM_SAVED_BIT
from engine.kvm.ept_leaf import NOTHING, leaf_for
from engine.kvm.large_pages import level_for
from engine.kvm.write_protection import HOST_WRITEABLE, LOCKLESS_WRITABLE, MMU_WRITEABLE

NO_MODE = np.int64(0)

FLUSHES = reg.COUNTERS_AT + reg.TLB_FLUSHES

# What ``map_page`` did; MAP_SPLIT stands beside it where a larger page had to go.
MAP_FAILED = 0
MAP_WRITABLE = 1
MAP_ARMED = 2
MAP_SPLIT = 4


@kernel
def ept_pointer(m, gfn):
    """EPTP of KVM's tables for the address space of a page: write-back, without accessed and dirty flags."""
    levels = read_word(m, STATE_FRAME, reg.EPT_LEVELS)
    return ept_tables.root_address(m, gfn) | bits.WRITE_BACK | ((levels - 1) << bits.EPTP_WALK_SHIFT)


@kernel
def flush(m):
    """Make every vCPU forget what it remembers of KVM's tables (a remote flush)."""
    write_word(m, STATE_FRAME, FLUSHES, read_word(m, STATE_FRAME, FLUSHES) + 1)
    tlb.flush(m)


@kernel
def find_leaf(m, gfn, trail):
    """Walk KVM's EPT; returns (found, level, table, index, entry). A leaf without rights is found too."""
    outcome, level, _, _ = ept.walk(m, ept_pointer(m, gfn), NO_MODE, within(gfn << 12), trail)
    count = trail[ept.TRAIL_COUNTS, 0]
    if count == 0:
        return False, level, 0, 0, 0
    entry = trail[count - 1, 3]
    if outcome != ept.COMPLETE and not access_tracking.tracked(m, entry):
        return False, level, 0, 0, 0
    return True, level, trail[count - 1, 1], trail[count - 1, 2], entry


@kernel
def nothing_mapped(m, gfn, trail):
    """Whether KVM's EPT has neither a table nor a leaf for the 2-MByte region of a page."""
    _, level, _, _ = ept.walk(m, ept_pointer(m, gfn), NO_MODE, within(gfn << 12), trail)
    count = trail[ept.TRAIL_COUNTS, 0]
    return count == 0 or (level > 1 and trail[count - 1, 3] == 0)


@kernel
def map_page(m, gfn, slot, write, trail):
    """Map a page for an access, and arm it if its map is not full; returns what was done.

    A write to a host page that is shared read-only gets a copy of it first. A region with a larger leaf is armed
    nowhere, whatever the maps say: that is how the first series loses protection.
    """
    if write and host_frames.read_only(m, gfn):
        host_frames.renew(m, gfn, NOTHING)
        unmap_elsewhere(m, gfn, trail)
    host_frames.back(m, gfn)
    level = level_for(m, gfn, slot)
    table, split = ept_tables.table_for(m, gfn << 12, level)
    if table == 0:
        return MAP_FAILED
    mask = bitmaps.effective(m, gfn)
    entry = leaf_for(m, gfn, slot, mask, level)
    index = ept.index_of(gfn << 12, level)
    old = read_entry(m, table, index)
    if old or split:
        forget(m, gfn, 2 if split else level)
        ept_tables.free_below(m, old, level)
    write_entry(m, table, index, entry)
    done = MAP_WRITABLE
    if level == 1 and entry & (bits.SPP | write_protection.saved_bit(m)):
        done = MAP_ARMED
        mask = dirty_marking.permitted(m, gfn, slot)
        if choice_bits.chooses(m, KVM_FILL_IN_SET):
            sppt_tables.fill_vectors(m, gfn, mask)
        elif sppt_tables.stale_vector(m, gfn, mask):
            invalidate_region(m, gfn)
    return done | MAP_SPLIT if split else done


# ---- changes of what is mapped


@kernel
def forget(m, gfn, level):
    """After a change to a leaf that processors may remember: drop its pages from the fast path, and flush."""
    if level == 1:
        fastpath.forget(m, gfn)
    else:
        fastpath.forget_all(m)
    flush(m)


@kernel
def replace(m, gfn, level, table, index, before, after):
    """Store a leaf that may have changed; returns whether it has."""
    if before == after:
        return False
    write_entry(m, table, index, after)
    forget(m, gfn, level)
    return True


@kernel
def invalidate_region(m, gfn):
    """Make the next write to an armed page of a region miss, so that its vectors come from the maps as they are."""
    if sppt_tables.invalidate_region(m, gfn):
        flush(m)


@kernel
def unmap_page(m, gfn, trail):
    """Drop the leaf of a page, a larger one too; its map and its SPPL1E stay. Returns whether there was one."""
    found, level, table, index, entry = find_leaf(m, gfn, trail)
    return found and replace(m, gfn, level, table, index, entry, NOTHING)


@kernel
def unmap_elsewhere(m, gfn, trail):
    """Drop the leaves that map the memory of a page at other pages, in either address space."""
    page = home(m, gfn)
    if page != gfn:
        unmap_page(m, page, trail)
    slot, other = twin(m, page, m.slots.shape[0])
    while slot >= 0:
        if other != gfn:
            unmap_page(m, other, trail)
        slot, other = twin(m, page, slot)


@kernel
def spare_region(m, gfn):
    """Free the vectors of a region in which no page is armed for a policy, nor for the log of sub-pages."""
    if not regions.protected(m, gfn, 2) and not dirty_marking.mode(m) & dirty_marking.TRACK_SUBPAGES:
        sppt_tables.free_region(m, gfn)


@kernel
def watch_page(m, gfn, slot, trail):
    """Bring the leaf and the vectors of a page in line with what is left to note about it, in place.

    The processor's log is told by a dirty flag that begins at 0. What access tracking took stays taken.
    """
    found, level, table, index, entry = find_leaf(m, gfn, trail)
    if not found or level != 1 or entry & LOCKLESS_WRITABLE != LOCKLESS_WRITABLE:
        return
    fresh = leaf_for(m, gfn, slot, bitmaps.effective(m, gfn), level)
    if not dirty_marking.flag_waits(m, gfn, slot):
        fresh |= entry & bits.DIRTY
    if fresh & (bits.SPP | write_protection.saved_bit(m)):
        mask = dirty_marking.permitted(m, gfn, slot)
        if choice_bits.chooses(m, KVM_FILL_IN_SET) or sppt_tables.stale_vector(m, gfn, mask):
            sppt_tables.fill_vectors(m, gfn, mask)
    if access_tracking.tracked(m, entry) or not entry & bits.ACCESSED:
        fresh = access_tracking.aged(m, fresh)
    write_entry(m, table, index, fresh)
    forget(m, gfn, level)
    spare_region(m, gfn)


@kernel
def track_page(m, gfn, trail):
    """Bring the leaf of a page, of any size, in line with whether it is tracked.

    Write permission goes at once, and comes back by the fault of the next write (kvm_mmu_slot_gfn_write_protect).
    """
    fastpath.forget(m, gfn)
    found, level, table, index, entry = find_leaf(m, gfn, trail)
    if found and page_tracking.tracks(m, gfn):
        replace(m, gfn, level, table, index, entry, entry & ~(bits.WRITE | MMU_WRITEABLE))


@kernel
def end_tracking(m, start, end, trail):
    """Drop the leaves of protected pages: the next access makes them as sub-page protection wants them.

    Goes on from page ``start``; returns the page it has not reached, less than ``end`` when frames ran out.
    """
    at = start
    while True:
        at = radix.next_leaf(m, reg.ROOT_POLICY, at, end)
        if at >= end:
            return end
        stop = min(end, (at | radix.INDEX_MASK) + 1)
        while at < stop:
            if not ample(m):
                return at
            if bitmaps.effective(m, at) != FULL_ACCESS:
                unmap_page(m, at, trail)
            at += 1


@kernel
def drop_region(m, gfn):
    """Free the tables of a 2-MByte region that nothing needs, after its pages lost their leaves, and what it says."""
    ept_tables.release(m, gfn)
    regions.mark(m, gfn, 2, NOTHING)
    regions.mark(m, gfn, 3, NOTHING)
    if not regions.protected(m, gfn, 2):
        sppt_tables.free_region(m, gfn)


@kernel
def write_protect(m, gfn, trail):
    """Forbid writes to a page for KVM's own ends, as a dirty log does; returns whether its leaf changed.

    The next write faults and gives the permission back. In the first series an armed page stays as it is: writes that
    its map allows go on without a fault (kvm-spp 5).
    """
    found, level, table, index, entry = find_leaf(m, gfn, trail)
    if not found or (entry & bits.WRITE == 0 and not choice_bits.chooses(m, KVM_SAVED_BIT)):
        return False
    return replace(m, gfn, level, table, index, entry, write_protection.put_aside(m, entry))


@kernel
def age(m, gfn, trail):
    """Find out whether a page is still used: clear the accessed flag, or without one take all rights away.

    In the first series an armed page keeps bit 61, and any write to it is then taken for a violation.
    """
    found, level, table, index, entry = find_leaf(m, gfn, trail)
    if not found:
        return False
    return replace(m, gfn, level, table, index, entry, access_tracking.aged(m, entry))


@kernel
def make_read_only(m, gfn, trail):
    """The host page became one that may only be read: its leaf follows, unarmed, to the page's new host frame.

    Returns whether there was one.
    """
    found, level, table, index, entry = find_leaf(m, gfn, trail)
    if not found or level != 1:
        return False
    kept = access_tracking.with_rights(m, entry) & ~(
        bits.ADDRESS | bits.WRITE | bits.SPP | write_protection.saved_bit(m) | HOST_WRITEABLE
    )
    fresh = kept | host_frames.address_of_page(m, gfn)
    return replace(m, gfn, level, table, index, entry, access_tracking.aged(m, fresh))
