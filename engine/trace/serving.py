"""Records that the fast path serves: how far a run of them goes on without anything else to be done.

This is where a trace spends its time. Records are packed, two words each, or columns: addresses and sizes as a body has
them, of accesses that are alike in all else, 9 bytes a record instead of 16. What is said of a record is one rule:
``miss`` is 0 where its page is in the fast path whole, and GUARDED where its sub-pages decide.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.cpu import fastpath
from engine.jit import kernel, stands_alone
from engine.kvm import state_frame as reg

ONE = np.uint64(1)
CACHE_MASK = np.uint64(fastpath.CACHE_MASK)
PAGES = np.uint64(fastpath.PAGES)
GUARDED = np.int64(fastpath.GUARDED)
GUARDED_BIT = 62

# Word 1 without the instruction length; nothing but a report to user space depends on that.
BUT_LENGTH = ~(acc.RECORD_LENGTH_MASK << acc.RECORD_LENGTH_SHIFT)
WHOLE = -1

# Records between two looks at whether there are guarded pages at all.
BLOCK = np.uint64(32)


class Run(NamedTuple):
    """Records as kernels take them, in one of two forms; the arrays of the other are empty.

    ``words`` int64[2n], two a record; or ``gpas`` int64[n] and ``sizes`` uint8[n], of records whose word 1 is ``above``
    but for the size.
    """

    words: NDArray[np.int64]
    gpas: NDArray[np.int64]
    sizes: NDArray[np.uint8]
    above: np.int64

    @property
    def length(self) -> int:
        return max(len(self.words) // 2, len(self.gpas))

    def upto(self, end: int) -> Run:
        """Those before position ``end``."""
        return Run(self.words[: 2 * end], self.gpas[:end], self.sizes[:end], self.above)

    def at(self, position: int) -> tuple[int, int]:
        """The two words of a record."""
        if len(self.gpas):
            return int(self.gpas[position]), int(self.above) | int(self.sizes[position])
        return int(self.words[2 * position]), int(self.words[2 * position + 1])


@kernel
def count_of(run):
    """How many records."""
    return max(run.words.shape[0] >> 1, run.gpas.shape[0])


@kernel
def record_at(run, i):
    """The two words of a record."""
    if run.gpas.shape[0]:
        return run.gpas[i], run.above | np.int64(run.sizes[i])
    return run.words[2 * i], run.words[2 * i + 1]


@kernel
def served_head(positions, head):
    """Whether records with ``head`` above the size in word 1 are plain accesses of a known vCPU."""
    vcpu = head >> 16
    plain = head & 0xFFFF
    return 0 <= vcpu < positions.shape[0] and positions[vcpu] >= 0 and plain <= acc.EXECUTE


@kernel
def miss(cache, gpa, more):
    """What keeps an access of ``more`` bytes beyond its first from being served: 0 for nothing, GUARDED for sub-pages
    that may not be written.

    0 if ``more`` is from 0 to 65,535 and the tag is the GFN of the last byte; no GFN but that of the first byte can be
    in its place.
    """
    return (cache[np.uint64(gpa >> 12) & CACHE_MASK] ^ ((gpa + more) >> 12)) | (more >> 16)


@kernel
def refuses(cache, gpa, more):
    """What a write of ``more`` bytes beyond its first touches in a page in the fast path and may not; 0 for nothing."""
    last = ((gpa & 0xFFF) + more) >> 7 & 31  # that of one in two pages, or of none, is not looked at
    touched = (2 << last) - (1 << ((gpa >> 7) & 31))
    return touched & ~cache[PAGES | (np.uint64(gpa >> 12) & CACHE_MASK)]


@kernel
def skim(cache, words, start, above, seen, minding):
    """Serve packed records up to the first that is not served, or whose word 1 is not ``above`` but for the size, of
    the bits ``seen``; returns (position, guarded).

    ``minding`` is -1 for writes, to which the maps of sub-pages matter, and 0 for others; ``guarded`` counts writes to
    pages with a sub-page that may not be written.
    """
    count = np.uint64(words.shape[0] >> 1)
    guarded = np.int64(0)
    i = np.uint64(start)
    while i < count:
        gpa = words[i << ONE]
        more = ((words[(i << ONE) | ONE] & seen) ^ above) - 1
        missed = miss(cache, gpa, more)
        if missed != 0:
            if missed != GUARDED:
                break
            if minding:
                if refuses(cache, gpa, more) != 0:
                    break
                guarded += 1
        i += ONE
    return np.int64(i), guarded


@kernel
def skim_column_blocks(cache, gpas, sizes, start):
    """Pass over columns by whole blocks, without a branch a record, up to one with anything but whole pages."""
    count = np.uint64(gpas.shape[0])
    i = start
    while i + BLOCK <= count:
        missed = np.int64(0)
        for j in range(BLOCK):
            at = i + np.uint64(j)
            missed |= miss(cache, gpas[at], np.int64(sizes[at]) - 1)
        if missed != 0:
            break
        i += BLOCK
    return i


@kernel
def skim_some_columns(cache, gpas, sizes, start, end, minding):
    """Serve columns up to position ``end`` at most; returns (position, guarded), of any access to guarded pages.

    One branch for a record of either sort of page.
    """
    guarded = np.int64(0)
    i = start
    while i < end:
        gpa, more = gpas[i], np.int64(sizes[i]) - 1
        missed = miss(cache, gpa, more)
        if missed & ~GUARDED | refuses(cache, gpa, more) & minding:
            break
        guarded += missed >> GUARDED_BIT
        i += ONE
    return i, guarded


@kernel
def skim_columns(cache, gpas, sizes, start, minding):
    """``skim`` for columns; guarded pages come in runs, and so do others."""
    count = np.uint64(gpas.shape[0])
    guarded = np.int64(0)
    i = np.uint64(start)
    while i < count:
        end = min(i + BLOCK, count)
        i, found = skim_some_columns(cache, gpas, sizes, i, end, minding)
        guarded += found
        if i < end:
            break
        if found == 0:
            i = skim_column_blocks(cache, gpas, sizes, i)
    return np.int64(i), guarded


@kernel
def serve_columns(cache, positions, run, start, seen, tally):
    """``serve`` for columns."""
    stands_alone()
    head = (run.above & seen) >> 16
    if not served_head(positions, head):
        return start
    minding = np.int64(-1) if head & 0xFFFF == acc.WRITE else np.int64(0)
    stop, guarded = skim_columns(cache, run.gpas, run.sizes, start, minding)
    tally[reg.PAGE_GRANULAR] += guarded & minding
    tally[reg.WRITES] += (stop - start) & minding
    return stop


@kernel
def serve_words(cache, positions, words, start, seen, tally):
    """``serve`` for packed records: who accesses how is checked once for each run in which it stays the same."""
    stands_alone()
    count = words.shape[0] >> 1
    i = start
    while i < count:
        head = (words[2 * i + 1] & seen) >> 16
        if not served_head(positions, head):
            break
        minding = np.int64(-1) if head & 0xFFFF == acc.WRITE else np.int64(0)
        stop, guarded = skim(cache, words, i, head << 16, seen, minding)
        tally[reg.PAGE_GRANULAR] += guarded & minding
        tally[reg.WRITES] += (stop - i) & minding
        if stop == i or (stop < count and (words[2 * stop + 1] & seen) >> 16 == head):
            return stop
        i = stop
    return i


@kernel
def serve(cache, positions, run, start, seen, tally):
    """Serve records from the fast path up to the first that it cannot; returns its position.

    ``seen`` are the bits of word 1 that count.
    """
    if run.gpas.shape[0]:
        return serve_columns(cache, positions, run, start, seen, tally)
    return serve_words(cache, positions, run.words, start, seen, tally)
