"""SPP operations on the bitmaps: SET, protections and grants over the same sub-pages (kvm-spp 2.2, 2.3).

Each changes the layers first, which are the truth, and then brings EPT and SPPT in line where the page is mapped.
"""

import numpy as np

from engine.arch.sppt import FULL_ACCESS
from engine.cpu.frames import (
    STATE_FRAME,
    ample,
    read_word,
    write_word,
)
from engine.cpu.physical_memory import find_slot
from engine.jit import kernel
from engine.kvm import layers, mapping, regions, sppt_tables
from engine.kvm import registers as reg

# Layers of a page's map
LAYER_NAMES = ("effective", "set", "protected", "granted")


@kernel
def enable(m):
    """KVM_INIT_SPP: every page starts with full access. Returns whether it was off before."""
    if read_word(m, STATE_FRAME, reg.SPP_ACTIVE):
        return False
    sppt_tables.make_roots(m)
    write_word(m, STATE_FRAME, reg.SPP_ACTIVE, 1)
    return True


@kernel
def read_maps(m, gfn, layer, out):
    """Fill ``out`` (uint32) with one layer of the maps of consecutive pages.

    ``effective`` and ``set``: bit 1 = may be written; ``protected`` and ``granted``: bit 1 = covered, lifted.
    """
    for i in range(out.shape[0]):
        if layer == 0:
            out[i] = layers.effective(m, gfn + i)
        elif layer == 1:
            out[i] = ~layers.denied_by_set(m, gfn + i) & FULL_ACCESS
        elif layer == 2:
            out[i] = layers.protected(m, gfn + i)
        else:
            out[i] = layers.granted(m, gfn + i)


@kernel
def refresh(m, gfn, trail):
    """Bring one page's entries in line with its map."""
    if find_slot(m, gfn) >= 0 or not regions.protected(m, gfn, 2):
        mapping.refresh_page(m, gfn, trail)


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
    layers.store_set(m, gfn, access)
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
        before = layers.of_page(m, gfn)
        layers.store(m, gfn, before, before[0], masks[i], before[2] & masks[i])
        refresh(m, gfn, trail)
    return gfns.shape[0]
