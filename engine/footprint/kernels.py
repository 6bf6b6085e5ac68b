"""Counting the places of a trace: one look-up for each record, and no allocation.

Most places are of neighbours: stores of one size, one behind the other. Thirty-two such places, of one size and one
kind, are a *plot* (``Plots``): one key for all of them, and cells that are found by the address alone. What lies askew
(sizes that are no power of two, addresses that are no multiple of the size, runs of several sub-pages) is in a hash
table.

A table is int64[4 * rows], four words a row, as many rows as a power of two: two words of the key, how often (0 for an
empty row), and the index of the first record. Keys are multiplied by odd numbers of the caller's choice, so that
nobody who does not know them can make a trace whose places collide.
"""

from typing import Any, NamedTuple

import numpy as np

from engine.arch import access as acc
from engine.arch.sppt import SUBPAGE_SHIFT
from engine.jit import kernel, stands_alone
from engine.trace.record_checks import BAD_ADDRESS, DONE, describe, refusal_of_place, refusal_of_word

ROW_WORDS = 4
BLOCK_BITS = 3
BLOCK_ROWS = 1 << BLOCK_BITS
# Beside DONE and what is wrong with a record: a larger table, or more plots; and of a plot that it is not made.
NEED_ROOM = 1
NEED_PLOTS = 2
NO_PLOT = 3

# A plot: cells, each of a count and the index of the first record; of 32 bits, which are in half the cache lines.
PLOT_BITS = 5
PLOT_PLACES = 1 << PLOT_BITS
MOST_RECORDS = (1 << 32) - 1  # that are counted in plots
# Its key: the number of the plot, by how much places are shifted in bits 50:48, ``what_of`` above.
PLOT_SHIFTS = 48
PLOT_WHAT = 51
NO_KEY = -1 << 62  # nor is it any place, be its address valid or not
LARGEST_SHIFT = 4  # of sizes in plots
LARGEST = 1 << LARGEST_SHIFT
LAST_OF_SUBPAGE = (1 << SUBPAGE_SHIFT) - 1

# What an access is, as far as a decision depends on it: access in bits 1:0, then
KIND_SHIFT = 2  # 3 bits
SOURCE_SHIFT = 5  # 2 bits
UNTRANSLATED = 1 << 7  # a paging read without a linear address: it never counts as a write

# Word 1 of a place: how many sub-pages or bytes in bits 15:0, then
WHAT_SHIFT = 16
CONTEXT_SHIFT = 24  # number of its bucket and pc

# Word 1 of a record without the vCPU and the length of the instruction: nothing here depends on them.
BUT_VCPU = ~(0xFFFF << 32)
BUT_VCPU_AND_LENGTH = BUT_VCPU & ~(acc.RECORD_LENGTH_MASK << acc.RECORD_LENGTH_SHIFT)

ADDRESS_BITS = 52
ONE, TWO, THREE = np.uint64(1), np.uint64(2), np.uint64(3)
ONCE = np.uint32(1)


class Plots(NamedTuple):
    """The plots so far. ``index`` int64[2n] a hash table of keys and first cells, NO_KEY where there is none, n a power
    of two; ``keys`` int64[m] by position, and uint32[m * PLOT_PLACES] of their cells ``counts`` and ``firsts``, apart
    because counts alone are looked at again and again; ``used`` int64[2] how many plots there are, and how many cells
    with a place; ``mix`` an odd multiplier, by how many bits its product is shifted down, and how many low bits of keys
    it leaves alone, so that neighbours lie in one block; ``open`` int64[1], 0 where no more are to be made: then the
    table takes their places."""

    index: Any
    keys: Any
    counts: Any
    firsts: Any
    used: Any
    mix: Any
    open: Any


