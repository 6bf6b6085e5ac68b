"""A footprint built from chunks of a trace, those that a replay takes. Memory is that of the distinct places."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidValue, TraceError
from engine.footprint import kernels
from engine.footprint.combine import gathered
from engine.footprint.places import BYTES, LEVELS, SPANS, UNITS, By, Footprint, Origin, made, ordered
from engine.footprint.tables import MIX, PLACES, Fields, Table, too_many
from engine.state.config import choices
from engine.trace.addresses import frozen
from engine.trace.columns import TraceChunk
from engine.trace.readers.budget import Budget
from engine.trace.record_checks import DONE
from engine.trace.session import refused_record

MAX_CONTEXTS = 1 << 32  # pairs of a bucket and a pc
MAX_PLACES = 1 << 30

# By how many low bits neighbours are not told apart: stores are mostly of 8 bytes, one behind the other.
_FINE = {SPANS: 0, BYTES: 3}
# Plots of bytes are many, so that the index of them is out of the cache.
_NEAR = {SPANS: 0, BYTES: 3}

# Memory while places are brought in order: of one in a plot (its columns, and what its plot takes), of one in the table
# (its row twice, and the keys of the order), of one that is apart by something beside, of one that is put together with
# those of plots before.
_CELL, _ROW, _APART, _TOGETHER = 48, 160, 200, 200

_STATE = (
    "a footprint has no address spaces and no operations between accesses: what they do depends on what was before. "
    "Replay the trace"
)


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
        budget = budget or Budget(1 << 62)
        self._level = level
        self._places = Table(most, "places", mix, _FINE[level], budget)
        self._fields = Fields(mix, _NEAR[level], budget, closed=any(self._by))
        self._most = most
        self._contexts = (
            Table(min(most, MAX_CONTEXTS), "buckets and writers", mix, budget=budget) if by and any(by) else None
        )
        self._seen = dict.fromkeys(("gpa", "size", "access"))
        self._none = np.zeros(0, dtype=np.int64)
        self._times: list[int] = []  # the earliest and the latest
        self._budget, self._mix = budget, mix
        self._since = 0  # the first record that is counted in the plots
        self._sealed: dict[str, NDArray[Any]] = {}  # places of plots before
        self.records_done = 0

    @property
    def places(self) -> int:
        """How many there are so far, at most: some of a trace beyond 2^32 records count twice."""
        return int(self._places.used[0]) + self._fields.places + self._sealed_places

    @property
    def _sealed_places(self) -> int:
        return len(self._sealed["begin"]) if self._sealed else 0

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        sealed = sum(column.nbytes for column in self._sealed.values())
        contexts = self._contexts.words.nbytes if self._contexts else 0
        return self._places.words.nbytes + self._fields.nbytes + contexts + sealed

    @property
    def finishing(self) -> int:
        """Memory that ``finish`` takes beside the tables, at most."""
        rows = int(self._places.used[0])
        if self._contexts is not None:
            return rows * _APART
        sealed = self._sealed_places
        cells = self._fields.places
        return cells * _CELL + rows * _ROW + ((cells + rows + sealed) * _TOGETHER if sealed else 0)

    def feed(self, chunk: TraceChunk) -> None:
        """Count a chunk. Raises TraceError, with the absolute record index, for a record that is no access, that a
        footprint cannot have, or that lacks what its places are to be apart by; LimitExceeded for too many places."""
        base = self.records_done
        if chunk.operations is not None and not chunk.operations.plain:
            raise _not_of_a_footprint(chunk, base)
        words = frozen(chunk.records.reshape(-1))
        contexts = self._none if self._contexts is None else self._numbered(chunk, base)
        begin = 0
        while begin < len(chunk.records):
            if base + begin - self._since == kernels.MOST_RECORDS:
                self._seal(base + begin)
            end = min(len(chunk.records), self._since + kernels.MOST_RECORDS - base)
            self._count(words[: 2 * end], contexts, begin, base, chunk.kinds)
            begin = end
        self.records_done = base + len(chunk.records)
        names = ("kind", "linear", "source") if chunk.kinds else ()
        self._seen |= dict.fromkeys((*names, *(name for name in ("time", "pc") if name in chunk.carry)))
        times = chunk.carry.get("time")
        if times is not None and len(times):
            both = [*self._times, int(times.min()), int(times.max())]
            self._times = [min(both), max(both)]

    def _count(
        self, words: NDArray[np.int64], contexts: NDArray[np.int64], position: int, base: int, kinds: bool
    ) -> None:
        """Count the records from ``position``, with more room where there is need of it."""
        table = self._places
        while True:
            plots, since = self._fields.plots, self._since
            found = kernels.count_places(
                words,
                contexts,
                position,
                base,
                since,
                kinds,
                UNITS[self._level],
                plots,
                table.words,
                table.mix,
                table.limit,
                table.used,
            )
            status, position = int(found[0]), int(found[1])
            if self.places > self._most:
                raise too_many(self._most, "places")
            if status == kernels.NEED_ROOM:
                table.grow()
            elif status == kernels.NEED_PLOTS:
                self._fields.grow()
            elif status == DONE:
                return
            else:
                raise refused_record(status, words, position, base + position)

    def _seal(self, record: int) -> None:
        """Begin anew with the plots at a record, as cells have no room for more."""
        nothing = np.zeros((0, kernels.ROW_WORDS), dtype=np.int64)
        sealed = self._with_sealed(self._fields.columns(self._since, nothing))
        self._budget.keep(sum(column.nbytes for column in sealed.values()), PLACES)
        self._budget.keep(-sum(column.nbytes for column in self._sealed.values()), PLACES)
        self._budget.keep(-self._fields.nbytes, PLACES)
        self._sealed = sealed
        self._fields = Fields(self._mix, _NEAR[self._level], self._budget)
        self._since = record

    def _with_sealed(self, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Columns together with those of the plots before."""
        if not self._sealed:
            return columns
        both = {name: np.concatenate([column, self._sealed[name]]) for name, column in columns.items()}
        return gathered(self._level, self._by, (), both).columns()

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
        return self._with_sealed(self._fields.columns(self._since, np.ascontiguousarray(rows[order])))

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
