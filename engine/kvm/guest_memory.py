"""Guest memory for the packages that read and write it by physical address, on a machine's own frames.

An address that no memory slot backs reads as None and refuses a store, for any 64-bit address; so does a store to a
read-only slot. Nothing is kept here: a ``GuestMemory`` on a snapshot reads the published bytes, one on a draft the bytes of the
change under way.
"""

from __future__ import annotations

import numpy as np

from engine.cpu.frames import Machine
from engine.kvm import memory
from engine.kvm.slots import first_page_without_slot, writable_bytes
from engine.state.frame_store import Draft, Snapshot
from engine.state.retry import run_all


class GuestMemory:
    """Guest memory of a machine. Only one on a draft can be written."""

    def __init__(self, state: Snapshot | Draft) -> None:
        self._state = state

    @property
    def _machine(self) -> Machine:
        return self._state.machine

    def read(self, gpa: int, size: int) -> bytes | None:
        """``size`` bytes at ``gpa``, None where a page of them has no slot."""
        if not _backed(self._machine, gpa, size):
            return None
        return memory.read_bytes(self._machine, gpa, size)

    def write(self, gpa: int, data: bytes) -> bool:
        """Store ``data`` at ``gpa``; False, storing nothing, where a page has no slot or only a read-only one."""
        draft = self._state
        if not isinstance(draft, Draft):
            raise TypeError("published memory is not written")
        if not _backed(draft.machine, gpa, len(data)) or not writable_bytes(draft.machine, gpa, len(data)):
            return False
        array = np.frombuffer(data, dtype=np.uint8)
        run_all(draft, len(array), lambda done: done + memory.write_page(draft.machine, gpa + done, array[done:]))
        return True


def _backed(machine: Machine, gpa: int, size: int) -> bool:
    first, last = gpa >> 12, (gpa + size - 1) >> 12
    # No slot is that high, and the kernels count pages in 64 bits with a sign.
    if last >= 1 << 52:
        return False
    return int(first_page_without_slot(machine, first, last - first + 1)) < 0
