"""A guest from its first instruction to its end, as runs of records."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from capture import layout, plugin
from capture.qemu import Guest, Program, Qemu, program_of
from capture.ring import CAPACITY, Counts, Ring

BATCH = 1 << 16  # records that are handed out at once, at most
LATER = 1  # a start_pc: ``Recording.start_at`` will say where
_ENDING_SECONDS = 10.0

NOT_SEEN = (
    "Not in it: accessed and dirty flags that page walks set, device DMA, most stack pushes of interrupts and "
    "exceptions. TCG is no real processor: it neither speculates nor merges stores."
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be recorded: from the ``start_n``-th time that the instruction at ``start_pc`` runs (0: from the
    beginning) to the ``stop_n``-th time that the one at ``stop_pc`` does (0: to the end), stores to guest-physical
    addresses ``low`` to below ``high``, ``most`` of them (None: all). ``wide``: as ``layout.WIDE_RECORD``, with CR3
    and what was stored. Of ``sample`` stores of a vCPU, to whatever address, one is looked at: the first of them."""

    start_pc: int = 0
    start_n: int = 1
    low: int = 0
    high: int = 1 << 64
    most: int | None = None
    stop_pc: int = 0
    stop_n: int = 1
    wide: bool = False
    sample: int = 1


class Recording:
    """A guest being recorded; a context manager, and iterable once inside. Raises CaptureError on entry.

    Each run of records (``layout.RECORD``, or the wide one) is a view of the ring, valid until the next
    one is asked for. Empty ones come now and then while the guest does nothing.
    """

    def __init__(
        self, command: Sequence[str], wanted: Wanted, capacity: int = CAPACITY, *, has_line: bool = False
    ) -> None:
        """With ``has_line`` the guest has one more serial line, its last one, which ends at ``line``."""
        self._has_line = has_line
        self.line: socket.socket
        self._command = list(command)
        self._wanted = wanted
        self._capacity = capacity
        self._stack = ExitStack()
        self._stopping: float | None = None
        self._word: str | None = None
        self._over: str | None = None
        self._broken = False
        self._guarding = False
        self._stopped = False
        self.taken = 0
        self.held = 0  # the records before this one have one that waits for its verdict
        self.program: Program
        self.guest: Guest
        self.qemu: Qemu
        self._ring: Ring

    def __enter__(self) -> Self:
        wanted = self._wanted
        self.program = program_of(self._command)
        path = plugin.built()
        with ExitStack() as stack:
            start, stop = (wanted.start_pc, wanted.start_n), (wanted.stop_pc, wanted.stop_n)
            places = {"start_pc": start[0], "start_n": start[1], "stop_pc": stop[0], "stop_n": stop[1]}
            ring = Ring(self._capacity, **places, wide=wanted.wide, sample=wanted.sample)
            self._ring = stack.enter_context(ring)
            theirs = None
            if self._has_line:
                self.line, theirs = map(stack.enter_context, socket.socketpair())
            self.qemu = stack.enter_context(Qemu(self.program, self._command, path, self._ring, theirs))
            self.guest = self.qemu.begin()
            high = min(wanted.high, (1 << 64) - 1)
            if self.guest.interface == 1:
                # What lies beyond is firmware and video memory, whose addresses this interface does not tell.
                high = min(high, self.guest.ram)
            self._ring.only(wanted.low, high)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[NDArray[np.void]]:
        most = self._wanted.most
        self.qemu.go()
        while most is None or self.taken < most:
            running = self.qemu.guest_runs and self._ring.state != layout.STOPPED
            found = self._ring.records(BATCH if most is None else min(BATCH, most - self.taken))
            if (not len(found) and not running) or self._over:
                break
            if self._guarding and len(under := np.flatnonzero(found["flags"] & layout.HELD)):
                self.held = self.taken + int(under[-1]) + 1
            self.taken += len(found)
            yield found
            self._ring.release()
            self._stop_if_asked()
        else:
            self._word = "as many stores as were asked for"
        if self._ring.state == layout.STOPPED:
            self._stopped = True
            self._word = f"the guest came to {self._wanted.stop_pc:#x}, where recording ends"
        self._counts = self._ring.counts
        self._ring.close()
        self._word = self._word or self.qemu.word()
        if self._complete:
            self.qemu.quit()

    def stop(self) -> None:
        """End the guest and take what it has still done; may be called from a signal handler."""
        self._stopping = self._stopping or time.monotonic()

    def start_at(self, pc: int) -> None:
        """What was LATER is here. Only code that has not run before is noticed."""
        self._ring.start_at(pc)

    def end(self, word: str, *, failed: bool = False) -> None:
        """End the guest where it stands, and say this, unless it was ended before; from any thread. A vCPU that waits
        for a verdict does not go on, whoever lets it go from now on. Records that were not taken are none."""
        if self._over is None:
            self._over, self._broken = word, failed
        self.qemu.kill()

    def guard(self, masks: NDArray[np.uint32]) -> None:
        """See ``Ring.guard``; from any thread."""
        self._guarding = True
        self._ring.guard(masks)

    def judge(self, until: int) -> None:
        """There is a verdict on the records before this one; from any thread."""
        self._ring.judge(until)

    def _stop_if_asked(self) -> None:
        if self._stopping is not None and self.qemu.running:
            self._ring.let_go()
            if time.monotonic() - self._stopping > _ENDING_SECONDS:
                self.qemu.kill()
            else:
                self.qemu.terminate()

    @property
    def behind(self) -> int:
        """How many records the guest is ahead."""
        return self._ring.behind

    @property
    def counts(self) -> Counts:
        """What was recorded and what was not; at the end, of all of it."""
        return getattr(self, "_counts", None) or self._ring.counts

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` ended it."""
        return self._stopping is not None

    @property
    def failed(self) -> bool:
        """Whether the guest has ended as it should not have."""
        if self._over:
            return self._broken
        return not self.stopped and not self._complete and self.qemu.status not in (0, None)

    @property
    def _complete(self) -> bool:
        return self._stopped or (self._wanted.most is not None and self.taken >= self._wanted.most)

    @property
    def word(self) -> str:
        """Why it ended."""
        status = self.qemu.status
        if self.stopped:
            return "interrupted"
        if self._over:
            return self._over
        if self._word is None and status is not None and status < 0:
            return f"QEMU was ended by {signal.Signals(-status).name}"
        if self.failed:
            return f"QEMU ended with status {status}; it said why"
        if self._wanted.start_pc and not self.taken:
            return f"the guest never came to {self._wanted.start_pc:#x} {self._wanted.start_n} times: nothing recorded"
        return self._word or "QEMU ended"

    def identity(self) -> dict[str, Any]:
        """What a recording is told to be of: the same for the same guest."""
        wanted = self._wanted
        return {
            "recorder": f"subpage ring {layout.VERSION}",
            "qemu": self.program.version,
            "plugin_interface": self.guest.interface,
            "vcpus": self.guest.vcpus,
            "ram": [[hex(first), hex(size)] for first, size in self.guest.ranges],
            "start": [hex(wanted.start_pc), wanted.start_n] if wanted.start_pc else None,
            "until": [hex(wanted.stop_pc), wanted.stop_n] if wanted.stop_pc else None,
            "sample": wanted.sample if wanted.sample > 1 else None,
            "only": [hex(wanted.low), hex(wanted.high)] if (wanted.low, wanted.high) != (0, 1 << 64) else None,
        }
