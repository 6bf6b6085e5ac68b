"""KVM's own SPPTs: caches of the maps, for the processor to read (kvm-spp 1.1, 4).

There is one for the VM, or in 2019 one for each vCPU. What KVM does to a vector it does in every tree, but for a miss,
which fills the tree of the vCPU that missed. Tables return to the free list when no page of their region is protected.
"""

import numpy as np

from engine.arch import ept as bits
from engine.arch import sppt as sp
from engine.cpu import ept, sppt
from engine.cpu.frames import (
    SPPT,
    WORDS,
    address_of,
    blank,
    free_frame,
    new_frame,
    write_word,
)
from engine.cpu.host_physical_memory import frame_at, read_entry, write_entry
from engine.cpu.memory_slots import SMM_PAGE
from engine.jit import kernel
from engine.kvm.sppt_roots import is_root, root_frame, trees

NOTHING = np.int64(0)
ROOT_LEVEL = 4


@kernel
def vector_table(m, tree, gpa):
    """Address of the SPPL1 table for a GPA, built where missing; an invalidated entry is made valid again."""
    table = address_of(m, root_frame(m, tree))
    level = ROOT_LEVEL
    while level > 1:
        index = ept.index_of(gpa, level)
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
def fill_vector(m, tree, gfn, mask):
    """Write the SPPL1E of one page from its 32-bit map in one tree."""
    table = vector_table(m, tree, gfn << 12)
    write_entry(m, table, gfn & 511, sppt.spread(mask))


@kernel
def fill_vectors(m, gfn, mask):
    """Write the SPPL1E of one page in every tree."""
    for tree in range(trees(m)):
        fill_vector(m, tree, gfn, mask)


@kernel
def entry_above(m, tree, gfn, level):
    """(table, index) of the valid-or-not entry of ``level`` for a page; (0, 0) where the path ends above it."""
    table = address_of(m, root_frame(m, tree))
    at = ROOT_LEVEL
    while at > level:
        entry = read_entry(m, table, ept.index_of(gfn << 12, at))
        if entry & bits.ADDRESS == 0 or frame_at(m, entry & bits.ADDRESS) < 0:
            return 0, 0
        table = entry & bits.ADDRESS
        at -= 1
    return table, ept.index_of(gfn << 12, level)


@kernel
def invalidate_region(m, gfn):
    """Clear the valid bit of the SPPL2E above a page and keep its address, so that the next write misses.

    Returns whether anything was cleared: processors may remember vectors of the whole region and are to be flushed.
    """
    cleared = False
    for tree in range(trees(m)):
        table, index = entry_above(m, tree, gfn, 2)
        if table:
            entry = read_entry(m, table, index)
            if entry & sp.VALID:
                write_entry(m, table, index, entry & ~sp.VALID)
                cleared = True
    return cleared


@kernel
def stale_vector(m, gfn, mask):
    """Whether the SPPL1E that a walk would find for a page is not that of its map.

    A region is filled from the maps of its day; a slot that came, went or moved since then changed maps without it.
    """
    for tree in range(trees(m)):
        table, index = entry_above(m, tree, gfn, 2)
        if not table:
            continue
        entry = read_entry(m, table, index)
        if entry & sp.VALID and read_entry(m, entry & bits.ADDRESS, gfn & 511) != sppt.spread(mask):
            return True
    return False


@kernel
def free_region(m, gfn):
    """Free the SPPL1 table of the region of a page, and the tables above in which nothing is left.

    Not for pages of address space 1: SPPTs are by GPA alone, and what they say is about space 0.
    """
    if gfn >= SMM_PAGE:
        return
    for tree in range(trees(m)):
        level = 2
        while level <= ROOT_LEVEL:
            table, index = entry_above(m, tree, gfn, level)
            if not table:
                level += 1
                continue
            frame = frame_at(m, read_entry(m, table, index) & bits.ADDRESS)
            if frame >= 0 and m.kind[frame] == SPPT and frame != root_frame(m, tree):
                if level > 2 and not blank(m, frame):
                    break
                free_frame(m, frame)
                write_entry(m, table, index, NOTHING)
            level += 1


@kernel
def free_all(m):
    """Free every table but the roots, which become empty."""
    for tree in range(trees(m)):
        for index in range(WORDS):
            write_word(m, root_frame(m, tree), index, NOTHING)
    for frame in range(m.row_of.shape[0]):
        if m.kind[frame] == SPPT and not is_root(m, frame):
            free_frame(m, frame)
