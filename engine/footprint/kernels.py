"""Counting the places of a trace: one look-up for each record, and no allocation.

Most places are of neighbours: stores of one size, one behind the other. Sixteen such places, of one size and one kind,
are a *plot* (``Plots``): one key for all of them, and cells that are found by the address alone. What lies askew (sizes
that are no power of two, addresses that are no multiple of the size, runs of several sub-pages) is in a hash table.

A table is int64[4 * rows], four words a row, as many rows as a power of two: two words of the key, how often (0 for an
empty row), and the index of the first record. Its key is multiplied by two odd numbers of the caller's choice, so that
nobody who does not know them can make a trace whose places collide.
"""

from typing import Any, NamedTuple

import numpy as np

from engine.arch import access as acc
from engine.jit import kernel, stands_alone
from engine.trace.record_checks import DONE, describe, refusal_of_place, refusal_of_word

ROW_WORDS = 4
BLOCK_BITS = 3
BLOCK_ROWS = 1 << BLOCK_BITS
# Beside DONE and what is wrong with a record: a larger table, or more plots; and of a plot that it is not made.
NEED_ROOM = 1
NEED_PLOTS = 2
NO_PLOT = 3

# A plot: sixteen cells, each of a count and the index of the first record.
PLOT_BITS = 4
PLOT_PLACES = 1 << PLOT_BITS
PLOT_WORDS = 2 * PLOT_PLACES
# Its key: by how much places are shifted in bits 2:0, ``what_of`` in bits 10:3, then the number of the plot.
PLOT_WHAT = 3
PLOT_NUMBER = 11
NO_KEY = -1
# Where a run of plots in order is: position among all, cell, and of the place there the beginning, and extent and what.
RUN_AT, RUN_CELL, RUN_BEGIN, RUN_REST, RUN_WORDS = range(5)
NO_MORE = 1 << 62
LARGEST_SHIFT = 4  # of sizes: 16 bytes

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
PLOT_SHIFT, FIRSTS = np.uint64(PLOT_BITS + 1), np.uint64(PLOT_PLACES)


class Plots(NamedTuple):
    """The plots so far. ``index`` int64[2n] a hash table of keys and positions, NO_KEY where there is none, n a power
    of two; ``keys`` int64[m] and ``cells`` int64[m * PLOT_WORDS] by position, counts before firsts; ``used`` int64[2]
    how many plots there are, and how many cells with a place; ``mix`` an odd multiplier, and by how many bits its
    product is shifted down; ``open`` int64[1], 0 where no more are to be made: then the table takes their places."""

    index: Any
    keys: Any
    cells: Any
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
def plot_of(plots, key):
    """(position, DONE) of the plot with a key, which is made if there is none; beside DONE, NEED_PLOTS where there is
    no room for it, NO_PLOT where no more are made."""
    odd, down = plots.mix
    index, used = plots.index, plots.used
    mask = np.uint64((index.shape[0] >> 1) - 1)
    at = np.uint64(key * odd >> down) & mask
    while True:
        known = index[at << ONE]
        if known == key:
            return np.uint64(index[at << ONE | ONE]), DONE
        if known == NO_KEY:
            if plots.open[0] == 0:
                return np.uint64(0), NO_PLOT
            if used[0] == plots.keys.shape[0]:
                return np.uint64(0), NEED_PLOTS
            position = np.uint64(used[0])
            plots.keys[position] = key
            index[at << ONE] = key
            index[at << ONE | ONE] = used[0]
            used[0] += 1
            return position, DONE
        at = (at + ONE) & mask


@kernel
def shift_of(size):
    """By how much a size up to 16 bytes, a power of two, shifts: 0 for 1."""
    shift = 0
    while size > 1:
        size >>= 1
        shift += 1
    return shift


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
def count_run(words, contexts, start, base, seen, head, what, unit, plots, table, mix, limit, used):
    """Count records with ``head`` above the size in word 1, up to the first other; returns (position, status).

    Indices are unsigned: signed ones are looked at whether they count from the end, which costs a third of the time.
    """
    stands_alone()
    count = np.uint64(words.shape[0] >> 1)
    i = np.uint64(start)
    cells, filled, index = plots.cells, plots.used, plots.index
    odd, down = plots.mix
    mask = np.uint64((index.shape[0] >> 1) - 1)
    plain = contexts.shape[0] == 0
    kind = what << PLOT_WHAT
    last_key = np.int64(NO_KEY)
    plot = np.uint64(0)
    status = DONE
    while i < count:
        gpa = words[i << ONE]
        more = ((words[i << ONE | ONE] & seen) ^ head) - 1
        if (more >> 16) | (gpa >> ADDRESS_BITS) != 0:
            break
        last = gpa + more
        if last >> ADDRESS_BITS != 0:
            break
        begin = gpa >> unit
        if unit != 0:
            shift = 0
            even = last >> unit == begin
        elif more == 7:
            shift = 3
            even = gpa & 7 == 0
        else:
            shift = shift_of(more + 1) if more < 1 << LARGEST_SHIFT else 0
            even = more == (1 << shift) - 1 and gpa & more == 0
        if even and plain:
            place = begin >> shift
            key = place >> PLOT_BITS << PLOT_NUMBER | kind | shift
            if key != last_key:
                at = np.uint64(key * odd >> down) & mask
                if index[at << ONE] == key:  # nearly always; the call takes longer
                    plot = np.uint64(index[at << ONE | ONE])
                    status = DONE
                else:
                    plot, status = plot_of(plots, key)
                    if status == NEED_PLOTS:
                        break
                last_key = key if status == DONE else np.int64(NO_KEY)
            if status == DONE:
                at = plot << PLOT_SHIFT | np.uint64(place & PLOT_PLACES - 1)
                before = cells[at]
                cells[at] = before + 1
                if before == 0:
                    cells[at | FIRSTS] = base + np.int64(i)
                    filled[1] += 1
                i += ONE
                continue
        key = ((last >> unit) - begin + 1) | what << WHAT_SHIFT
        if not plain:
            key |= contexts[i] << CONTEXT_SHIFT
        status = NEED_ROOM if count_row(table, mix, limit, used, begin, key, base + np.int64(i)) else DONE
        if status != DONE:
            break
        i += ONE
    return np.int64(i), status


