"""Guest RAM contents as the processor sees them: sparse, zero until written, addressed by GPA.

A tree by page (see ``cpu.memory_slots``) names the frame that holds its bytes. Where a raw EPT leaf points elsewhere
changes the host address that a walk reports, not the bytes.
"""

import numpy as np

from engine.cpu import radix
from engine.cpu.frames import MEMORY, new_frame, own
from engine.cpu.memory_slots import home
from engine.jit import kernel

# The word of the state frame that holds the tree's root; the hypervisor's words are in ``kvm.state_frame``.
ROOT_MEMORY = np.int64(4)

OFFSET = 0xFFF


@kernel
def content_row(m, gfn):
    """Row that holds the bytes of a page, -1 where nothing was written."""
    frame = radix.read(m, ROOT_MEMORY, home(m, gfn))
    if frame == 0:
        return -1
    return m.row_of[frame]


@kernel
def own_content_row(m, gfn):
    """Row that this change may write the bytes of a page in."""
    page = home(m, gfn)
    frame = radix.read(m, ROOT_MEMORY, page)
    if frame == 0:
        frame = new_frame(m, MEMORY)
        radix.write(m, ROOT_MEMORY, page, frame)
    return own(m, frame)


@kernel
def read_word(m, gpa):
    """The 64-bit word at a multiple of 8."""
    row = content_row(m, gpa >> 12)
    return m.rows[row, (gpa & OFFSET) >> 3] if row >= 0 else 0


@kernel
def write_word(m, gpa, word):
    """Store the 64-bit word at a multiple of 8."""
    m.rows[own_content_row(m, gpa >> 12), (gpa & OFFSET) >> 3] = word
