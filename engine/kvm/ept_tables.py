"""KVM's own EPT: the path to a leaf, built where it is missing, and tables that return to the free list.

There is one for each address space (role.smm of a root): a page's number says which (``cpu.memory_slots``).

Every frame of the kind EPT is KVM's; the tables of clients are of another kind and are never freed here. What is freed
is no longer in any processor's caches: whoever calls this flushes.
"""

import numpy as np

from engine.arch import ept as bits
from engine.cpu import ept
from engine.cpu.frames import EPT, STATE_FRAME, WORDS, address_of, blank, free_frame, new_frame, read_word, write_word
from engine.cpu.host_physical_memory import frame_at, read_entry, write_entry
from engine.cpu.memory_slots import SMM_PAGE, within
from engine.jit import kernel
from engine.kvm.state_frame import EPT_LEVELS, ROOT_EPT, ROOT_EPT_SMM

NOTHING = np.int64(0)
TABLE = bits.READ | bits.WRITE | bits.EXECUTE | bits.ACCESSED


@kernel
def root_address(m, gfn):
    """Address of the root under which a page is mapped."""
    return address_of(m, read_word(m, STATE_FRAME, ROOT_EPT_SMM if gfn >= SMM_PAGE else ROOT_EPT))


@kernel
def is_root(m, frame):
    """Whether a frame is the root of either address space."""
    return frame == read_word(m, STATE_FRAME, ROOT_EPT) or frame == read_word(m, STATE_FRAME, ROOT_EPT_SMM)


@kernel
def names_table(entry, level):
    """Whether an entry of a level above 1 leads to a table."""
    return level > 1 and entry & bits.RIGHTS != 0 and not ept.is_leaf(entry, level)


@kernel
def table_for(m, gpa, wanted):
    """Address of the table of level ``wanted`` for a GPA, built where it is missing; returns (table, whether split).

    A larger page in the way makes room for a table (split). The address is 0 where the path leaves table memory, as
    only entries of a client can make it do.
    """
    level = read_word(m, STATE_FRAME, EPT_LEVELS)
    table = root_address(m, gpa >> 12)
    at = within(gpa)
    split = False
    while level > wanted:
        if frame_at(m, table) < 0:
            return 0, split
        index = ept.index_of(at, level)
        entry = read_entry(m, table, index)
        if not names_table(entry, level):
            split = split or entry != 0
            entry = address_of(m, new_frame(m, EPT)) | TABLE
            write_entry(m, table, index, entry)
        table = entry & bits.ADDRESS
        level -= 1
    return (table if frame_at(m, table) >= 0 else 0), split


@kernel
def place_of(m, gpa, level):
    """(table, index) of the entry of ``level`` for a GPA; (0, 0) where the path ends above it."""
    at = read_word(m, STATE_FRAME, EPT_LEVELS)
    table = root_address(m, gpa >> 12)
    while at > level:
        entry = read_entry(m, table, ept.index_of(within(gpa), at))
        if not names_table(entry, at) or frame_at(m, entry & bits.ADDRESS) < 0:
            return 0, 0
        table = entry & bits.ADDRESS
        at -= 1
    return table, ept.index_of(within(gpa), level)


@kernel
def free_table(m, table):
    """Free one table if it is KVM's and not a root."""
    frame = frame_at(m, table)
    if frame >= 0 and m.kind[frame] == EPT and not is_root(m, frame):
        free_frame(m, frame)


@kernel
def free_below(m, entry, level):
    """Free the tables that an entry of level 2 or 3 leads to."""
    if not names_table(entry, level):
        return
    table = entry & bits.ADDRESS
    if level == 3 and frame_at(m, table) >= 0:
        for index in range(WORDS):
            below = read_entry(m, table, index)
            if names_table(below, 2):
                free_table(m, below & bits.ADDRESS)
    free_table(m, table)


@kernel
def release(m, gfn):
    """Free the tables on the path to a page in which nothing is left."""
    top = read_word(m, STATE_FRAME, EPT_LEVELS)
    level = 2
    while level <= top:
        table, index = place_of(m, gfn << 12, level)
        if table:
            entry = read_entry(m, table, index)
            frame = frame_at(m, entry & bits.ADDRESS) if names_table(entry, level) else -1
            if frame >= 0 and m.kind[frame] == EPT:
                if not blank(m, frame):
                    return
                write_entry(m, table, index, NOTHING)
                free_table(m, entry & bits.ADDRESS)
        level += 1


@kernel
def free_all(m):
    """Free every table but the roots, which become empty."""
    for frame in range(m.row_of.shape[0]):
        if m.kind[frame] != EPT:
            continue
        if not is_root(m, frame):
            free_frame(m, frame)
            continue
        for index in range(WORDS):
            write_word(m, frame, index, NOTHING)