@kernel
def count_places(words, contexts, start, base, kinds, unit, plots, table, mix, limit, used):
    """Count the places of ``words`` (int64[2n], two a record) from position ``start``; ``base`` is the index of the
    chunk's first record, ``kinds`` as in a chunk, ``contexts`` int64[n] numbers or empty, ``unit`` the level's shift.

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
        i, status = count_run(words, contexts, i, base, seen, head, what, unit, plots, table, mix, limit, used)
        if status != DONE:
            return status, i
    return DONE, i


@kernel
def index_plots(plots):
    """Enter all plots into an empty index."""
    odd, down = plots.mix
    index = plots.index
    mask = np.uint64((index.shape[0] >> 1) - 1)
    for position in range(plots.used[0]):
        key = plots.keys[position]
        at = np.uint64(key * odd >> down) & mask
        while index[at << ONE] != NO_KEY:
            at = (at + ONE) & mask
        index[at << ONE] = key
        index[at << ONE | ONE] = position


@kernel
def next_cell(plots, order, run, number):
    """Bring a run of plots to its next cell with a place, from the one that it is at: ``run`` int64[RUN_WORDS], see
    ``merged``. ``number`` is how many plots ``order`` has up to the end of the run."""
    at, cell = run[RUN_AT], run[RUN_CELL]
    while at < number:
        key = plots.keys[order[at]]
        base = order[at] * PLOT_WORDS
        while cell < PLOT_PLACES:
            if plots.cells[base + cell] != 0:
                shift = key & 7
                run[RUN_AT], run[RUN_CELL] = at, cell
                run[RUN_BEGIN] = (key >> PLOT_NUMBER << PLOT_BITS | cell) << shift
                run[RUN_REST] = 1 << shift + 8 | key >> PLOT_WHAT & 0xFF
                return
            cell += 1
        at += 1
        cell = 0
    run[RUN_AT] = at
    run[RUN_BEGIN] = NO_MORE


@kernel
def merged(plots, order, ends, runs, rows, begin, extent, what, count, first):
    """All places in order, as columns. ``order`` int64[plots] are positions of plots, of which each run up to one of
    ``ends`` is in order; ``runs`` int64[len(ends), RUN_WORDS] room for where they are; ``rows`` int64[n, ROW_WORDS]
    those of the table, in order."""
    for number in range(ends.shape[0]):
        run = runs[number]
        run[RUN_AT] = ends[number - 1] if number else 0
        run[RUN_CELL] = 0
        next_cell(plots, order, run, ends[number])
    row = 0
    for done in range(begin.shape[0]):
        least, low, rest = -1, np.int64(NO_MORE), np.int64(0)
        if row < rows.shape[0]:
            low = rows[row, 0]
            rest = (rows[row, 1] & 0xFFFF) << 8 | rows[row, 1] >> WHAT_SHIFT
        for number in range(ends.shape[0]):
            at = runs[number, RUN_BEGIN]
            if at < low or (at == low and runs[number, RUN_REST] < rest):
                least, low, rest = number, at, runs[number, RUN_REST]
        begin[done], extent[done], what[done] = low, rest >> 8, rest & 0xFF
        if least < 0:
            count[done], first[done] = rows[row, 2], rows[row, 3]
            row += 1
        else:
            run = runs[least]
            cell = order[run[RUN_AT]] * PLOT_WORDS + run[RUN_CELL]
            count[done], first[done] = plots.cells[cell], plots.cells[cell + PLOT_PLACES]
            run[RUN_CELL] += 1
            next_cell(plots, order, run, ends[least])


@kernel
def number_contexts(pcs, buckets, start, numbers, table, mix, limit, used):
    """Give each pair of a pc and a bucket (int64[n] both) a number, from 0 in order of appearance; returns how far."""
    for i in range(start, numbers.shape[0]):
        at = row_of(table, mix, pcs[i], buckets[i])
        if table[at | TWO] == 0:
            if used[0] == limit:
                return i
            used[0] += 1
            table[at] = pcs[i]
            table[at | ONE] = buckets[i]
            table[at | TWO] = used[0]
        numbers[i] = table[at | TWO] - 1
    return numbers.shape[0]


@kernel
def move_rows(table, larger, mix):
    """Copy the rows of a table to a larger one; ``mix`` is that of the larger."""
    for old in range(0, table.shape[0], ROW_WORDS):
        if table[old + 2] != 0:
            new = row_of(larger, mix, table[old], table[old + 1])
            for word in range(ROW_WORDS):
                larger[new | np.uint64(word)] = table[old + word]
