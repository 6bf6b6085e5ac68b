"""What SET does: the bitmaps of pages, and what becomes of a page that is mapped already (kvm-spp 2.2, 2.3).

The layers, which are the truth, change first; then EPT and SPPT are brought in line. Protections and grants change maps
the same way.
"""

import numpy as np

from engine.arch import ept as bits
from engine.arch import sppt as sp
from engine.arch.sppt import REGION_PAGES
from engine.cpu.frames import ample
from engine.cpu.host_physical_memory import write_entry
from engine.cpu.memory_slots import find_slot
from engine.jit import kernel
from engine.kvm import (
    access_tracking,
    bitmaps,
    choice_bits,
    dirty_marking,
    kvmi_rights,
    mapping,
    page_tracking,
    regions,
    sppt_tables,
)
from engine.kvm.choice_bits import KVM_SET_ZAPS
from engine.kvm.write_protection import LOCKLESS_WRITABLE


@kernel
def refresh(m, gfn, trail):
    """Bring one page's entries in line with its map."""
    if find_slot(m, gfn) >= 0 or not regions.protected(m, gfn, 2):
        refresh_page(m, gfn, trail)


@kernel
def set_maps(m, gfn, access, start, trail):
    """SET: replace the maps of consecutive pages and end the grants on them.

    ``access`` uint32[n], or uint32[1] for one value for all; ``start`` is where to go on. Returns the number of pages
    done, less than asked for when frames ran out. The last word of the range is ``access`` of that page.
    """
    pages = access.shape[0]
    for i in range(start, pages):
        if not ample(m):
            return i
        set_map(m, gfn + i, np.int64(access[i]), trail)
    return pages


@kernel
def set_map(m, gfn, access, trail):
    """SET one page."""
    bitmaps.store_set(m, gfn, access)
    refresh(m, gfn, trail)


@kernel
def cover(m, gfns, masks, start, trail):
    """Store which sub-pages protections cover, page by page; a grant ends with the protection.

    ``gfns`` int64[n], ``masks`` int64[n]. Returns the number of pages done.
    """
    for i in range(start, gfns.shape[0]):
        if not ample(m):
            return i
        gfn = gfns[i]
        before = bitmaps.of_page(m, gfn)
        bitmaps.store(m, gfn, before, before[0], masks[i], before[2] & masks[i])
        refresh(m, gfn, trail)
    return gfns.shape[0]


@kernel
def refresh_page(m, gfn, trail):
    """Bring EPT and SPPT in line with a page's map after it changed; an unmapped page waits for its first touch.

    Later series drop the mapping, whatever its size, and the next access makes it anew. The first one arms and disarms
    in place; it does not see a page that a larger leaf maps. Without sub-page protection the page is tracked.
    """
    if page_tracking.active(m):
        mapping.track_page(m, gfn, trail)
        return
    if choice_bits.chooses(m, KVM_SET_ZAPS):
        mapping.invalidate_region(m, gfn)
        mapping.unmap_page(m, gfn, trail)
    else:
        rearm(m, gfn, trail)
    mapping.spare_region(m, gfn)


@kernel
def rearm(m, gfn, trail):
    """Arm or disarm the leaf of a page in place; an aged one is disarmed without the rights it has not."""
    found, level, table, index, entry = mapping.find_leaf(m, gfn, trail)
    if not found or level != 1 or entry & LOCKLESS_WRITABLE != LOCKLESS_WRITABLE:
        return
    if kvmi_rights.lacking(m, gfn) & bits.READ:
        return
    slot = find_slot(m, gfn)
    if slot >= 0 and dirty_marking.watched(m, slot):
        mapping.watch_page(m, gfn, slot, trail)
        return
    mask = bitmaps.effective(m, gfn)
    if mask != sp.FULL_ACCESS:
        sppt_tables.fill_vectors(m, gfn, mask)
        fresh = entry & ~bits.WRITE | bits.SPP
    else:
        fresh = entry & ~bits.SPP
        if not access_tracking.tracked(m, entry):
            fresh |= bits.WRITE | bits.DIRTY
    write_entry(m, table, index, fresh)
    mapping.forget(m, gfn, level)


@kernel
def any_mapped(m, gfn, pages, trail):
    """Whether any page of a range has a 4-KByte mapping."""
    for at in range(gfn, gfn + pages):
        found, level, _, _, _ = mapping.find_leaf(m, at, trail)
        if found and level == 1:
            return True
    return False


@kernel
def store_maps(m, gfn, access, start):
    """Replace the SET maps of consecutive pages and end the grants on them; mappings stay as they are.

    ``access`` uint32[n]; ``start`` is where to go on. Returns the number of pages done, less than all when frames ran
    out.
    """
    for i in range(start, access.shape[0]):
        if not ample(m):
            return i
        bitmaps.store_set(m, gfn + i, np.int64(access[i]))
    return access.shape[0]


@kernel
def invalidate_regions(m, gfn, pages):
    """Invalidate the SPPL2 entry of each 2-MByte region that a range touches."""
    at = gfn & ~(REGION_PAGES - 1)
    while at < gfn + pages:
        mapping.invalidate_region(m, at)
        at += REGION_PAGES
    return 0
