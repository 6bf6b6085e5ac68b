"""Host-physical memory that the processor itself writes: the page-modification log and the #VE information area.

A page is a frame of table memory, or guest RAM, which is at the HPA that equals its GPA. Anywhere else there is no
memory: it reads as all ones, and a store is lost. EPT is not asked (SDM vol. 3C, 26.5.7.2 and 29.3.6).
"""

from engine.cpu import guest_memory
from engine.cpu.frames import frame_at, read_entry, write_entry
from engine.jit import kernel

# The words of a row of Machine.slots that say where its pages are
SLOT_GFN = 0
SLOT_PAGES = 1


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
def read(m, page, index):
    """The 64-bit word at a position in a page."""
    if frame_at(m, page) < 0 and find_slot(m, page >> 12) >= 0:
        return guest_memory.read_word(m, page + 8 * index)
    return read_entry(m, page, index)


@kernel
def write(m, page, index, word):
    """Store the 64-bit word at a position in a page."""
    if frame_at(m, page) < 0 and find_slot(m, page >> 12) >= 0:
        guest_memory.write_word(m, page + 8 * index, word)
    else:
        write_entry(m, page, index, word)
