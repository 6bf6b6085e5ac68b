"""Contents of a machine's guest memory, read and written from the host's side: no permission applies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.cpu import frames, radix
from engine.cpu.guest_memory import ROOT_MEMORY, locate
from engine.cpu.memory_files import NO_FILE
from engine.errors import InvalidValue
from engine.images.base import Block
from engine.kvm import dirty_marking, page_contents
from engine.kvm import state_frame as reg
from engine.kvm.memory_views import store_bytes
from engine.kvm.slots import PAGE_SHIFT, PAGE_SIZE, check_pages, first_page_without_slot
from engine.machine.state import Change, Operations, State, register
from engine.state.frame_store import Draft
from engine.state.retry import run_all

_LOGGED_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an image did: bytes that it has, and pages of them that are not all zeros, which alone are kept."""

    size: int
    pages_kept: int


class Memory(Operations):
    """Guest memory of one machine. A page without a slot raises InvalidValue."""

    def read(self, gpa: int, size: int) -> bytes:
        """Guest RAM contents, zero where nothing was written."""
        if 0 < size <= PAGE_SIZE - gpa % PAGE_SIZE and (found := self.read_in_page(gpa, size)) is not None:
            return found
        now = self._state.current
        _check(now, gpa, size, "size")
        return page_contents.read_bytes(now.snapshot.machine, gpa, size)

    def read_in_page(self, gpa: int, size: int) -> bytes | None:
        """The same of bytes that lie in one page; None where that has no slot.

        The walk is that of ``cpu.guest_memory.locate``. Tools read a guest page by page, and to enter a kernel takes
        many times as long.
        """
        now = self._state.current
        if now.slots.holding(gpa >> PAGE_SHIFT) is None:
            return None
        m = now.snapshot.machine
        if now.slots.files:
            return page_contents.read_bytes(m, gpa, size)
        row_of, rows = m.row_of.item, m.rows
        frame, shift = rows.item(row_of(frames.STATE_FRAME), ROOT_MEMORY), radix.TREE_LEVELS * radix.INDEX_BITS
        while frame and shift:
            shift -= radix.INDEX_BITS
            frame = rows.item(row_of(frame), gpa >> PAGE_SHIFT + shift & radix.INDEX_MASK)
        if not frame:
            return bytes(size)
        content: bytes = rows[row_of(frame)].tobytes()
        at = gpa % PAGE_SIZE
        return content if size == PAGE_SIZE else content[at : at + size]

    def write(self, gpa: int, data: bytes) -> None:
        """Store bytes; the dirty logs are told."""
        now = self._state.current
        _check(now, gpa, len(data), "body")
        with self._state.change(since=now) as change:
            store_bytes(change, gpa, data)
            _log(change, gpa, len(data))

    def load(self, blocks: Iterable[Block], grown: Callable[[int], None] = lambda frames: None) -> Loaded:
        """Store a memory image, all of it or, whatever is raised meanwhile, nothing; the dirty logs are told.

        Pages of zeros take no frame, and read as zeros afterwards whatever was there. ``grown`` is told after each
        block how many frames are in use by then, and may raise. A block outside every slot raises InvalidValue.
        """
        kept, size = np.zeros(1, dtype=np.int64), 0
        with self._state.change() as change:
            before = frames.in_use(change.machine)
            change.reserve()
            for block in blocks:
                _check_block(change, block)
                _store_block(change, block, kept)
                size += len(block.data)
                grown(frames.in_use(change.machine))
            change.ensure()
            brought = max(0, frames.in_use(change.machine) - before) + register(change.machine, reg.IMAGE_FRAMES)
            frames.write_word(change.machine, frames.STATE_FRAME, reg.IMAGE_FRAMES, brought)
            change.trim()
        return Loaded(size, int(kept[0]))


def _check_block(change: Change, block: Block) -> None:
    first, last = block.gpa >> PAGE_SHIFT, (block.gpa + len(block.data) - 1) >> PAGE_SHIFT
    missing = int(first_page_without_slot(change.machine, first, last - first + 1))
    if missing < 0:
        return
    at = max(missing << PAGE_SHIFT, block.gpa)
    rule = f"must have a memory slot for every page; byte {block.offset + at - block.gpa} of it is for GPA {at:#x}"
    raise InvalidValue(f"{rule}, which has none", field="body", value=hex(at), errno="EFAULT")


def _store_block(change: Change, block: Block, kept: NDArray[np.int64]) -> None:
    """Its whole pages at once, what is before and behind them as bytes."""
    data = block.data
    head = min(-block.gpa % PAGE_SIZE, len(data))
    whole = (len(data) - head) // PAGE_SIZE * PAGE_SIZE
    for begin, end in ((0, head), (head + whole, len(data))):
        _store_part(change, block.gpa + begin, data[begin:end], kept)
    pages = np.ascontiguousarray(data[head : head + whole]).view(np.int64).reshape(-1, frames.WORDS)
    gfn = (block.gpa + head) >> PAGE_SHIFT
    run_all(change, len(pages), lambda done: page_contents.store_pages(change.machine, gfn, pages, done, kept))
    if dirty_marking.mode(change.machine):
        _log(change, block.gpa, len(data))


def _store_part(change: Change, gpa: int, data: NDArray[np.uint8], kept: NDArray[np.int64]) -> None:
    """Bytes of one page, which stays as it is beside them."""
    if not len(data):
        return
    row, file, _ = locate(change.machine, gpa >> PAGE_SHIFT)
    if data.any() or row >= 0 or file != NO_FILE:
        change.ensure()
        page_contents.write_page(change.machine, gpa, data)
        kept[0] += 1


def _log(draft: Draft, gpa: int, size: int) -> None:
    def note(done: int) -> int:
        begin = done * _LOGGED_AT_ONCE
        dirty_marking.note_host_write(draft.machine, gpa + begin, min(_LOGGED_AT_ONCE, size - begin))
        return done + 1

    run_all(draft, -(-size // _LOGGED_AT_ONCE), note)


def _check(now: State, gpa: int, size: int, field: str) -> None:
    if size < 1:
        raise InvalidValue("at least one byte is asked for", field=field, value=size)
    if gpa < 0:
        raise InvalidValue("an address is not negative", field="gpa", value=gpa)
    pages = ((gpa + size - 1) >> 12) - (gpa >> 12) + 1
    check_pages(now.snapshot.machine, now.config.maxphyaddr, gpa >> 12, pages, "gpa", gpa)
