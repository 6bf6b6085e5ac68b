"""KVM's own SPPTs: caches of the maps, for the processor to read (kvm-spp 1.1, 4).

There is one for the VM, or in 2019 one for each vCPU. What KVM does to a vector it does in every tree, but for a miss,
which fills the tree of the vCPU that missed. Tables return to the free list when no page of their region is protected.
"""

import numpy as np

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import sppt as sp
from engine.cpu import ept, sppt
from engine.cpu.frames import (
    CAP_SPPT_TREES,
    FIRST_VCPU_FRAME,
    SPPT,
    STATE_FRAME,
    WORDS,
    Machine,
    address_of,
    blank,
    free_frame,
    new_frame,
    read_word,
    write_word,
)
from engine.cpu.physical_memory import find_slot, frame_at, read_entry, write_entry
from engine.jit import kernel
from engine.kvm import tracking
from engine.kvm.registers import SPPT_TREES

NOTHING = np.int64(0)
ROOT_LEVEL = 4


@kernel
def trees(m):
    """How many SPPTs there are."""
    return read_word(m, STATE_FRAME, SPPT_TREES)


@kernel
def tree_of(m, vcpu):
    """The SPPT of a vCPU."""
    return vcpu if trees(m) > 1 else 0


@kernel
def root_frame(m, tree):
    """Frame of the root of a tree: it is in the record of its first vCPU."""
    return read_word(m, FIRST_VCPU_FRAME + tree, ctl.V_SPPT_ROOT)


@kernel
def make_roots(m):
    """Empty roots, one for each vCPU or one for the VM: whoever walks, walks a table from now on."""
    for tree in range(m.caps[CAP_SPPT_TREES]):
        write_word(m, FIRST_VCPU_FRAME + tree, ctl.V_SPPT_ROOT, new_frame(m, SPPT))
    write_word(m, STATE_FRAME, SPPT_TREES, m.caps[CAP_SPPT_TREES])


def load_roots(m: Machine, vcpus: int) -> None:
    """Load SPPTP into every vCPU, those that are still to come too; later series switch the control on only now."""
    for position in range(vcpus):
        frame = FIRST_VCPU_FRAME + position
        write_word(m, frame, ctl.V_SPPTP, address_of(m, root_frame(m, tree_of(m, position))))
        write_word(m, frame, ctl.V_SECONDARY, int(read_word(m, frame, ctl.V_SECONDARY)) | ctl.SECONDARY_SPP)


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
def fill_region(m, tree, gfn):
    """Fill the SPPL1 table of a 2-MByte region: every protected page that has a slot.

    The region becomes valid even when nothing in it is protected, or the guest would miss for ever.
    """
    vector_table(m, tree, gfn << 12)
    first = gfn & ~(sp.REGION_PAGES - 1)
    for page in range(first, first + sp.REGION_PAGES):
        slot = find_slot(m, page)
        mask = tracking.permitted(m, page, slot) if slot >= 0 else sp.FULL_ACCESS
        if mask != sp.FULL_ACCESS:
            fill_vector(m, tree, page, mask)


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
    """Free the SPPL1 table of the region of a page, and the tables above in which nothing is left."""
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


@kernel
def is_root(m, frame):
    """Whether a frame is the root of a tree."""
    tree = 0
    while tree < trees(m) and root_frame(m, tree) != frame:
        tree += 1
    return tree < trees(m)
