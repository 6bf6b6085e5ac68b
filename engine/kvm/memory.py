"""Guest RAM contents: sparse, zero until written, addressed by GPA.

A tree by GFN names the frame that holds a page's bytes. Contents belong to the page of the slot: they move with the
slot and die with it. Where a raw EPT leaf points elsewhere changes the host address that a walk reports, not the bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.cpu.frames import FRAME_SIZE, MEMORY, Machine, free_frame, new_frame, own
from engine.jit import kernel
from engine.kvm import layers
from engine.kvm.registers import ROOT_MEMORY

NOTHING = np.int64(0)


@kernel
def content_row(m, gfn):
    """Row that holds the bytes of a page, -1 where nothing was written."""
    frame = layers.read(m, ROOT_MEMORY, gfn)
    if frame == 0:
        return -1
    return m.row_of[frame]


@kernel
def own_content_row(m, gfn):
    """Row that this change may write the bytes of a page in."""
    frame = layers.read(m, ROOT_MEMORY, gfn)
    if frame == 0:
        frame = new_frame(m, MEMORY)
        layers.write(m, ROOT_MEMORY, gfn, frame)
    return own(m, frame)


@kernel
def drop_page(m, gfn):
    """Forget the contents of a page."""
    frame = layers.read(m, ROOT_MEMORY, gfn)
    if frame:
        layers.write(m, ROOT_MEMORY, gfn, NOTHING)
        free_frame(m, frame)


def page_bytes(m: Machine, row: int) -> NDArray[np.uint8]:
    """The 4096 bytes of a row."""
    content: NDArray[np.uint8] = m.rows[row].view(np.uint8)
    return content


def read_bytes(m: Machine, gpa: int, size: int) -> bytes:
    """Guest memory, zero where nothing was written."""
    out = np.zeros(size, dtype=np.uint8)
    done = 0
    while done < size:
        offset = (gpa + done) % FRAME_SIZE
        part = min(FRAME_SIZE - offset, size - done)
        row = int(content_row(m, (gpa + done) >> 12))
        if row >= 0:
            out[done : done + part] = page_bytes(m, row)[offset : offset + part]
        done += part
    return out.tobytes()


def write_page(m: Machine, gpa: int, data: NDArray[np.uint8]) -> int:
    """Store what of ``data`` lies in the page of ``gpa``; returns how many bytes that are."""
    offset = gpa % FRAME_SIZE
    part = min(FRAME_SIZE - offset, len(data))
    page_bytes(m, int(own_content_row(m, gpa >> 12)))[offset : offset + part] = data[:part]
    return part
