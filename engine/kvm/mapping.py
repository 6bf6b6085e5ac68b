"""KVM's own EPT and SPPT: building paths, mapping pages, arming them for sub-page protection (kvm-spp 3, 4)."""

import numpy as np

from engine.arch import ept as bits
from engine.arch import sppt as sp
from engine.cpu import ept, fastpath, sppt, tlb
from engine.cpu.frames import (
    CAP_FILL_IN_SET,
    EPT,
    SPPT,
    STATE_FRAME,
    address_of,
    new_frame,
    read_entry,
    read_word,
    write_entry,
)
from engine.jit import kernel
from engine.kvm import layers
from engine.kvm.registers import EPT_LEVELS, ROOT_EPT, ROOT_SPPT
from engine.kvm.slots import SLOT_FLAGS, SLOT_READ_ONLY

# Software bits of KVM's leaf entries: the host page may be written; KVM has no reason of its own to forbid it.
HOST_WRITEABLE = 1 << 10
MMU_WRITEABLE = 1 << 11
LOCKLESS_WRITABLE = HOST_WRITEABLE | MMU_WRITEABLE

NOTHING = np.int64(0)
NO_MODE = np.int64(0)
TABLE = bits.READ | bits.WRITE | bits.EXECUTE | bits.ACCESSED
PAGE_BASE = bits.READ | bits.EXECUTE | bits.ACCESSED | bits.IGNORE_PAT | bits.WRITE_BACK << bits.MEMORY_TYPE_SHIFT


@kernel
def ept_pointer(m):
    """EPTP of KVM's tables: write-back, accessed and dirty flags where the processor has them."""
    root = address_of(m, read_word(m, STATE_FRAME, ROOT_EPT))
    levels = read_word(m, STATE_FRAME, EPT_LEVELS)
    return root | bits.WRITE_BACK | ((levels - 1) << bits.EPTP_WALK_SHIFT)


@kernel
def find_leaf(m, gfn, trail):
    """Walk KVM's EPT; returns (found, level, table, index, entry)."""
    outcome, level, _, _ = ept.walk(m, ept_pointer(m), NO_MODE, gfn << 12, trail)
    if outcome != ept.COMPLETE:
        return False, level, 0, 0, 0
    last = trail[ept.TRAIL_COUNTS, 0] - 1
    return True, level, trail[last, 1], trail[last, 2], trail[last, 3]


@kernel
def page_table(m, gpa):
    """Address of the EPT page table for a GPA, built where missing; 0 where a larger page is in the way."""
    level = read_word(m, STATE_FRAME, EPT_LEVELS)
    table = address_of(m, read_word(m, STATE_FRAME, ROOT_EPT))
    while level > 1:
        index = (gpa >> bits.LEVEL_SHIFT[level]) & 511
        entry = read_entry(m, table, index)
        if not entry & bits.RIGHTS:
            entry = address_of(m, new_frame(m, EPT)) | TABLE
            write_entry(m, table, index, entry)
        elif ept.is_leaf(entry, level):
            return 0
        table = entry & bits.ADDRESS
        level -= 1
    return table


@kernel
def vector_table(m, gpa):
    """Address of the SPPL1 table for a GPA, built where missing; an invalidated entry is made valid again."""
    table = address_of(m, read_word(m, STATE_FRAME, ROOT_SPPT))
    level = 4
    while level > 1:
        index = (gpa >> bits.LEVEL_SHIFT[level]) & 511
        entry = read_entry(m, table, index)
        if entry & bits.ADDRESS == 0:
            entry = address_of(m, new_frame(m, SPPT)) | sp.VALID
            write_entry(m, table, index, entry)
        elif not entry & sp.VALID:
            entry |= sp.VALID
            write_entry(m, table, index, entry)
        table = entry & bits.ADDRESS
        level -= 1
    return table


@kernel
def fill_vector(m, gfn, mask):
    """Write the SPPL1E of one page from its 32-bit map."""
    table = vector_table(m, gfn << 12)
    write_entry(m, table, gfn & 511, sppt.spread(mask))


