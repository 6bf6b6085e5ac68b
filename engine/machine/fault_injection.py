"""Memory that the host allocates for a machine, and the allocation that is made to fail (``host.fail_allocation``).

Counted, in the order in which the kernel makes them, is what has a method here, and the entry of a
vCPU into VMX operation (``nested.set_state``). One allocation fails, the n-th; those after it succeed.
"""

from __future__ import annotations

from engine.cpu import frames
from engine.errors import OutOfMemory
from engine.kvm import state_frame as reg
from engine.machine.state import Operations


class Allocations(Operations):
    """The countdown of one machine."""

    @property
    def failing(self) -> int | None:
        """Which allocation from now fails, 1 the next; None when none does."""
        return self._state.current.failing

    def make_bitmaps(self, slots: int) -> None:
        """Those of KVM_INIT_SPP: a bitmap for each slot."""
        self._make(slots)

    def make_buffer(self) -> None:
        """That of each GET or SET through the binary ABI of ``kvm-latest``."""
        self._make(1)

    def _make(self, count: int) -> None:
        """Make allocations. Raises OutOfMemory when one of them is to fail; that is noted, and a retry succeeds."""
        failing = self.failing
        if failing is None or not count:
            return
        with self._state.change() as draft:
            frames.write_word(draft.machine, frames.STATE_FRAME, reg.FAIL_ALLOCATION, max(0, failing - count))
        if failing <= count:
            raise OutOfMemory("this allocation was made to fail; the next one succeeds", field="host.fail_allocation")
