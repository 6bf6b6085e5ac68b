"""A footprint built from chunks of a trace, those that a replay takes. Memory is that of the distinct places."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.arch.words import signed
from engine.errors import InvalidValue, LimitExceeded, TraceError
from engine.footprint import kernels
from engine.footprint.places import BYTES, LEVELS, SPANS, UNITS, By, Footprint, Origin, made, ordered
from engine.state.config import choices
from engine.trace.addresses import frozen
from engine.trace.columns import TraceChunk
from engine.trace.readers.budget import Budget
from engine.trace.record_checks import DONE
from engine.trace.session import refused_record

FIRST_ROWS = 1 << 12
MAX_CONTEXTS = 1 << 32  # pairs of a bucket and a pc
MAX_PLACES = 1 << 30

FIRST_PLOTS = 1 << 10
LEAST_FILLED = 3
_PLACES = "the places of a footprint"

# Odd multipliers of the hash: any will do for places that nobody chose to collide.
# Stores are mostly of 8 bytes, one behind the other.
_FINE = {SPANS: 0, BYTES: 3}
MIX = (0x9E37_79B9_7F4A_7C15, 0xC2B2_AE3D_27D4_EB4F)

_STATE = (
    "a footprint has no address spaces and no operations between accesses: what they do depends on what was before. "
    "Replay the trace"
)


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

    Where fewer than LEAST_FILLED of all cells of a plot have a place, no more are made: places are so far apart that the
    table takes less.
    """

    def __init__(self, mix: tuple[int, int], budget: Budget | None = None) -> None:
        self._budget = budget or Budget(1 << 62)
        self._odd = np.int64(signed(mix[0] | 1))
        self._used = np.zeros(2, dtype=np.int64)
        self._open = np.ones(1, dtype=np.int64)
        self._keys = np.zeros(0, dtype=np.int64)
        self._counts = self._firsts = np.zeros(0, dtype=np.uint32)
        self._kept = 0
        self.plots: kernels.Plots
        self._make(FIRST_PLOTS)

    def _make(self, count: int) -> None:
        """Room for so many, with those that there are."""
        rows, some = 4 * count, int(self._used[0])
        size = 8 * count + 8 * count * kernels.PLOT_PLACES + 16 * rows
        self._budget.keep(size, _PLACES)
        # New arrays have large pages of memory, which ones that grow have not: a third of the time.
        keys = np.zeros(count, dtype=np.int64)
        counts, firsts = (np.zeros(count * kernels.PLOT_PLACES, dtype=np.uint32) for _ in range(2))
        keys[:some] = self._keys[:some]
        for new, old in ((counts, self._counts), (firsts, self._firsts)):
            new[: some * kernels.PLOT_PLACES] = old[: some * kernels.PLOT_PLACES]
        index = np.full(2 * rows, kernels.NO_KEY, dtype=np.int64)
        self._keys, self._counts, self._firsts = keys, counts, firsts
        mix = self._odd, np.uint64(64 - (rows.bit_length() - 1))
        self.plots = kernels.Plots(index, keys, counts, firsts, self._used, mix, self._open)
        kernels.index_plots(self.plots)
        self._budget.keep(-self._kept, _PLACES)
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
        runs = np.zeros((len(ends), kernels.RUN_WORDS), dtype=np.int64)
        kernels.merged(self.plots, since, order, ends, runs, rows, *found.values())
        return {**found, "begin": found["begin"].view(np.uint64), "trace": np.zeros(count, dtype=np.int32)}