@kernel
def invalidate_region(m, gfn):
    """Clear the valid bit of the SPPL2E above a page and keep its address, so that the next write misses.

    Processors may remember vectors of the whole region, so every vCPU's cache is flushed.
    """
    table = address_of(m, read_word(m, STATE_FRAME, ROOT_SPPT))
    level = 4
    while True:
        index = (gfn << 12 >> bits.LEVEL_SHIFT[level]) & 511
        entry = read_entry(m, table, index)
        if not entry & sp.VALID:
            return
        if level == 2:
            write_entry(m, table, index, entry & ~sp.VALID)
            tlb.flush(m)
            return
        table = entry & bits.ADDRESS
        level -= 1


@kernel
def stale_vector(m, gfn, mask):
    """Whether the SPPL1E that a walk would find for a page is not that of its map.

    A region is filled from the maps of its day; a slot that came, went or moved since then changed maps without it.
    """
    table = address_of(m, read_word(m, STATE_FRAME, ROOT_SPPT))
    level = 4
    while level > 1:
        entry = read_entry(m, table, (gfn << 12 >> bits.LEVEL_SHIFT[level]) & 511)
        if not entry & sp.VALID:
            return False
        table = entry & bits.ADDRESS
        level -= 1
    return read_entry(m, table, gfn & 511) != sppt.spread(mask)


@kernel
def leaf_for(m, gfn, frame_address, slot, mask):
    """The leaf entry KVM makes for a page with an effective map; a writable one is born dirty."""
    entry = frame_address | PAGE_BASE
    if m.slots[slot, SLOT_FLAGS] & SLOT_READ_ONLY:
        return entry
    entry |= LOCKLESS_WRITABLE
    if mask != sp.FULL_ACCESS:
        return entry | bits.SPP
    return entry | bits.WRITE | bits.DIRTY


@kernel
def map_page(m, gfn, slot):
    """Map a 4-KByte page; returns 0 failed, 1 mapped, 2 mapped and armed."""
    table = page_table(m, gfn << 12)
    if table == 0:
        return 0
    mask = layers.effective(m, gfn)
    entry = leaf_for(m, gfn, gfn << 12, slot, mask)
    if read_entry(m, table, gfn & 511) & bits.RIGHTS:
        tlb.flush(m)
    write_entry(m, table, gfn & 511, entry)
    if not entry & bits.SPP:
        return 1
    if m.caps[CAP_FILL_IN_SET]:
        fill_vector(m, gfn, mask)
    elif stale_vector(m, gfn, mask):
        invalidate_region(m, gfn)
    return 2


@kernel
def forget(m, gfn):
    """After a change to a page that processors may remember: drop it from the fast path, flush every vCPU's cache."""
    fastpath.forget(m, gfn)
    tlb.flush(m)


@kernel
def refresh_page(m, gfn, slot, trail):
    """Bring EPT and SPPT in line with a page's map after it changed; an unmapped page waits for its first touch."""
    if not m.caps[CAP_FILL_IN_SET]:
        invalidate_region(m, gfn)
    found, level, table, index, entry = find_leaf(m, gfn, trail)
    if not found or level != 1:
        return
    mask = layers.effective(m, gfn)
    kept = entry & (bits.ACCESSED | bits.DIRTY)
    fresh = (leaf_for(m, gfn, entry & bits.ADDRESS, slot, mask) & ~bits.DIRTY) | kept
    if fresh & bits.WRITE:
        fresh |= bits.DIRTY
    if fresh & bits.SPP and m.caps[CAP_FILL_IN_SET]:
        fill_vector(m, gfn, mask)
    write_entry(m, table, index, fresh)
    forget(m, gfn)


@kernel
def unmap_page(m, gfn, trail):
    """Drop the leaf of a page; its map and its SPPL1E stay."""
    found, level, table, index, _ = find_leaf(m, gfn, trail)
    if found and level == 1:
        write_entry(m, table, index, NOTHING)
        forget(m, gfn)
