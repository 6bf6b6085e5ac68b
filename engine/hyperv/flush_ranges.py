"""What the words of a flush list cover, as rows of first and last page for ``cpu.tlb_select``.

A page is an address >> 12: for linear addresses of 64-bit words read as signed, so that the upper half is negative and
the canonical pages, whatever their width, are one run around 0. Pages that are not canonical are in no row: the
specification ignores addresses beyond the GVA space, and INVVPID of one fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch import hypercall as hv
from engine.arch.paging import LINEAR_48, canonical
from engine.arch.words import signed

Ranges = NDArray[np.int64]


def none() -> Ranges:
    """No range."""
    return np.zeros((0, 2), dtype=np.int64)


def simple(words: Sequence[int], width: int) -> Ranges:
    """Simple ranges: bits 11:0 count the additional pages. ``width`` is that of linear addresses."""
    return _linear([_counted(word) for word in words], width)


@dataclass(frozen=True)
class KvmLists:
    """How KVM reads the words of a list: as simple ranges whose pages follow each other modulo 2^64.

    ``width`` is the host's. ``by_page``: each page is looked at by itself (Linux 7.0, a5264387c2ee); before, a range
    went by its first address alone (fa787ac07b3c).
    """

    width: int = LINEAR_48
    by_page: bool = True

    def reads(self, word: int) -> bool:
        """Whether a word is a flush at all, and one that the statistic counts."""
        return self.by_page or canonical(word, self.width)

    def covered(self, words: Sequence[int]) -> Ranges:
        """What is flushed of the ranges."""
        return _linear([_counted(word) for word in words if self.reads(word)], self.width, wraps=True)


def extended(words: Sequence[int], width: int) -> Ranges:
    """Extended ranges: bits 10:0 count additional pages, small or, with bit 11, of 2 MiB or 1 GiB."""
    return _linear([_sized(word) for word in words], width)


def guest_physical(words: Sequence[int]) -> Ranges:
    """Ranges of second-level flushes, which are always extended."""
    rows = [(word >> 12, (word >> 12) + pages - 1) for word, pages in (_sized(word) for word in words)]
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _counted(word: int) -> tuple[int, int]:
    return word, (word & hv.SIMPLE_COUNT) + 1


def _sized(word: int) -> tuple[int, int]:
    """(first byte, number of 4-KiB pages). The base of a 1-GiB page that is no multiple of it is taken as it is."""
    count = (word & hv.EXTENDED_COUNT) + 1
    if not word & hv.RANGE_LARGE:
        return word, count
    bits = hv.HUGE_BITS if word & hv.RANGE_1G else hv.LARGE_BITS
    return word & ~((1 << hv.LARGE_BITS) - 1), count << (bits - 12)


def _linear(parts: Sequence[tuple[int, int]], width: int, *, wraps: bool = False) -> Ranges:
    """``wraps``: page 0 follows the last page of the address space; otherwise nothing does."""
    rows = []
    highest = (1 << (width - 13)) - 1
    for word, pages in parts:
        first = signed(word) >> 12
        last = first + pages - 1
        if first < 0 and not wraps:
            last = min(last, -1)
        first, last = max(first, ~highest), min(last, highest)
        if first <= last:
            rows.append((first, last))
    return np.array(rows, dtype=np.int64).reshape(-1, 2)
