"""How many accesses touch ranges: places in order, their counts added up, and the ranges looked up among them.

A place is found by where it begins. Those that begin in a range touch it; of those that begin before it, as far as any
place reaches, each is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.footprint.intervals import Intervals, Numbers
from engine.jit import kernel

NEVER = int(np.iinfo(np.int64).max)  # rank of what does not happen
BLOCK = 64  # ranks of which the least is kept
_BLOCK_SHIFT = 6
LOTS = 256  # that are looked up at one time

# Places of one table extend so far at most; of how many are looked at before a range goes with it.
EXTENTS = (1, 8, 64, 1024, 1 << 17)


class Line(NamedTuple):
    """Spans in order of ``low``: int64[n] ``low`` and ``high``, both of the span, ``total`` int64[n + 1] counts before
    each, ``rank`` int64[n] of the first access and ``blocks`` the least of each BLOCK of them, or both empty, ``reach``
    how far a span extends at most."""

    low: Numbers
    high: Numbers
    total: Numbers
    rank: Numbers
    blocks: Numbers
    reach: int


@kernel
def position_of(low: Any, value: Any) -> Any:
    """How many spans begin before ``value``."""
    begin = 0
    end = low.shape[0]
    while begin < end:
        middle = (begin + end) >> 1
        if low[middle] < value:
            begin = middle + 1
        else:
            end = middle
    return begin


@kernel
def least(line: Any, begin: Any, end: Any) -> Any:
    """The least rank of the spans from ``begin`` to before ``end``."""
    found = NEVER
    at = begin
    while at < end:
        if at & (BLOCK - 1) == 0 and at + BLOCK <= end:
            found = min(found, line.blocks[at >> _BLOCK_SHIFT])
            at += BLOCK
        else:
            found = min(found, line.rank[at])
            at += 1
    return found


@kernel
def count_touching(line: Any, first: Any, last: Any, offsets: Any, counts: Any, ranks: Any) -> None:
    """Add to ``counts`` how many accesses touch the ranges of each lot, each once, and bring ``ranks`` down to the
    first of them; int64[lots] both. ``first``, ``last`` and ``offsets`` are ``Intervals``."""
    for lot in range(offsets.shape[0] - 1):
        before = np.int64(-1)  # where the range before ends
        for number in range(offsets[lot], offsets[lot + 1]):
            begin = position_of(line.low, first[number])
            end = position_of(line.low, last[number] + 1)
            counts[lot] += line.total[end] - line.total[begin]
            if line.rank.shape[0]:
                ranks[lot] = min(ranks[lot], least(line, begin, end))
            furthest = max(before + 1, first[number] - line.reach)
            at = begin - 1
            while at >= 0 and line.low[at] >= furthest:
                if line.high[at] >= first[number]:
                    counts[lot] += line.total[at + 1] - line.total[at]
                    if line.rank.shape[0]:
                        ranks[lot] = min(ranks[lot], line.rank[at])
                at -= 1
            before = last[number]


class Lines:
    """Places of a footprint in tables by how far they extend, so that a few long ones do not slow all the others."""

    def __init__(
        self, taken: NDArray[np.bool_], low: Numbers, extent: Numbers, count: Numbers, rank: Numbers | None
    ) -> None:
        """Of places that begin at ``low``, which ascends, those that are ``taken``; without ``rank`` first accesses are
        not known."""
        self._lines: list[Line] = []
        beyond = 0
        for most in EXTENTS:
            some = (extent > beyond) & (extent <= most)
            some &= taken
            beyond = most
            if some.any():
                ranks = None if rank is None else rank[some]
                self._lines.append(_line(low[some], extent[some], count[some], ranks))

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        arrays = (array for line in self._lines for array in (line.low, line.high, line.total, line.rank, line.blocks))
        return sum(array.nbytes for array in arrays)

    def touching(self, intervals: Intervals, check: Callable[[], None] = lambda: None) -> tuple[Numbers, Numbers]:
        """(counts, ranks) of the accesses that touch the ranges of each lot; NEVER for the rank of none. ``check`` is
        called every moment: a lot may have to look at every place."""
        lots = len(intervals.offsets) - 1
        counts, ranks = np.zeros(lots, dtype=np.int64), np.full(lots, NEVER, dtype=np.int64)
        for line in self._lines:
            for begin in range(0, lots, LOTS):
                check()
                part = slice(begin, min(begin + LOTS, lots))
                offsets = intervals.offsets[begin : part.stop + 1]
                count_touching(line, intervals.first, intervals.last, offsets, counts[part], ranks[part])
        return counts, ranks


def _line(low: Numbers, extent: Numbers, count: Numbers, rank: Numbers | None) -> Line:
    """``extent`` becomes the ends: there may be millions of places."""
    reach = int(extent.max()) - 1
    extent += low
    extent -= 1
    total = np.zeros(len(low) + 1, dtype=np.int64)
    np.cumsum(count, out=total[1:])
    if rank is None:
        nothing: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        return Line(low, extent, total, nothing, nothing, reach)
    blocks = np.minimum.reduceat(rank, np.arange(0, len(rank), BLOCK))
    return Line(low, extent, total, rank, blocks, reach)