@kernel
def what_of(word):
    """What the access of a record is (word 1), in 8 bits."""
    how = describe(word)
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    source = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK
    what = how & acc.ACCESS_MASK | kind << KIND_SHIFT | source << SOURCE_SHIFT
    if kind == acc.PAGING_READ and not how >> acc.LINEAR_SHIFT & acc.LINEAR_VALID:
        what |= UNTRANSLATED
    return what


@kernel
def row_of(table, mix, word0, word1):
    """Offset of the row that has a key, or of the empty one where it would be.

    Neighbours of one kind, which traces access one after the other, lie in one block of rows. ``mix`` is two odd
    multipliers, by how many bits their product is shifted down, and how many low bits of ``word0`` neighbours share.
    """
    odd0, odd1, down, fine = mix
    near = word0 >> fine
    block = ((near >> BLOCK_BITS) * odd0 ^ word1 * odd1) >> down
    mask = np.uint64((table.shape[0] >> 2) - 1)
    row = np.uint64(block << BLOCK_BITS | near & BLOCK_ROWS - 1) & mask
    while True:
        at = row << TWO
        if (table[at] ^ word0) | (table[at | ONE] ^ word1) == 0 or table[at | TWO] == 0:
            return at
        row = (row + ONE) & mask


@kernel
def home_of(key, mix):
    """The word of the index where a plot is looked for first."""
    odd, down, near = mix
    return (np.uint64((key >> near) * odd) >> down ^ np.uint64(key & (1 << near) - 1)) << ONE


@kernel
def row_beyond(index, key, row, mask):
    """The row from ``row`` on that has a key, or the empty one where it would be. The loops that need it call it, which
    is seldom, so that all that they need themselves is in registers."""
    stands_alone()
    while index[row] != key and index[row] != NO_KEY:
        row = (row + TWO) & mask
    return row


@kernel
def plot_of(plots, key):
    """(first cell, DONE) of the plot with a key, which is made if there is none; beside DONE, NEED_PLOTS where there is
    no room for it, NO_PLOT where no more are made."""
    index, used = plots.index, plots.used
    row = row_beyond(index, key, home_of(key, plots.mix), np.uint64(index.shape[0] - 1))
    if index[row] != key:
        if plots.open[0] == 0:
            return np.uint64(0), NO_PLOT
        if used[0] == plots.keys.shape[0]:
            return np.uint64(0), NEED_PLOTS
        plots.keys[used[0]] = key
        index[row] = key
        index[row + ONE] = used[0] << PLOT_BITS
        used[0] += 1
    return np.uint64(index[row + ONE]), DONE


@kernel
def shift_of(size):
    """By how much a size that is a power of two up to LARGEST shifts: 0 for 1. No loop, and no branch."""
    return (size >> 1) - (size >> 3) - (size >> 4 << 1)


@kernel
def count_row(table, mix, limit, used, begin, key, index):
    """Count one place in the table; whether it is full."""
    at = row_of(table, mix, begin, key)
    if table[at | TWO] == 0:
        if used[0] == limit:
            return True
        used[0] += 1
        table[at] = begin
        table[at | ONE] = key
        table[at | THREE] = index
    table[at | TWO] += 1
    return False


@kernel
def count_one(gpa, size, what, context, index, since, unit, plots, table, mix, limit, used):
    """Count one record, wherever its place is; returns DONE, NEED_ROOM, NEED_PLOTS, or BAD_ADDRESS for no place."""
    stands_alone()
    if refusal_of_place(gpa, size) != DONE:
        return BAD_ADDRESS
    begin = gpa >> unit
    extent = (gpa + size - 1 >> unit) - begin + 1
    shift = shift_of(extent) if extent <= LARGEST and unit == 0 else 0
    if extent == 1 << shift and begin & extent - 1 == 0 and context == 0:
        place = begin >> shift
        plot, status = plot_of(plots, place >> PLOT_BITS | shift << PLOT_SHIFTS | what << PLOT_WHAT)
        if status == DONE:
            cell = plot | np.uint64(place & PLOT_PLACES - 1)
            if plots.counts[cell] == 0:
                plots.firsts[cell] = np.uint32(index - since)
                plots.used[1] += 1
            plots.counts[cell] += ONCE
        if status != NO_PLOT:
            return status
    key = extent | what << WHAT_SHIFT | context << CONTEXT_SHIFT
    return NEED_ROOM if count_row(table, mix, limit, used, begin, key, index) else DONE


