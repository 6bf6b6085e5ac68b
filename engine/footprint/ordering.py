"""Places of plots and of a table brought in order: runs of plots that are in order each, merged."""

import numpy as np

from engine.footprint.kernels import PLOT_BITS, PLOT_PLACES, PLOT_SHIFTS, PLOT_WHAT, WHAT_SHIFT
from engine.jit import kernel

# Where a run of plots in order is: position among all, cell, and ``rank_of`` the place there.
RUN_AT, RUN_CELL, RUN_RANK, RUN_WORDS = range(4)
NO_MORE = (1 << 63) - 1
# A rank: ``what_of`` in bits 7:0, shift in 10:8, where it begins above.
RANK_SHIFTS = 8
RANK_BEGIN = 11


@kernel
def next_cell(plots, order, run, end):
    """Bring a run of plots to its next cell with a place, from the one that it is at: ``run`` int64[RUN_WORDS], see
    ``merged``. ``end`` is how many plots ``order`` has up to the end of the run."""
    at, cell = run[RUN_AT], run[RUN_CELL]
    while at < end:
        key = plots.keys[order[at]]
        base = order[at] << PLOT_BITS
        while cell < PLOT_PLACES:
            if plots.counts[base | cell] != 0:
                run[RUN_AT], run[RUN_CELL], run[RUN_RANK] = at, cell, rank_of(key, cell)
                return
            cell += 1
        at += 1
        cell = 0
    run[RUN_AT], run[RUN_RANK] = at, NO_MORE


@kernel
def rank_of(key, cell):
    """Of the place in a cell of the plot with a key: its beginning, shift and ``what_of``, in this order."""
    shift = key >> PLOT_SHIFTS & 7
    number = key & (1 << PLOT_SHIFTS) - 1
    return (number << PLOT_BITS | cell) << shift << RANK_BEGIN | shift << RANK_SHIFTS | key >> PLOT_WHAT


@kernel
def merged(plots, since, order, ends, runs, rows, begin, extent, what, count, first):
    """All places in order, as columns. ``order`` int64[plots] are positions of plots, of which each run up to one of
    ``ends`` is in order; ``runs`` int64[len(ends), RUN_WORDS] room for where they are; ``rows`` int64[n, ROW_WORDS]
    those of the table, in order; ``since`` what the first index of a cell is added to."""
    for number in range(ends.shape[0]):
        runs[number, RUN_AT] = ends[number - 1] if number else 0
        runs[number, RUN_CELL] = 0
        next_cell(plots, order, runs[number], ends[number])
    row = done = 0
    while done < begin.shape[0]:
        least, low, second = 0, np.int64(NO_MORE), np.int64(NO_MORE)
        for number in range(ends.shape[0]):
            rank = runs[number, RUN_RANK]
            if rank < low:
                least, low, second = number, rank, low
            else:
                second = min(second, rank)
        while row < rows.shape[0] and before(rows[row], low):
            begin[done], count[done], first[done] = rows[row, 0], rows[row, 2], rows[row, 3]
            extent[done], what[done] = rows[row, 1] & 0xFFFF, rows[row, 1] >> WHAT_SHIFT
            row += 1
            done += 1
        if low == NO_MORE:
            return
        stop = second  # the run goes on up to whatever comes in between
        if row < rows.shape[0]:
            stop = min(stop, rows[row, 0] << RANK_BEGIN)
        run, end = runs[least], ends[least]
        while True:
            cell = order[run[RUN_AT]] << PLOT_BITS | run[RUN_CELL]
            begin[done], what[done] = low >> RANK_BEGIN, low & 0xFF
            extent[done] = 1 << (low >> RANK_SHIFTS & 7)
            count[done], first[done] = plots.counts[cell], since + plots.firsts[cell]
            done += 1
            run[RUN_CELL] += 1
            next_cell(plots, order, run, end)
            low = run[RUN_RANK]
            if low >= stop:
                break


@kernel
def before(row, rank):
    """Whether the place of a row of the table comes before one of this rank."""
    begin = rank >> RANK_BEGIN
    extent, what = row[1] & 0xFFFF, row[1] >> WHAT_SHIFT
    return row[0] < begin or (
        row[0] == begin and (extent << 8 | what) < (1 << (rank >> RANK_SHIFTS & 7) + 8 | rank & 0xFF)
    )
