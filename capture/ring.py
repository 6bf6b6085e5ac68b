"""The reader's end of the ring: it makes the shared memory, waits for records, and gives slots back."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from capture import layout

CAPACITY = 1 << 20  # records, 32 MiB: some 30 ms of a fast guest
_HIGHEST = (1 << 64) - 1
# The reader is woken for so many records, or after so many milliseconds for fewer: small runs cost the guest more than
# they tell earlier, since both of them look at the same memory.
_WORTH_WAKING = 1 << 16
_PATIENCE_MS = 20


@dataclass(frozen=True, slots=True)
class Counts:
    """What the recorder has seen since it was loaded.

    ``taken`` records; ``waits`` of a vCPU for the reader; and stores that are no records: ``elsewhere`` than the
    addresses that were asked for, to ``devices``, and at addresses that QEMU did not know. ``split`` stores lay over
    two pages, and are two records each.
    """

    taken: int
    waits: int
    elsewhere: int
    devices: int
    unknown: int
    split: int


class Ring:
    """Shared memory and two counters to wait at. Nothing of it has a name: it ends with those who have it open.

    Use as a context manager. ``records`` are views of the shared memory, valid until ``release``.
    """

    def __init__(
        self,
        capacity: int = CAPACITY,
        *,
        start_pc: int = 0,
        start_n: int = 1,
        stop_pc: int = 0,
        stop_n: int = 1,
        wide: bool = False,
        sample: int = 1,
    ) -> None:
        """A ring of so many records, a power of two. With ``start_pc`` the recorder begins when the instruction at that
        address runs for the ``start_n``-th time, and with ``stop_pc`` it ends the same way. ``wide``: with CR3
        and what was stored. ``sample``: of so many stores of a vCPU one is recorded."""
        if capacity <= 0 or capacity & (capacity - 1):
            raise ValueError(f"a ring has a power of two of records, not {capacity}")
        kind = layout.WIDE_RECORD if wide else layout.RECORD
        behind = layout.HEADER_BYTES + capacity * kind.itemsize
        size = behind + layout.GUARD_BYTES
        self._memory_fd = os.memfd_create("subpage-capture", os.MFD_CLOEXEC)
        os.ftruncate(self._memory_fd, size)
        self._map = mmap.mmap(self._memory_fd, size)
        self._header: Any = np.frombuffer(self._map, dtype=layout.HEADER, count=1)
        self._records = np.frombuffer(self._map, dtype=kind, count=capacity, offset=layout.HEADER_BYTES)
        self._guards = np.frombuffer(self._map, dtype="<u4", offset=behind)
        self._capacity = capacity
        self._worth = min(_WORTH_WAKING, max(1, capacity // 2))
        self._tail = 0
        self._held = 0
        self._lock = threading.Lock()  # verdicts come from another thread than the end of waiting for them
        self._waits = True
        for name, value in (
            ("magic", layout.MAGIC),
            ("version", layout.VERSION),
            ("record_bytes", kind.itemsize),
            ("capacity", capacity),
            ("start_pc", start_pc),
            ("start_n", start_n),
            ("stop_pc", stop_pc),
            ("stop_n", stop_n),
            ("wide", wide),
            ("sample", sample),
            ("high_gpa", _HIGHEST),
            ("guard_bytes", layout.GUARD_BYTES),
        ):
            self._header[name] = value
        self._room_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._data_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._alive_fd, self._mine_fd = os.pipe2(os.O_CLOEXEC)
        self._open = [self._memory_fd, self._room_fd, self._data_fd, self._alive_fd, self._mine_fd]

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors that QEMU inherits."""
        return self._memory_fd, self._room_fd, self._data_fd, self._alive_fd

    @property
    def arguments(self) -> str:
        """What the plugin is loaded with."""
        return ",".join(f"{name}={fd}" for name, fd in zip(("ring", "room", "data", "reader"), self.fds, strict=True))

    def only(self, low: int, high: int) -> None:
        """Record stores to these guest-physical addresses, ``low`` to below ``high``, from now on."""
        self._header["low_gpa"], self._header["high_gpa"] = low, high

    def start_at(self, pc: int) -> None:
        """Begin when the instruction here runs, as if it had been said at the beginning."""
        self._header["start_pc"] = pc

    def guard(self, masks: NDArray[np.uint32]) -> None:
        """A word for each guest page from 0 on: the guest waits after a store to a sub-page whose bit is set, until it
        is ``judged``. Pages beyond are not guarded; there may be up to ``layout.GUARD_BYTES`` / 4."""
        changed = np.flatnonzero(self._guards[: len(masks)] != masks)
        self._guards[changed] = masks[changed]
        with self._lock:
            self._header["guarding"] = int(self._waits and masks.any())

    def judge(self, until: int) -> None:
        """There is a verdict on the records before this one."""
        with self._lock:
            self._header["judged"] = until if self._waits else _HIGHEST
        self._wake()

    def let_go(self) -> None:
        """Nobody waits for a verdict any more, whatever ``guard`` and ``judge`` say from now on."""
        with self._lock:
            self._waits = False
            self._header["guarding"] = 0
        self.judge(_HIGHEST)

    @property
    def state(self) -> int:
        """``layout.MADE`` until the plugin was loaded, and so on."""
        return int(self._header["state"][0])

    @property
    def interface(self) -> int:
        """The version of QEMU's plugin interface, 0 until the plugin was loaded."""
        return int(self._header["interface"][0])

    @property
    def behind(self) -> int:
        """How many records the guest is ahead of the reader."""
        return max(0, int(self._header["head"][0]) - self._tail)

    @property
    def counts(self) -> Counts:
        names = ("waits", "elsewhere", "devices", "unknown", "split")
        return Counts(int(self._header["head"][0]), *(int(self._header[name][0]) for name in names))

    def records(self, most: int, patience_ms: int = _PATIENCE_MS) -> NDArray[np.void]:
        """The next records in order, at most so many; fewer, or none, after ``patience_ms`` without enough of them."""
        worth = min(self._worth, most)
        if self.behind < worth:
            self._sleep(worth, patience_ms)
        found = self._complete(most)
        self._held = len(found)
        return found

    def release(self) -> None:
        """What ``records`` gave is not needed any more."""
        self._tail += self._held
        self._held = 0
        self._header["tail"] = self._tail
        self._wake()

    def close(self) -> None:
        """Take no more: the guest goes on, and is not recorded."""
        self._header["closed"] = 1
        self._wake()

    def _wake(self) -> None:
        """Whoever waits in QEMU looks again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._room_fd, 1)

    def _complete(self, most: int) -> NDArray[np.void]:
        at = self._tail & (self._capacity - 1)
        count = min(int(self._header["head"][0]) - self._tail, self._capacity - at, most)
        found = self._records[at : at + max(count, 0)]
        lap = self._tail // self._capacity + 1 & 0xFFFFFFFF
        if len(found) and not self._header["several"][0] and found["lap"][-1] == lap:
            return found  # one vCPU fills them in order
        # A vCPU may have taken a slot and not filled it yet: what is after it waits for it.
        unfinished = np.flatnonzero(found["lap"] != lap)
        return found[: unfinished[0]] if len(unfinished) else found

    def _sleep(self, worth: int, patience_ms: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._data_fd)
        self._header["wanted"] = self._tail + worth
        if self.behind < worth and self.state < layout.ENDED:
            poll = select.poll()
            poll.register(self._data_fd, select.POLLIN)
            poll.poll(patience_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        for fd in self._open:
            os.close(fd)
        self._open = []
        self._header = self._header.copy()  # what was counted can still be asked for
        self._records, self._guards = np.zeros(0, dtype=layout.RECORD), np.zeros(0, dtype="<u4")
        with contextlib.suppress(BufferError):  # somebody still looks at records; the memory goes with them
            self._map.close()
