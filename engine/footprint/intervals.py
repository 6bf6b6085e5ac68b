"""Ranges of sub-pages, pages or bytes: united, looked up, and many of them at once, each lot a question of its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class Intervals(NamedTuple):
    """Lots of ranges: ``first`` and ``last`` int64[m], both of the range, and ``offsets`` int64[n + 1]: lot i is from
    offsets[i] to before offsets[i + 1]. Those of a lot are in order, and neither overlap nor touch."""

    first: Numbers
    last: Numbers
    offsets: Numbers

    def lot(self, number: int) -> tuple[Numbers, Numbers]:
        """First and last of one lot."""
        part = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return self.first[part], self.last[part]

    @property
    def sizes(self) -> Numbers:
        """How much the ranges of each lot hold."""
        total = np.zeros(len(self.first) + 1, dtype=np.int64)
        np.cumsum(self.last - self.first + 1, out=total[1:])
        held: Numbers = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return held


def united(lot: Numbers, first: Numbers, last: Numbers, lots: int) -> Intervals:
    """Ranges in any order, of the lots that they say (from 0 to ``lots``), as Intervals."""
    if not len(lot):
        return Intervals(first, last, np.zeros(lots + 1, dtype=np.int64))
    order = np.lexsort((first, lot))
    lot, first, last = lot[order], first[order], last[order]
    reached = _furthest(lot, last, lots)
    begins = np.empty(len(lot), dtype=np.bool_)
    begins[0] = True
    np.greater(first[1:], reached[:-1] + 1, out=begins[1:])
    begins[1:] |= lot[1:] != lot[:-1]
    at = begins.nonzero()[0]
    closing = np.empty(len(at), dtype=np.int64)
    closing[:-1] = at[1:] - 1
    closing[-1] = len(lot) - 1
    return Intervals(first[at], reached[closing], lot[at].searchsorted(np.arange(lots + 1)))


def _furthest(lot: Numbers, last: Numbers, lots: int) -> Numbers:
    """The furthest end so far, lot by lot: one running maximum, lifted by the lot."""
    height = int(last.max()) + 1
    if lots * height >= 1 << 62:  # of bytes, where there are more than some thousand: lifted by their places instead
        ends, place = np.unique(last, return_inverse=True)
        lift = lot * len(ends)
        furthest: Numbers = ends[np.maximum.accumulate(place + lift) - lift]
        return furthest
    lift = lot * height
    reached = last + lift
    np.maximum.accumulate(reached, out=reached)
    reached -= lift
    return reached


def coarser(intervals: Intervals, shift: int) -> Intervals:
    """The larger units, of ``2 ** shift``, that the ranges of each lot touch."""
    lots = len(intervals.offsets) - 1
    lot = np.repeat(np.arange(lots), np.diff(intervals.offsets))
    return united(lot, intervals.first >> shift, intervals.last >> shift, lots)


def touched(ranges: tuple[Numbers, Numbers], first: Numbers, last: Numbers) -> NDArray[np.bool_]:
    """Whether each of the given spans touches one of the ranges of a lot."""
    begins, ends = ranges
    if not len(begins):
        return np.zeros(len(first), dtype=np.bool_)
    at = np.searchsorted(ends, first)
    return (at < len(begins)) & (begins[np.minimum(at, len(begins) - 1)] <= last)
