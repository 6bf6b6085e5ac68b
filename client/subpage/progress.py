"""How far a long call is: a line on standard error, or whatever a function makes of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int | None], object]
"""Takes what is done, and how much there is, None where nobody knows: bytes sent, or records replayed by a job."""
Progress = bool | Report

_EVERY = 0.1  # seconds


class Line:
    """A line that is written over, and gone in the end; nothing where standard error is no terminal or notebook."""

    def __init__(self, what: str) -> None:
        self._what, self._next, self._width = what, 0.0, 0
        self._shown = sys.stderr.isatty() or "ipykernel" in sys.modules

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self._shown and now >= self._next:
            share = f"{100 * done // total:3} % of {total:,}" if total else f"{done:,}"
            self._write(f"{self._what}: {share}")
            self._next = now + _EVERY

    def close(self) -> None:
        """Take the line away."""
        if self._width:
            self._write("")
            sys.stderr.write("\r")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text:<{self._width}}")
        sys.stderr.flush()
        self._width = len(text)


@contextmanager
def reporting(progress: Progress, what: str) -> Iterator[Report | None]:
    """What is called while it goes on; a line is gone in the end, however that comes."""
    line = Line(what)
    try:
        yield progress if callable(progress) else line if progress else None
    finally:
        line.close()


def counting(total: int | None, report: Report) -> Callable[[bytes], bytes]:
    """Passes pieces on, and tells how many bytes have been passed."""
    done = 0
    report(done, total)

    def told(piece: bytes) -> bytes:
        nonlocal done
        done += len(piece)
        report(done, total)
        return piece

    return told
