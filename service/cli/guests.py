"""What commands that watch a guest share: how it is stopped from the keyboard, and what is told of it meanwhile."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from capture.recording import Recording

_LOOK_SECONDS = 0.25
_PAGE_SHIFT = np.uint64(12)


@contextmanager
def stopping(recording: Recording) -> Iterator[None]:
    """SIGINT and SIGTERM end the guest, and what it has done is still taken."""

    def stop(number: int, frame: Any) -> None:
        recording.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch:
    """How far a recording is: stores, pages that they touch, time."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        end = max(first + size for first, size in recording.guest.ranges)
        self._touched = np.zeros((end >> 12) + 1, dtype=np.bool_)  # the last one: for what lies elsewhere
        self._began = time.monotonic()
        self._looked = (self._began, 0)
        self._status: Any = None
        self.stores = 0
        self.seconds = 0.0
        self.extra = ""

    def see(self, records: NDArray[np.void]) -> None:
        """Count records, and tell now and then."""
        if len(records):
            pages = (records["gpa"] >> _PAGE_SHIFT).astype(np.int64)
            new = pages[~self._touched.take(pages, mode="clip")]  # few
            self._touched.put(new, True, mode="clip")
            self.stores += len(records)
        now = time.monotonic()
        self.seconds = now - self._began
        since, before = self._looked
        if self._status is not None and now - since >= _LOOK_SECONDS:
            self._looked = (now, self.stores)
            rate = (self.stores - before) / (now - since)
            self._status.update(f"{self.told(rate)}{self.extra}")

    def told(self, rate: float | None = None) -> str:
        """Stores, pages, time and rate: the whole time's unless one is given."""
        if rate is None:
            rate = self.stores / self.seconds if self.seconds else 0.0
        pages = int(np.count_nonzero(self._touched))
        return f"{self.stores:,} stores to {pages:,} pages in {self.seconds:.1f} s, {rate / 1e6:.1f} M/s"

    def show(self, status: Any) -> None:
        self._status = status


@contextmanager
def watched(what: str, recording: Recording, wanted: bool | None) -> Iterator[Watch]:
    """A line on standard error that moves; ``wanted`` as the option ``--progress`` says it."""
    watch = Watch(recording)
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield watch
        return
    with Console(stderr=True).status(what) as status:
        watch.show(status)
        yield watch
