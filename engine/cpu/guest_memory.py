"""Guest RAM contents as the processor sees them: sparse, addressed by GPA; until it is written a page is zero, or that
of the file behind its slot (``cpu.memory_files``).

A tree by page (see ``cpu.memory_slots``) names the frame that holds its bytes. Where a raw EPT leaf points elsewhere
changes the host address that a walk reports, not the bytes.
"""

import numpy as np

from engine.cpu import memory_files, radix
from engine.cpu.frames import MEMORY, new_frame, own
from engine.cpu.memory_slots import home
from engine.jit import kernel

# The word of the state frame that holds the tree's root; the hypervisor's words are in ``kvm.state_frame``.
ROOT_MEMORY = np.int64(4)

OFFSET = 0xFFF


@kernel
def locate(m, gfn):
    """Where the bytes of a page are, (row, file, offset): in a row; else, with row -1, in a file; else, with NO_FILE,
    nowhere: they are zero."""
    page = home(m, gfn)
    frame = radix.read(m, ROOT_MEMORY, page)
    if frame != 0:
        return m.row_of[frame], memory_files.NO_FILE, np.int64(0)
    file, offset = memory_files.source(m, page)
    return np.int64(-1), file, offset


@kernel
def own_content_row(m, gfn):
    """Row that this change may write the bytes of a page in."""
    page = home(m, gfn)
    frame = radix.read(m, ROOT_MEMORY, page)
    if frame == 0:
        frame = new_frame(m, MEMORY)
        radix.write(m, ROOT_MEMORY, page, frame)
        memory_files.fill(m, page, m.row_of[frame])
    return own(m, frame)


@kernel
def read_word(m, gpa):
    """The 64-bit word at a multiple of 8."""
    row, file, offset = locate(m, gpa >> 12)
    if row >= 0:
        return m.rows[row, (gpa & OFFSET) >> 3]
    if file == memory_files.NO_FILE:
        return np.int64(0)
    return memory_files.read_word(m, gpa >> 12, file, offset + (gpa & OFFSET))


@kernel
def write_word(m, gpa, word):
    """Store the 64-bit word at a multiple of 8."""
    m.rows[own_content_row(m, gpa >> 12), (gpa & OFFSET) >> 3] = word
