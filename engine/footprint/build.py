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
            raise LimitExceeded(
                f"a footprint has at most {self._most} {self._what}", field=self._what, value=self._most + 1
            )
        smaller = self.words
        self._make(2 * len(smaller) // kernels.ROW_WORDS)
        kernels.move_rows(smaller, self.words, self.mix)
        self._budget.keep(-smaller.nbytes, "")

    def rows(self) -> NDArray[np.int64]:
        """int64[n, ROW_WORDS] of those in use, in no order."""
        rows: NDArray[np.int64] = self.words.reshape(-1, kernels.ROW_WORDS)
        return np.compress(rows[:, 2] != 0, rows, axis=0)


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
        self._contexts = (
            Table(min(most, MAX_CONTEXTS), "buckets and writers", mix, budget=budget) if by and any(by) else None
        )
        self._seen = dict.fromkeys(("gpa", "size", "access"))
        self._none = np.zeros(0, dtype=np.int64)
        self._times: list[int] = []  # the earliest and the latest
        self.records_done = 0

    @property
    def places(self) -> int:
        """How many there are so far."""
        return int(self._places.used[0])

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return self._places.words.nbytes + (self._contexts.words.nbytes if self._contexts else 0)

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
                    chunk.kinds,
                    UNITS[self._level],
                    table.words,
                    table.mix,
                    table.limit,
                    table.used,
                )
            )
            if status == kernels.NEED_ROOM:
                table.grow()
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

    def finish(self, origin: Origin) -> Footprint:
        """The footprint of everything so far, which ``origin`` describes but for its length and its columns."""
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
        if self._contexts is not None:
            contexts = self._contexts.rows()
            contexts = contexts[np.argsort(contexts[:, 2])][key >> kernels.CONTEXT_SHIFT].view(np.uint64)
            if self._by.buckets:
                columns["bucket"] = contexts[:, 1]
            if self._by.pc:
                columns["pc"] = contexts[:, 0]
        order = ordered(columns)
        columns = {name: np.ascontiguousarray(column[order]) for name, column in columns.items()}
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
