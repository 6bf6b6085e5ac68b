"""Records that the fast path serves: how far a run of them goes on without anything else to be done.

This is where a trace spends its time. Records are packed, two words each, or columns: addresses and sizes as a body has
them, of accesses that are alike in all else, 9 bytes a record instead of 16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.jit import kernel, stands_alone
from engine.kvm import state_frame as reg
from engine.trace.lanes import LANES, some_columns, some_words, whole_columns, whole_words
from engine.trace.served import GUARDED, miss, refuses

ONE = np.uint64(1)
BLOCK = np.uint64(LANES)

# Word 1 without the instruction length; nothing but a report to user space depends on that.
BUT_LENGTH = ~(acc.RECORD_LENGTH_MASK << acc.RECORD_LENGTH_SHIFT)
WHOLE = -1


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
def more_of(words, i, above, seen):
    """Bytes beyond the first of a packed record; no number of bytes unless its word 1 is ``above`` but for the size."""
    return ((words[(i << ONE) | ONE] & seen) ^ above) - 1


@kernel
def one_served(cache, gpa, more, minding):
    """Whether a record is served."""
    missed = miss(cache, gpa, more)
    return missed == 0 or (missed == GUARDED and refuses(cache, gpa, more) & minding == 0)


@kernel
def skim_columns(cache, gpas, sizes, start, minding):
    """Serve columns up to the first that is not served; returns (position, guarded).

    ``minding`` is -1 for writes, to which the maps of sub-pages matter, and 0 for others; ``guarded`` counts accesses
    to pages with a sub-page that may not be written. Such pages come in runs, and so do others.
    """
    count = np.uint64(gpas.shape[0])
    guarded = found = 0
    i = np.uint64(start)
    begun = i < count and one_served(cache, gpas[i], np.int64(sizes[i]) - 1, minding)
    while begun and i + BLOCK <= count:
        if found == 0 and whole_columns(cache, gpas, sizes, i):
            i += BLOCK
            continue
        served, found = some_columns(cache, gpas, sizes, i, minding)
        guarded += found
        i += np.uint64(served)
        if served < LANES:
            return np.int64(i), guarded
    while i < count and one_served(cache, gpas[i], np.int64(sizes[i]) - 1, minding):
        guarded += miss(cache, gpas[i], np.int64(sizes[i]) - 1) != 0
        i += ONE
    return np.int64(i), guarded


@kernel
def skim_words(cache, words, start, above, seen, minding):
    """The same for packed records, up to the first whose word 1 is not ``above`` but for the size, of the bits
    ``seen``."""
    count = np.uint64(words.shape[0] >> 1)
    guarded = found = 0
    i = np.uint64(start)
    begun = i < count and one_served(cache, words[i << ONE], more_of(words, i, above, seen), minding)
    while begun and i + BLOCK <= count:
        if found == 0 and whole_words(cache, words, i, above, seen):
            i += BLOCK
            continue
        served, found = some_words(cache, words, i, above, seen, minding)
        guarded += found
        i += np.uint64(served)
        if served < LANES:
            return np.int64(i), guarded
    while i < count and one_served(cache, words[i << ONE], more_of(words, i, above, seen), minding):
        guarded += miss(cache, words[i << ONE], more_of(words, i, above, seen)) != 0
        i += ONE
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
        stop, guarded = skim_words(cache, words, i, head << 16, seen, minding)
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
