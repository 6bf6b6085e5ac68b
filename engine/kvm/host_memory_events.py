"""Host memory events: what the host does to the memory behind a guest, and what KVM makes of it (kvm-spp 5).

Maps stay whatever happens, and vectors do but for those that ``shrink`` frees: the next access faults, and what it
needs is made anew. A host page of 2 MBytes or 1 GByte that is to be moved or shared in part is split first.

Events are told by pages of address space 0. What happens to their memory happens to the pages of space 1 that are the
same memory; ``zap`` and ``shrink`` are about page numbers, in both spaces, ``write-protect`` about slots of space 0.
"""

import numpy as np

from engine.cpu import fastpath
from engine.cpu.frames import ample
from engine.cpu.memory_slots import SMM_PAGE, both, find_slot, twin
from engine.jit import kernel
from engine.kvm import ept_tables, host_frames, large_pages, mapping, regions, sppt_tables

# In the order of their numbers. The first three do nothing where nothing is mapped.
EVENTS = (
    "unmap",
    "write-protect",
    "age",
    "zap",
    "shrink",
    "split",
    "collapse",
    "migrate",
    "remap-read-only",
    "remap-writable",
)
(UNMAP, WRITE_PROTECT, AGE, ZAP, SHRINK, SPLIT, COLLAPSE, MIGRATE, READ_ONLY, WRITABLE) = range(len(EVENTS))

# Those that may be about all of guest memory.
WHOLE = ("zap", "shrink")

REGION = 512
NOTHING = np.int64(0)


@kernel
def change_page(m, event, gfn, trail):
    """One page's part in an event; returns whether a leaf changed."""
    if event == WRITE_PROTECT:
        return mapping.write_protect(m, gfn, trail)
    if event in (ZAP, SHRINK):
        mapping.unmap_page(m, gfn | SMM_PAGE, trail)
        return mapping.unmap_page(m, gfn, trail)
    changed = False
    if event >= MIGRATE:
        changed = make_small(m, gfn, trail)
        host_frames.renew(m, gfn, host_frames.READ_ONLY if event == READ_ONLY else NOTHING)
    slot, other = twin(m, gfn, m.slots.shape[0])
    while slot >= 0:
        change_leaf(m, event, other, trail)
        slot, other = twin(m, gfn, slot)
    return change_leaf(m, event, gfn, trail) or changed


@kernel
def change_leaf(m, event, gfn, trail):
    """What becomes of a page's leaf after something happened to its memory; returns whether it changed."""
    if event == AGE:
        return mapping.age(m, gfn, trail)
    if event == READ_ONLY:
        return mapping.make_read_only(m, gfn, trail)
    return mapping.unmap_page(m, gfn, trail)


@kernel
def make_small(m, gfn, trail):
    """Split the host page of a page if it is a larger one; returns whether a leaf went."""
    slot = find_slot(m, gfn)
    level = large_pages.level_of(m, gfn, slot)
    if level == 1:
        return False
    regions.mark(m, gfn, 2, regions.SPLIT)
    if level == 3:
        regions.mark(m, gfn, 3, regions.SPLIT)
    return mapping.unmap_page(m, gfn, trail)


@kernel
def make_large(m, gfn, trail):
    """Put a 2-MByte region that is in one slot in one host page; returns whether leaves went."""
    slot = find_slot(m, gfn)
    if large_pages.level_of(m, gfn, slot) > 1 or not large_pages.fits(m, gfn, slot, 2):
        return False
    regions.mark(m, gfn, 2, regions.COLLAPSED)
    first = gfn & ~(REGION - 1)
    changed = False
    for page in range(first, first + REGION):
        host_frames.forget(m, page)
        mapping.unmap_elsewhere(m, page, trail)
        changed = mapping.unmap_page(m, page, trail) or changed
    return changed


@kernel
def change_region(m, event, first, end, trail):
    """A 2-MByte region's part in an event, for its pages from ``first`` to ``end``; returns how many leaves changed."""
    alone = first >= SMM_PAGE or not both(m)
    if event <= AGE and alone and mapping.nothing_mapped(m, first, trail):
        return 0
    if event == SPLIT:
        return 1 if make_small(m, first, trail) else 0
    if event == COLLAPSE:
        return 1 if make_large(m, first, trail) else 0
    if event == SHRINK:
        first &= ~(REGION - 1)
        end = first + REGION
    changed = 0
    for page in range(first, end):
        changed += 1 if change_page(m, event, page, trail) else 0
    if event in (ZAP, SHRINK):
        ept_tables.release(m, first)
    if event == SHRINK:
        sppt_tables.free_region(m, first)
        mapping.flush(m)
    return changed


@kernel
def change_range(m, event, gfn, pages, start, changed, trail):
    """An event on a range of pages, from page ``start`` on; all of them have slots.

    Adds the leaves that changed to ``changed`` (int64[1]); returns how many pages are done, less than all when frames
    ran out.
    """
    at = gfn + start
    end = gfn + pages
    while at < end:
        if not ample(m):
            return at - gfn
        stop = min(end, (at | (REGION - 1)) + 1)
        changed[0] += change_region(m, event, at, stop, trail)
        at = stop
    return pages


@kernel
def change_everything(m, event):
    """Drop all of KVM's EPT, and for ``shrink`` its SPPTs; the roots stay."""
    ept_tables.free_all(m)
    if event == SHRINK:
        sppt_tables.free_all(m)
    fastpath.forget_all(m)
    mapping.flush(m)
