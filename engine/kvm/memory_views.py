"""Guest memory for the packages that read and write it by physical address, on a machine's own frames.

An address that no memory slot backs reads as None and refuses a store, for any 64-bit address; so does a store to a
read-only slot. Nothing is kept here: memory on a snapshot reads the published bytes, on a draft the bytes of the change
under way. What an operation only tries it does to a ``TrialMemory``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from engine.cpu.frames import FRAME_SIZE, Machine
from engine.errors import Conflict
from engine.kvm import page_contents
from engine.kvm.slots import first_page_without_slot, writable_bytes
from engine.state.frame_store import Draft, Snapshot
from engine.state.retry import run_all


class ReadsMemory(Protocol):
    """What is read by address: guest memory, or pages of the host."""

    def read(self, gpa: int, size: int, /) -> bytes | None:
        """``size`` bytes at ``gpa``, None where any of them is not there."""


class GuestMemory:
    """Guest memory of a machine, in address space 0 unless told (``space`` as in ``cpu.memory_slots``). Only that of a
    draft can be written."""

    def __init__(self, state: Snapshot | Draft, space: int = 0) -> None:
        self._state = state
        self._space = space

    def read(self, gpa: int, size: int) -> bytes | None:
        """``size`` bytes at ``gpa``, None where a page of them has no slot, or was lost with the file behind it, for
        which a change raises Conflict."""
        machine = self._state.machine
        if not _backed(machine, self._space, gpa, size):
            return None
        try:
            return page_contents.read_bytes(machine, gpa | self._space, size)
        except Conflict:
            if isinstance(self._state, Draft):
                raise
            return None

    def write(self, gpa: int, data: bytes) -> bool:
        """Store ``data`` at ``gpa``; False, storing nothing, where a page has no slot or only a read-only one."""
        draft = self._state
        if not isinstance(draft, Draft):
            raise TypeError("published memory is not written")
        if not _backed(draft.machine, self._space, gpa, len(data)):
            return False
        if not writable_bytes(draft.machine, gpa | self._space, len(data)):
            return False
        store_bytes(draft, gpa | self._space, data)
        return True


class TrialMemory(GuestMemory):
    """Guest memory whose writes stay here, so that an operation can be tried without being applied."""

    def __init__(self, below: GuestMemory) -> None:
        self._below = below
        self._pages: dict[int, bytearray] = {}

    def read(self, gpa: int, size: int) -> bytes | None:
        """``size`` bytes at ``gpa`` as written here or else below."""
        below = self._below.read(gpa, size)
        if below is None or not self._pages:
            return below
        data = bytearray(below)
        for page, first, last in _pages(gpa, size):
            if page in self._pages:
                data[first - gpa : last - gpa] = self._pages[page][first - page : last - page]
        return bytes(data)

    def write(self, gpa: int, data: bytes) -> bool:
        """Keep ``data``; False when nothing backs the address below."""
        for page, first, last in _pages(gpa, len(data)):
            if page not in self._pages:
                contents = self._below.read(page, FRAME_SIZE)
                if contents is None:
                    return False
                self._pages[page] = bytearray(contents)
            self._pages[page][first - page : last - page] = data[first - gpa : last - gpa]
        return True


def store_bytes(draft: Draft, gpa: int, data: bytes) -> None:
    """Store bytes in pages that have slots, whatever their permissions; no log is told."""
    array = np.frombuffer(data, dtype=np.uint8)
    run_all(draft, len(array), lambda done: done + page_contents.write_page(draft.machine, gpa + done, array[done:]))


def _backed(machine: Machine, space: int, gpa: int, size: int) -> bool:
    first, last = gpa >> 12, (gpa + size - 1) >> 12
    # No slot is that high, and the kernels count pages in 64 bits with a sign.
    if last >= 1 << 52:
        return False
    return int(first_page_without_slot(machine, first | space >> 12, last - first + 1)) < 0


def _pages(gpa: int, size: int) -> Iterable[tuple[int, int, int]]:
    """The pages that bytes lie in, each with the first address in it and the one after the last."""
    for page in range(gpa & ~(FRAME_SIZE - 1), gpa + size, FRAME_SIZE):
        yield page, max(page, gpa), min(page + FRAME_SIZE, gpa + size)
