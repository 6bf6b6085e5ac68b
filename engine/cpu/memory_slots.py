"""Memory slots as kernels find them, in both address spaces: 0, and 1 for a vCPU in system-management mode.

Whatever is kept of pages is found by their number. That of a page of space 1 has SMM_PAGE, and its address SMM, a bit
that no guest-physical address has. So slots, logs, contents and roots of both spaces lie in one table each, and such an
address, a *place*, says by itself where it belongs. The processor knows nothing of it: it walks by the GPA alone
(``within``), from the root of the space that its vCPU is in (``space_of``; role.smm in the kernel).

Two slots in one range of user memory are the same memory. A page of space 1 that is also one of space 0 has its home
there: its bytes and its host frame are those of that page.
"""

import numpy as np

from engine.arch.controls import V_SPACE
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine, read_word
from engine.jit import kernel

# The words of a row of Machine.slots that say where its pages are: in the guest, and in user memory (0: nobody said).
SLOT_GFN = 0
SLOT_PAGES = 1
SLOT_HOST = 5
# Beside where a slot is: the file behind it (see ``cpu.memory_files``), and where in the file its first byte is.
SLOT_FILE = 6
SLOT_FILE_AT = 7
SLOT_WORDS = 8

SMM_PAGE = 1 << 40
SMM = SMM_PAGE << 12

NOWHERE = np.int64(0)


@kernel
def space_of(m, vcpu):
    """The address space that a vCPU is in, as the bit that its addresses have: SMM, or 0."""
    return read_word(m, FIRST_VCPU_FRAME + vcpu, V_SPACE)


def space_of_record(m: Machine, position: int) -> int:
    """The same, for drivers."""
    return int(m.rows[m.row_of[FIRST_VCPU_FRAME + position], V_SPACE])


@kernel
def within(gpa):
    """The address that the processor has for a place."""
    return gpa & ~SMM


@kernel
def both(m):
    """Whether there is a slot of address space 1; they are the last ones."""
    count = m.slots.shape[0]
    return count > 0 and m.slots[count - 1, SLOT_GFN] >= SMM_PAGE


@kernel
def find_slot(m, gfn):
    """Position of the slot that holds a page, -1 where there is none."""
    low = 0
    high = m.slots.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if m.slots[middle, SLOT_GFN] <= gfn:
            low = middle + 1
        else:
            high = middle
    position = low - 1
    if position < 0 or gfn >= m.slots[position, SLOT_GFN] + m.slots[position, SLOT_PAGES]:
        return -1
    return position


@kernel
def user_page(m, gfn):
    """Number of the page of user memory that a page is in, 0 where nobody said or it has no slot."""
    slot = find_slot(m, gfn)
    if slot < 0 or m.slots[slot, SLOT_HOST] == NOWHERE:
        return NOWHERE
    return m.slots[slot, SLOT_HOST] + gfn - m.slots[slot, SLOT_GFN]


@kernel
def holds(m, slot, page):
    """Whether a slot is where a page of user memory is."""
    first = m.slots[slot, SLOT_HOST]
    return first != NOWHERE and first <= page < first + m.slots[slot, SLOT_PAGES]


@kernel
def home(m, gfn):
    """The page of address space 0 that is the same memory as a page, the lowest of several; else the page itself."""
    if gfn < SMM_PAGE:
        return gfn
    page = user_page(m, gfn)
    if page == NOWHERE:
        return gfn
    slot = 0
    while m.slots[slot, SLOT_GFN] < SMM_PAGE:
        if holds(m, slot, page):
            return m.slots[slot, SLOT_GFN] + page - m.slots[slot, SLOT_HOST]
        slot += 1
    return gfn


@kernel
def twin(m, gfn, before):
    """(slot, page): the last slot of address space 1 before position ``before`` that is the same memory as a page of
    space 0, and that memory's page in it; (-1, 0) where there is none."""
    slot = before - 1
    if slot < 0 or m.slots[slot, SLOT_GFN] < SMM_PAGE or gfn >= SMM_PAGE:
        return -1, NOWHERE
    page = user_page(m, gfn)
    while page != NOWHERE and slot >= 0 and m.slots[slot, SLOT_GFN] >= SMM_PAGE:
        if holds(m, slot, page):
            return slot, m.slots[slot, SLOT_GFN] + page - m.slots[slot, SLOT_HOST]
        slot -= 1
    return -1, NOWHERE
