"""Host-physical memory by address: where RAM and tables are, and what is read and written where nothing is.

A table is a frame of table memory, the upper half of what MAXPHYADDR reaches. What the processor itself writes, the
page-modification log and the #VE information area, may be there or in guest RAM, which is at the HPA that equals its
GPA (SDM vol. 3C, 26.5.7.2 and 29.3.6). Anywhere else there is no memory: it reads as all ones, and a store is lost.
"""

from engine.arch import ept
from engine.cpu import guest_memory
from engine.cpu.frames import CAP_ARENA, CLIENT, EPT, SPPT, read_word, write_word
from engine.cpu.memory_slots import find_slot
from engine.jit import kernel, position


def table_memory(width: int) -> int:
    """Host-physical address of the first frame of tables; ``width`` is MAXPHYADDR. Easy to tell from guest RAM."""
    return 1 << (width - 1)


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


@kernel
def frame_at(m, address):
    """Frame at a host-physical address, -1 where no table memory is.

    Registers, bitmap layers and guest pages are kept in frames too, but an entry that a client made cannot lead there.
    """
    frame = (address - m.caps[CAP_ARENA]) >> 12
    if frame < 0 or frame >= m.row_of.shape[0] or m.row_of[position(frame)] < 0:
        return -1
    kind = m.kind[position(frame)]
    if kind != EPT and kind != SPPT and kind != CLIENT:
        return -1
    return frame


@kernel
def read_entry(m, table, index):
    """Entry of a table by host-physical address; absent memory reads as all ones."""
    frame = frame_at(m, table)
    if frame < 0:
        return -1
    return read_word(m, frame, index)


@kernel
def write_entry(m, table, index, word):
    """Store an entry of a table by host-physical address; a store to absent memory is lost."""
    frame = frame_at(m, table)
    if frame >= 0:
        write_word(m, frame, index, word)


@kernel
def table_of(entry):
    """Address bits of an entry."""
    return entry & ept.ADDRESS
