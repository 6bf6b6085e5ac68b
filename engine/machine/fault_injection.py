"""Memory that the host allocates for a machine, and the allocation that is made to fail (``host.fail_allocation``).

Counted, in the order in which the kernel makes them: a bitmap for each slot when SPP comes on, and the buffer of each
GET or SET through the binary ABI of ``kvm-latest``. One allocation fails, the n-th; those after it succeed.
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

    def take(self, count: int = 1) -> None:
        """Make allocations. Raises OutOfMemory when one of them is to fail; that is noted, and a retry succeeds."""
        failing = self.failing
        if failing is None or not count:
            return
        with self._state.change() as draft:
            frames.write_word(draft.machine, frames.STATE_FRAME, reg.FAIL_ALLOCATION, max(0, failing - count))
        if failing <= count:
            raise OutOfMemory("this allocation was made to fail; the next one succeeds", field="host.fail_allocation")
