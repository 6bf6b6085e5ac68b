"""How far the compiler is, in one line: rewritten in place on a terminal, a new one now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from engine.warm.processes import Report

_EVERY_SECONDS = 10.0


def _line(done: int, of: int, seconds: float) -> str:
    return f"compiling kernels, once for each version of the engine: {done} of {of}, {seconds:.0f} s"


def progress_on(out: TextIO) -> Report:
    """A report for people who wait."""
    if not out.isatty():
        return progress_lines(lambda line: print(line, file=out, flush=True))

    def rewrite(done: int, of: int, seconds: float) -> None:
        out.write(f"\r{_line(done, of, seconds)}" + ("\n" if done == of else ""))
        out.flush()

    return rewrite


def progress_lines(say: Callable[[str], object]) -> Report:
    """A report that says the first line, the last, and one each ten seconds between."""
    due = 0.0

    def report(done: int, of: int, seconds: float) -> None:
        nonlocal due
        if seconds >= due or done == of:
            say(_line(done, of, seconds))
            due = seconds + _EVERY_SECONDS

    return report