@kernel
def count_spans(words, start, now, seen, head, kind, index, counts, firsts, mix, filled):
    """Count records with ``head`` above the size in word 1 that are in cells, up to the first that is in none; returns
    its position. ``now`` is the index of the first record, from the one with which the plots began.

    One place is accessed many times in a row, which is added at its end: its cell would be waited for each time.
    Indices are unsigned: signed ones are looked at whether they count from the end. What is not for this loop is not in
    it, so that all that it needs is in registers. Together these are half of the time.
    """
    stands_alone()
    count = np.uint64(words.shape[0] >> 1)
    i, mask = np.uint64(start), np.uint64(index.shape[0] - 1)
    odd, down, _ = mix
    last, cell, begin = np.int64(NO_KEY), np.uint64(0), i
    while i < count:
        gpa = words[i << ONE]
        more = ((words[i << ONE | ONE] & seen) ^ head) - 1
        if ((gpa & LAST_OF_SUBPAGE) + more | more) >> SUBPAGE_SHIFT != 0:
            break
        place = gpa >> SUBPAGE_SHIFT
        if place != last:
            key = place >> PLOT_BITS | kind
            row = np.uint64(key * odd) >> down << ONE  # ``home_of``, near being 0
            if index[row] != key:
                row = row_beyond(index, key, row, mask)
                if index[row] != key:
                    break
            counts[cell] += np.uint32(i - begin)
            begin = i
            last = place
            cell = np.uint64(index[row + ONE] | place & PLOT_PLACES - 1)
            if counts[cell] == 0:
                firsts[cell] = np.uint32(now + np.int64(i))
                filled[1] += 1
        i += ONE
    counts[cell] += np.uint32(i - begin)
    return np.int64(i)


@kernel
def count_bytes(words, start, now, seen, head, kind, index, counts, firsts, mix, filled):
    """The same of bytes, of which most places are new or are in the plot of the one before."""
    stands_alone()
    count = np.uint64(words.shape[0] >> 1)
    i, mask = np.uint64(start), np.uint64(index.shape[0] - 1)
    last, plot = np.int64(NO_KEY), np.uint64(0)
    while i < count:
        gpa = words[i << ONE]
        size = (words[i << ONE | ONE] & seen) ^ head
        more = size - 1
        if ((size | gpa) & more) | (more >> LARGEST_SHIFT) | (gpa >> ADDRESS_BITS) != 0:
            break
        shift = shift_of(size)
        place = gpa >> shift
        key = place >> PLOT_BITS | shift << PLOT_SHIFTS | kind
        if key != last:
            row = home_of(key, mix)
            if index[row] != key:
                row = row_beyond(index, key, row, mask)
                if index[row] != key:
                    break
            plot = np.uint64(index[row + ONE])
            last = key
        cell = plot | np.uint64(place & PLOT_PLACES - 1)
        counted = counts[cell]
        counts[cell] = counted + ONCE
        if counted == 0:
            firsts[cell] = np.uint32(now + np.int64(i))
            filled[1] += 1
        i += ONE
    return np.int64(i)


