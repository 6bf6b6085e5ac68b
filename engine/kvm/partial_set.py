"""What a SET through the binary ABI leaves behind when it meets a page that has no slot (kvm-spp 2.3)."""

import numpy as np

from engine.arch.sppt import REGION_PAGES
from engine.cpu.frames import ample
from engine.jit import kernel
from engine.kvm import bitmaps, mapping


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
