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
        total: Numbers = np.append(0, np.cumsum(self.last - self.first + 1))
        return np.diff(total[self.offsets])


def united(lot: Numbers, first: Numbers, last: Numbers, lots: int) -> Intervals:
    """Ranges in any order, of the lots that they say (from 0 to ``lots``), as Intervals."""
    order = np.lexsort((first, lot))
    lot, first, last = lot[order], first[order], last[order]
    # The furthest end so far, lot by lot: one running maximum over the places of ends in order, lifted by the lot.
    ends, place = np.unique(last, return_inverse=True)
    lift = lot * len(ends)
    reached = ends[np.maximum.accumulate(place + lift) - lift] if len(lot) else last
    begins = np.ones(len(lot), dtype=np.bool_)
    begins[1:] = (lot[1:] != lot[:-1]) | (first[1:] > reached[:-1] + 1)
    at = np.flatnonzero(begins)
    closing = np.append(at[1:], len(lot)) - 1 if len(at) else at
    offsets = np.searchsorted(lot[at], np.arange(lots + 1)).astype(np.int64)
    return Intervals(np.ascontiguousarray(first[at]), np.ascontiguousarray(reached[closing]), offsets)


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
