"""Records over frames that are no neighbours, in what a replay says: such a record is one, in several places.

A row of the log, and an exit record, has the GPA of the first byte and the size of the whole access. Of these records
that does not say where the rest is; what does is kept beside them, as runs of bytes in neighbouring frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.cpu.access_over_pages import PAGE
from engine.kvm.vcpu_run import EXIT_AT, EXIT_GPA, EXIT_INDEX, EXIT_RECORD

Runs = tuple[tuple[int, int, int], ...]
"""(GPA, bytes, bytes of the record before it) of each run of neighbouring frames."""


class Scattered(NamedTuple):
    """Those among some exit records: ``rows`` int64[k] their positions, ascending, one for each run; ``gpa`` uint64[k]
    and ``size`` uint16[k] of the run."""

    rows: NDArray[np.int64]
    gpa: NDArray[np.uint64]
    size: NDArray[np.uint16]

    def window(self, key: slice | NDArray[np.int64], count: int) -> Scattered:
        """Those among the records that ``key`` picks out of ``count``."""
        if not len(self.rows):
            return self
        picked = np.arange(count)[key]
        order = np.argsort(picked, kind="stable")
        found = np.searchsorted(picked[order], self.rows)
        kept = (found < len(picked)) & (picked[order][np.minimum(found, len(picked) - 1)] == self.rows)
        rows = order[found[kept]]
        again = np.argsort(rows, kind="stable")
        return Scattered(rows[again], self.gpa[kept][again], self.size[kept][again])


NONE = Scattered(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint16))


def joined(parts: Sequence[Scattered], lengths: Sequence[int]) -> Scattered:
    """Those of records that come one part after the other, of so many each."""
    begins = np.cumsum([0, *lengths])
    return Scattered(
        np.concatenate([part.rows + begin for part, begin in zip(parts, begins.tolist(), strict=False)]),
        np.concatenate([part.gpa for part in parts]),
        np.concatenate([part.size for part in parts]),
    )


def runs_of(places: NDArray[np.int64], size: int) -> Runs:
    """The runs of an access of ``size`` bytes, whose pages are where ``Machine.places`` says."""
    runs: list[tuple[int, int, int]] = []
    done = 0
    while done < size:
        at = int(places[((int(places[0]) & (PAGE - 1)) + done) // PAGE])
        part = min(size - done, PAGE - at % PAGE)
        if runs and runs[-1][0] + runs[-1][1] == at:
            gpa, before, offset = runs[-1]
            runs[-1] = (gpa, before + part, offset)
        else:
            runs.append((at, part, done))
        done += part
    return tuple(runs)


def for_objects(log: NDArray[np.int64], split: Mapping[int, Runs]) -> NDArray[np.int64]:
    """The log with a row for each run, so that each is looked for in the objects; the index says what is one record."""
    parts: list[NDArray[np.int64]] = []
    done = 0
    for row, runs in _rows(log, split):
        told = np.repeat(log[row : row + 1], len(runs), axis=0)
        told[:, EXIT_GPA] = [gpa for gpa, _, _ in runs]
        told[:, EXIT_RECORD] = (told[:, EXIT_RECORD] & ~0xFFFF) | [size for _, size, _ in runs]
        parts += [log[done:row], told]
        done = row + 1
    return np.concatenate([*parts, log[done:]])


def in_log(log: NDArray[np.int64], split: Mapping[int, Runs]) -> tuple[Scattered, NDArray[np.int64]]:
    """(the scattered among the rows of a log, the log as ``results.split_log`` wants it).

    That takes the bytes of an exit's page from the beginning of the record: it is given one from which the run of the
    exit is in its place.
    """
    found = list(_rows(log, split))
    if not found:
        return NONE, log
    log = log.copy()
    rows: list[tuple[int, int, int]] = []
    for row, runs in found:
        at = int(log[row, EXIT_AT])
        gpa, _, offset = next((run for run in runs if run[0] <= at < run[0] + run[1]), runs[0])
        log[row, EXIT_GPA] = gpa - offset
        rows += [(row, gpa, size) for gpa, size, _ in runs]
    at_rows, gpas, sizes = zip(*rows, strict=True)
    return (
        Scattered(np.array(at_rows, dtype=np.int64), np.array(gpas, dtype=np.uint64), np.array(sizes, dtype=np.uint16)),
        log,
    )


def _rows(log: NDArray[np.int64], split: Mapping[int, Runs]) -> list[tuple[int, Runs]]:
    if not split:
        return []
    known = np.isin(log[:, EXIT_INDEX], np.fromiter(split, dtype=np.int64))
    return [(row, split[int(log[row, EXIT_INDEX])]) for row in np.flatnonzero(known).tolist()]