class Builder:
    """Takes chunks and gives a footprint.

    ``level`` is one of LEVELS; ``by`` what places are apart by beside; ``most`` bounds the places, and ``budget`` the
    memory of the tables; ``mix`` is two numbers for the hash, which change nothing but who can slow it down. Other
    threads may read ``records_done``.
    """

    def __init__(
        self,
        level: str = SPANS,
        by: By | None = None,
        most: int = MAX_PLACES,
        mix: tuple[int, int] = MIX,
        budget: Budget | None = None,
    ) -> None:
        choices(level, LEVELS, "level")
        self._by = by or By()
        self._by.validate()
        if not 1 <= most <= MAX_PLACES:
            raise InvalidValue(f"must be from 1 to {MAX_PLACES}", field="most", value=most)
        self._level = level
        self._places = Table(most, "places", mix, _FINE[level], budget)
        self._fields = Fields(mix, budget)
        self._most = most
        self._contexts = (
            Table(min(most, MAX_CONTEXTS), "buckets and writers", mix, budget=budget) if by and any(by) else None
        )
        self._seen = dict.fromkeys(("gpa", "size", "access"))
        self._none = np.zeros(0, dtype=np.int64)
        self._times: list[int] = []  # the earliest and the latest
        self._since = 0  # the first record that is counted in the plots
        self.records_done = 0

    @property
    def places(self) -> int:
        """How many there are so far."""
        return int(self._places.used[0]) + self._fields.places

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return self._places.words.nbytes + self._fields.nbytes + (self._contexts.words.nbytes if self._contexts else 0)

    def feed(self, chunk: TraceChunk) -> None:
        """Count a chunk. Raises TraceError, with the absolute record index, for a record that is no access, that a
        footprint cannot have, or that lacks what its places are to be apart by; LimitExceeded for too many places."""
        base = self.records_done
        if chunk.operations is not None and not chunk.operations.plain:
            raise _not_of_a_footprint(chunk, base)
        words = frozen(chunk.records.reshape(-1))
        contexts = self._none if self._contexts is None else self._numbered(chunk, base)
        table, position = self._places, 0
        while True:
            status, position = (
                int(value)
                for value in kernels.count_places(
                    words,
                    contexts,
                    position,
                    base,
                    self._since,
                    chunk.kinds,
                    UNITS[self._level],
                    self._fields.plots,
                    table.words,
                    table.mix,
                    table.limit,
                    table.used,
                )
            )
            if self.places > self._most:
                raise too_many(self._most, "places")
            if status == kernels.NEED_ROOM:
                table.grow()
            elif status == kernels.NEED_PLOTS:
                self._fields.grow()
            elif status == DONE:
                break
            else:
                raise refused_record(status, words, position, base + position)
        self.records_done = base + len(chunk.records)
        names = ("kind", "linear", "source") if chunk.kinds else ()
        self._seen |= dict.fromkeys((*names, *(name for name in ("time", "pc") if name in chunk.carry)))
        times = chunk.carry.get("time")
        if times is not None and len(times):
            both = [*self._times, int(times.min()), int(times.max())]
            self._times = [min(both), max(both)]

    def _numbered(self, chunk: TraceChunk, base: int) -> NDArray[np.int64]:
        """The number of the context of each record."""
        table = self._contexts
        assert table is not None
        count = len(chunk.records)
        buckets, pcs = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        if self._by.records:
            buckets[:] = np.arange(base, base + count) // self._by.records
        elif self._by.time:
            buckets[:] = (_along(chunk, "time", base) // np.uint64(self._by.time)).view(np.int64)
        if self._by.pc:
            pcs[:] = _along(chunk, "pc", base).view(np.int64)
        numbers = np.zeros(count, dtype=np.int64)
        done = 0
        while True:
            done = int(
                kernels.number_contexts(pcs, buckets, done, numbers, table.words, table.mix, table.limit, table.used)
            )
            if done == count:
                return numbers
            table.grow()

    def _evenly(self) -> dict[str, NDArray[Any]]:
        """The places in order, where they are apart by nothing beside."""
        rows = self._places.rows()
        begin, key = rows[:, 0], rows[:, 1]
        order = np.lexsort((key >> kernels.WHAT_SHIFT, key & 0xFFFF, begin))
        return self._fields.columns(self._since, np.ascontiguousarray(rows[order]))

    def _apart(self) -> dict[str, NDArray[Any]]:
        """The places in order, apart by buckets and writers: all of them are in the table."""
        rows = self._places.rows()
        key = rows[:, 1]
        columns: dict[str, NDArray[Any]] = {
            "begin": rows[:, 0].view(np.uint64),
            "extent": key & 0xFFFF,
            "what": (key >> kernels.WHAT_SHIFT).astype(np.uint8),
            "count": rows[:, 2],
            "trace": np.zeros(len(rows), dtype=np.int32),
            "first": rows[:, 3],
        }
        assert self._contexts is not None
        contexts = self._contexts.rows()
        contexts = contexts[np.argsort(contexts[:, 2])][(key >> kernels.CONTEXT_SHIFT) - 1].view(np.uint64)
        if self._by.buckets:
            columns["bucket"] = contexts[:, 1]
        if self._by.pc:
            columns["pc"] = contexts[:, 0]
        order = ordered(columns)
        return {name: np.ascontiguousarray(column[order]) for name, column in columns.items()}

    def finish(self, origin: Origin) -> Footprint:
        """The footprint of everything so far, which ``origin`` describes but for its length and its columns."""
        columns = self._evenly() if self._contexts is None else self._apart()
        lasted = self._times[1] - self._times[0] if self._times else 0
        origin = origin._replace(
            records=self.records_done, columns=tuple(self._seen), nanoseconds=min(lasted, (1 << 63) - 1)
        )
        return made(self._level, self._by, (origin,), columns)


def too_many(most: int, what: str) -> LimitExceeded:
    """The refusal of more than a footprint has."""
    return LimitExceeded(f"a footprint has at most {most} {what}", field=what, value=most + 1)


def _along(chunk: TraceChunk, name: str, base: int) -> NDArray[np.uint64]:
    """A column that goes along with the records. Raises TraceError where there is none."""
    column = chunk.carry.get(name)
    if column is None:
        instead = ": take equal runs of records" if name == "time" else ""
        raise TraceError(f"the trace has no column {name} to be apart by{instead}", index=base, field=f"by.{name}")
    return np.asarray(column, dtype=np.uint64)


def _not_of_a_footprint(chunk: TraceChunk, base: int) -> TraceError:
    """The error for a chunk that has operations, or address spaces."""
    operations = chunk.operations
    assert operations is not None
    first = int(operations.at[0]) if len(operations.at) else 0
    return TraceError(_STATE, index=base + first, field="op" if len(operations.at) else "address_space")
