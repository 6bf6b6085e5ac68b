"""Trace files of the command line: opened, looked at, and told of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.trace.taken import Taken
from service.platform.failures import opened
from service.runtime.trace_files import AUTO, TraceFile, TraceFileError, look_in, told_of, trace_in

# Whose the addresses of a tool's trace are, in words.
WHOSE = {
    "guest-physical": "physical addresses of a guest",
    "guest-virtual": "virtual addresses of a guest",
    "process-virtual": "virtual addresses of a process",
}


@contextmanager
def opened_trace(
    path: Path,
    format: str = AUTO,
    *,
    record: str = "record16",
    skip_unknown: bool = False,
    columns: str | None = None,
) -> Iterator[TraceFile]:
    """Open a file of a format, or of the one that it is recognised as. Raises Failure."""
    with opened(path) as raw, told_of(path):
        yield trace_in(raw, path.stat().st_size, path, format, record, skip_unknown, columns)


def look(path: Path, format: str = AUTO, columns: str | None = None) -> str:
    """The format of a file: the one of that name, or the one that it is recognised as. Raises Failure."""
    if path.is_fifo():  # what is looked at would be gone from it
        raise TraceFileError(
            f"{path}: is a pipe, and is read more than once: write it to a file first, or send it by `vm.replay`"
        )
    with opened(path) as raw:
        return look_in(raw, path, format, columns)


def lines_about(
    path: Path | str, name: str, compression: str | None, taken: Taken | None, ignored: Sequence[str]
) -> Iterator[str]:
    """What a file was taken for, and what of it was left out. ``name`` is its format where no tool wrote it."""
    packed_in = f", {compression}" if compression else ""
    if taken is None:
        yield f"{path}: {name}{packed_in}"
        if isinstance(path, Path) and not compression:
            from service.cli.recorded_files import lines_of_sample

            yield from lines_of_sample(path, name)
    else:
        yield f"{path}: {taken.format}{packed_in}; {WHOSE[taken.address]}; sizes {taken.sizes}"
        for reason, count in taken.skipped.items():
            first = next((line for line in taken.first if line.reason == reason), None)
            where = f", first line {first.line}" if first else ""
            yield f"skipped {count:,}: {reason}{where}"
    if ignored:
        yield f"left out, as they mean nothing here: columns {', '.join(ignored)}"
