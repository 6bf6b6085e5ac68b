"""What the words of a flush list cover, as rows of first and last page for ``cpu.tlb_select``.

A page is an address >> 12: for linear addresses of 64-bit words read as signed, so that the upper half is negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.arch import hypercall as hv
from engine.arch.paging import canonical
from engine.arch.words import signed

Ranges = NDArray[np.int64]


def none() -> Ranges:
    """No range."""
    return np.zeros((0, 2), dtype=np.int64)


def simple(words: Sequence[int], width: int) -> Ranges:
    """Simple ranges: bits 11:0 count the additional pages. Those that begin outside linear addresses are left out."""
    return _linear([(word, (word & hv.SIMPLE_COUNT) + 1) for word in words], width)


def extended(words: Sequence[int], width: int) -> Ranges:
    """Extended ranges: bits 10:0 count additional pages, small or, with bit 11, of 2 MiB or 1 GiB."""
    return _linear([_sized(word) for word in words], width)


def guest_physical(words: Sequence[int]) -> Ranges:
    """Ranges of second-level flushes, which are always extended."""
    rows = [(word >> 12, (word >> 12) + pages - 1) for word, pages in (_sized(word) for word in words)]
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _sized(word: int) -> tuple[int, int]:
    """(first byte, number of 4-KiB pages). The base of a 1-GiB page that is no multiple of it is taken as it is."""
    count = (word & hv.EXTENDED_COUNT) + 1
    if not word & hv.RANGE_LARGE:
        return word, count
    bits = hv.HUGE_BITS if word & hv.RANGE_1G else hv.LARGE_BITS
    return word & ~((1 << hv.LARGE_BITS) - 1), count << (bits - 12)


def _linear(parts: Sequence[tuple[int, int]], width: int) -> Ranges:
    rows = []
    for word, pages in parts:
        if canonical(word, width):
            first = signed(word) >> 12
            last = first + pages - 1
            # nothing follows the last page of the address space
            rows.append((first, min(last, -1) if first < 0 else last))
    return np.array(rows, dtype=np.int64).reshape(-1, 2)
