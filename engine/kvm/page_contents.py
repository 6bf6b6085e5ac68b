"""Guest RAM contents as the host sees them: bytes of the pages that ``cpu.guest_memory`` finds.

Contents belong to the page of the slot: they move with the slot and die with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.cpu import radix
from engine.cpu.frames import FRAME_SIZE, STATE_FRAME, WORDS, Machine, ample, free_frame
from engine.cpu.guest_memory import ROOT_MEMORY, locate, own_content_row
from engine.cpu.memory_files import NO_FILE, read_into, source
from engine.cpu.memory_slots import home
from engine.jit import kernel

NOTHING = np.int64(0)


@kernel
def drop_page(m, gfn):
    """Forget the contents of a page."""
    frame = radix.read(m, ROOT_MEMORY, gfn)
    if frame:
        radix.write(m, ROOT_MEMORY, gfn, NOTHING)
        free_frame(m, frame)


@kernel
def store_pages(m, gfn, words, start, tally):
    """Store whole pages, ``words`` int64[n, 512], from the ``start``-th on. Pages of zeros are not kept unless there is
    a file behind them: what was in their place is forgotten.

    Counts those that are kept in ``tally`` int64[1]. Returns how many are done, less than all when frames ran out.
    """
    at = start
    while at < words.shape[0] and ample(m):
        last = 0
        while last < WORDS and words[at, last] == 0:
            last += 1
        if last == WORDS and source(m, home(m, gfn + at))[0] == NO_FILE:
            drop_page(m, gfn + at)
        else:
            row = own_content_row(m, gfn + at)
            for i in range(WORDS):
                m.rows[row, i] = words[at, i]
            tally[0] += 1
        at += 1
    return at


def page_bytes(m: Machine, row: int) -> NDArray[np.uint8]:
    """The 4096 bytes of a row."""
    content: NDArray[np.uint8] = m.rows[row].view(np.uint8)
    return content


def read_bytes(m: Machine, gpa: int, size: int) -> bytes:
    """Guest memory; where nothing was written it is zero, or what the file behind its slot has. Raises Conflict where
    that has not got it any more."""
    out = np.zeros(size, dtype=np.uint8)
    done = 0
    while done < size:
        offset = (gpa + done) % FRAME_SIZE
        part = min(FRAME_SIZE - offset, size - done)
        page = (gpa + done) >> 12
        row, file, at = locate(m, page)
        if row >= 0:
            out[done : done + part] = page_bytes(m, row)[offset : offset + part]
        elif file != NO_FILE:
            read_into(out[done : done + part], page, int(file), int(at) + offset)
        done += part
    return out.tobytes()


def write_page(m: Machine, gpa: int, data: NDArray[np.uint8]) -> int:
    """Store what of ``data`` lies in the page of ``gpa``; returns how many bytes that are."""
    offset = gpa % FRAME_SIZE
    part = min(FRAME_SIZE - offset, len(data))
    page_bytes(m, int(own_content_row(m, gpa >> 12)))[offset : offset + part] = data[:part]
    return part


def stored_pages(m: Machine) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(GFNs ascending, rows): the pages of guest memory in which something was written."""
    root = int(m.rows[m.row_of[STATE_FRAME], ROOT_MEMORY])
    gfns = np.zeros(min(root, 1), dtype=np.int64)
    nodes = np.full(min(root, 1), root, dtype=np.int64)
    for _ in range(radix.TREE_LEVELS):
        words = m.rows[m.row_of[nodes]]
        node, index = np.nonzero(words)
        gfns = gfns[node] << radix.INDEX_BITS | index
        nodes = words[node, index]
    return gfns, m.row_of[nodes]
