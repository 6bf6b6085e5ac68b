"""The host's side of guest memory: which host frame backs a page, how large a host page is, whether it may be written.

A page is at HPA = GPA until the host moves it; it then gets a frame of its own, from just below table memory downwards.
Only 4-KByte host pages are moved or shared read-only: the host splits a larger one first.

The word of a page (``cpu.radix``): bits 51:12 its host frame, 0 where that is the GPA; bit 0 host page is read-only.
"""

import numpy as np

from engine.arch import ept as bits
from engine.cpu import radix
from engine.cpu.frames import CAP_ARENA, STATE_FRAME, read_word, write_word
from engine.cpu.memory_slots import SLOT_GFN, SMM_PAGE, find_slot, home
from engine.jit import kernel
from engine.kvm.state_frame import NEXT_HOST_FRAME, ROOT_HOST

READ_ONLY = 1
NOT_READ_ONLY = np.int64(0)


@kernel
def address_of_page(m, gfn):
    """Host-physical address of a page."""
    page = home(m, gfn)
    word = radix.read(m, ROOT_HOST, page) & bits.ADDRESS
    return word or page << 12


@kernel
def read_only(m, gfn):
    """Whether the host page may only be read: it is shared, and a write gets a copy."""
    return radix.read(m, ROOT_HOST, home(m, gfn)) & READ_ONLY != 0


@kernel
def next_frame(m):
    """A host frame that backs no page yet."""
    frame = read_word(m, STATE_FRAME, NEXT_HOST_FRAME)
    if frame == 0:
        frame = m.caps[CAP_ARENA] >> 12
    frame -= 1
    slot = find_slot(m, frame)
    while slot >= 0:
        frame = m.slots[slot, SLOT_GFN] - 1
        slot = find_slot(m, frame)
    write_word(m, STATE_FRAME, NEXT_HOST_FRAME, frame)
    return frame


@kernel
def renew(m, gfn, flags):
    """Put a page in another host frame; ``flags`` is READ_ONLY or 0."""
    radix.write(m, ROOT_HOST, home(m, gfn), next_frame(m) << 12 | flags)


@kernel
def back(m, gfn):
    """Give memory that address space 0 has not a host frame; its GPA may be that of other memory there."""
    page = home(m, gfn)
    if page >= SMM_PAGE and radix.read(m, ROOT_HOST, page) == 0:
        renew(m, page, NOT_READ_ONLY)


@kernel
def forget(m, gfn):
    """The page is backed as a new slot's page is."""
    radix.clear(m, ROOT_HOST, gfn)
