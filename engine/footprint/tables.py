"""The tables in which places are counted, with room for more of them when there is need."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.arch.words import signed
from engine.errors import LimitExceeded
from engine.footprint import kernels, ordering
from engine.trace.readers.budget import Budget

FIRST_ROWS = 1 << 12
FIRST_PLOTS = 1 << 10
LEAST_FILLED = 3
PLACES = "the places of a footprint"

# Odd multipliers of the hash: any will do for places that nobody chose to collide.
MIX = (0x9E37_79B9_7F4A_7C15, 0xC2B2_AE3D_27D4_EB4F)


class Table:
    """A hash table of ``kernels`` that grows by being moved to one of twice the rows. At most 5 of 8 rows are used."""

    def __init__(
        self, most: int, what: str, mix: tuple[int, int] = MIX, fine: int = 0, budget: Budget | None = None
    ) -> None:
        self._budget = budget or Budget(1 << 62)
        self._most = most
        self._fine = fine
        self._what = what
        self._odd = [np.int64(signed(word | 1)) for word in mix]
        self.used = np.zeros(1, dtype=np.int64)
        self._make(FIRST_ROWS)

    def _make(self, rows: int) -> None:
        self._budget.keep(rows * kernels.ROW_WORDS * 8, f"the {self._what} of a footprint")
        self.words: NDArray[np.int64] = np.zeros(rows * kernels.ROW_WORDS, dtype=np.int64)
        bits = rows.bit_length() - 1
        odd0, odd1 = self._odd
        self.mix = odd0, odd1, 64 - bits + kernels.BLOCK_BITS, self._fine
        self.limit = min(rows * 5 // 8, self._most)

    def grow(self) -> None:
        """Make room. Raises LimitExceeded, and what the budget does."""
        if self.limit == self._most:
            raise too_many(self._most, self._what)
        smaller = self.words
        self._make(2 * len(smaller) // kernels.ROW_WORDS)
        kernels.move_rows(smaller, self.words, self.mix)
        self._budget.keep(-smaller.nbytes, "")

    def rows(self) -> NDArray[np.int64]:
        """int64[n, ROW_WORDS] of those in use, in no order."""
        rows: NDArray[np.int64] = self.words.reshape(-1, kernels.ROW_WORDS)
        return np.compress(rows[:, 2] != 0, rows, axis=0)


class Fields:
    """The plots of ``kernels``, which are made room for twice as many at a time.

    Where fewer than LEAST_FILLED cells of a plot have a place, no more are made: places are so far apart that the table
    takes less.
    """

    def __init__(self, mix: tuple[int, int], near: int, budget: Budget | None = None, *, closed: bool = False) -> None:
        """``closed`` for none at all."""
        self._budget = budget or Budget(1 << 62)
        self._near = near
        self._odd = np.int64(signed(mix[0] | 1))
        self._used = np.zeros(2, dtype=np.int64)
        self._open = np.full(1, 0 if closed else 1, dtype=np.int64)
        self._keys = np.zeros(0, dtype=np.int64)
        self._counts = self._firsts = np.zeros(0, dtype=np.uint32)
        self._kept = 0
        self.plots: kernels.Plots
        self._make(1 if closed else FIRST_PLOTS)

    def _make(self, count: int) -> None:
        """Room for so many, with those that there are."""
        rows, some = 4 * count, int(self._used[0])
        size = 8 * count + 8 * count * kernels.PLOT_PLACES + 16 * rows
        self._budget.keep(size, PLACES)
        # New arrays have large pages of memory, which ones that grow have not: a third of the time.
        keys = np.zeros(count, dtype=np.int64)
        counts, firsts = (np.zeros(count * kernels.PLOT_PLACES, dtype=np.uint32) for _ in range(2))
        keys[:some] = self._keys[:some]
        for new, old in ((counts, self._counts), (firsts, self._firsts)):
            new[: some * kernels.PLOT_PLACES] = old[: some * kernels.PLOT_PLACES]
        index = np.full(2 * rows, kernels.NO_KEY, dtype=np.int64)
        self._keys, self._counts, self._firsts = keys, counts, firsts
        mix = self._odd, np.uint64(64 - (rows.bit_length() - 1)), self._near
        self.plots = kernels.Plots(index, keys, counts, firsts, self._used, mix, self._open)
        kernels.index_plots(self.plots)
        self._budget.keep(-self._kept, PLACES)
        self._kept = size

    @property
    def nbytes(self) -> int:
        """Memory of the plots."""
        return self._kept

    @property
    def places(self) -> int:
        """How many there are in them."""
        return int(self._used[1])

    def grow(self) -> None:
        """Make room, if that is worth it. Raises what the budget does."""
        if self.places < LEAST_FILLED * len(self._keys):
            self._open[0] = 0
        else:
            self._make(2 * len(self._keys))

    def columns(self, since: int, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Their places, counted since that record, and ``rows`` of the table, all of them in order."""
        keys = self._keys[: int(self._used[0])]
        order = np.argsort(keys)
        kind = keys[order] >> kernels.PLOT_SHIFTS
        ends = np.append(np.flatnonzero(np.diff(kind)) + 1, len(keys))
        count = self.places + len(rows)
        kinds = {"begin": np.int64, "extent": np.int64, "what": np.uint8, "count": np.int64, "first": np.int64}
        found: dict[str, NDArray[Any]] = {name: np.empty(count, dtype=kind) for name, kind in kinds.items()}
        runs = np.zeros((len(ends), ordering.RUN_WORDS), dtype=np.int64)
        ordering.merged(self.plots, since, order, ends, runs, rows, *found.values())
        return {**found, "begin": found["begin"].view(np.uint64), "trace": np.zeros(count, dtype=np.int32)}


def too_many(most: int, what: str) -> LimitExceeded:
    """The refusal of more than a footprint has."""
    return LimitExceeded(f"a footprint has at most {most} {what}", field=what, value=most + 1)