@kernel
def count_together(words, start, base, since, seen, head, what, unit, plots, table, mix, limit, used):
    """Count records with ``head`` above the size in word 1, up to the first other; returns (position, status)."""
    count = words.shape[0] >> 1
    kind = what << PLOT_WHAT
    cells = plots.index, plots.counts, plots.firsts, plots.mix, plots.used
    i = start
    while i < count:
        if unit != 0:
            i = count_spans(words, i, base - since, seen, head, kind, *cells)
        else:
            i = count_bytes(words, i, base - since, seen, head, kind, *cells)
        if i == count:
            break
        size = (words[2 * i + 1] & seen) ^ head
        if size - 1 >> 16 != 0:
            break
        status = count_one(words[2 * i], size, what, 0, base + i, since, unit, plots, table, mix, limit, used)
        if status != DONE:
            return i, status
        i += 1
    return i, DONE


@kernel
def count_apart(words, contexts, start, base, since, seen, head, what, unit, plots, table, mix, limit, used):
    """The same of either level where places are apart by ``contexts`` too: numbers above 0."""
    stands_alone()
    for i in range(start, words.shape[0] >> 1):
        size = (words[2 * i + 1] & seen) ^ head
        if size - 1 >> 16 != 0:
            return i, DONE
        at, context = base + i, contexts[i]
        status = count_one(words[2 * i], size, what, context, at, since, unit, plots, table, mix, limit, used)
        if status != DONE:
            return i, status
    return words.shape[0] >> 1, DONE


@kernel
def count_places(words, contexts, start, base, since, kinds, unit, plots, table, mix, limit, used):
    """Count the places of ``words`` (int64[2n], two a record) from position ``start``; ``base`` is the index of the
    chunk's first record, ``since`` that of the first that is counted in the plots, ``kinds`` as in a chunk,
    ``contexts`` int64[n] numbers above 0 or empty, ``unit`` the level's shift.

    ``used`` int64[1] is how many rows of the table have a place, ``limit`` how many may. Returns (status, position):
    DONE, NEED_ROOM for a larger table, NEED_PLOTS for more of them, or what is wrong with the record there.
    """
    seen = BUT_VCPU_AND_LENGTH if kinds else BUT_VCPU
    count = words.shape[0] >> 1
    i = start
    while i < count:
        word = words[2 * i + 1]
        bad = refusal_of_word(word, kinds)
        if bad == DONE:
            bad = refusal_of_place(words[2 * i], word & 0xFFFF)
        if bad != DONE:
            return bad, i
        head = word & seen & ~0xFFFF
        what = what_of(word)
        if contexts.shape[0] != 0:
            i, status = count_apart(
                words, contexts, i, base, since, seen, head, what, unit, plots, table, mix, limit, used
            )
        else:
            i, status = count_together(words, i, base, since, seen, head, what, unit, plots, table, mix, limit, used)
        if status != DONE:
            return status, i
    return DONE, i


@kernel
def index_plots(plots):
    """Enter all plots into an empty index."""
    index = plots.index
    mask = np.uint64(index.shape[0] - 1)
    for position in range(plots.used[0]):
        key = plots.keys[position]
        row = row_beyond(index, key, home_of(key, plots.mix), mask)
        index[row] = key
        index[row + ONE] = position << PLOT_BITS


@kernel
def number_contexts(pcs, buckets, start, numbers, table, mix, limit, used):
    """Give each pair of a pc and a bucket (int64[n] both) a number, from 1 in order of appearance; returns how far."""
    for i in range(start, numbers.shape[0]):
        at = row_of(table, mix, pcs[i], buckets[i])
        if table[at | TWO] == 0:
            if used[0] == limit:
                return i
            used[0] += 1
            table[at] = pcs[i]
            table[at | ONE] = buckets[i]
            table[at | TWO] = used[0]
        numbers[i] = table[at | TWO]
    return numbers.shape[0]


@kernel
def move_rows(table, larger, mix):
    """Copy the rows of a table to a larger one; ``mix`` is that of the larger."""
    for old in range(0, table.shape[0], ROW_WORDS):
        if table[old + 2] != 0:
            new = row_of(larger, mix, table[old], table[old + 1])
            for word in range(ROW_WORDS):
                larger[new | np.uint64(word)] = table[old + word]
