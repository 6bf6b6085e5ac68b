"""One reader's way through an event log: rows become events one by one, and what cannot be shown a marker."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.trace.results import ExitColumns
from service.api.traces.exits import INLINE_RECORDS, exit_rows
from service.platform.stamps import stamp
from service.runtime.batches import Window, window_of
from service.runtime.events import DROPPED, EventLog, LogStats
from service.runtime.offload import maybe_in_thread
from service.runtime.traces import PART
from service.storage.records import EventRecord

# Rows asked for at once, and violations of one batch that are rendered at once.
_ROWS = 64
_WINDOW = 4096

# Why events cannot be shown.
NOT_KEPT = "not-kept"
TRACE_NOT_KEPT = "trace-not-kept"
NOT_LISTED = "not-listed"

PartOf = Callable[[str, int, int], Awaitable[ExitColumns]]


@dataclass(frozen=True, slots=True)
class Item:
    """An event or a marker: its id, None for one that has none, and its JSON."""

    id: int | None
    kind: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events a reader asks for. ``gfns`` (first, end) and ``object`` choose among violations."""

    kinds: frozenset[str]
    gfns: tuple[int, int] | None = None
    object: str | None = None
    expand: bool = True

    @property
    def chooses(self) -> bool:
        return self.gfns is not None or self.object is not None

    def among(self, exits: ExitColumns) -> NDArray[np.bool_]:
        """Which of these violations are asked for."""
        found = np.ones(len(exits), dtype=bool)
        if self.gfns is not None:
            gfns = exits.column("gfn")
            found &= (gfns >= np.uint64(self.gfns[0])) & (gfns < np.uint64(self.gfns[1]))
        if self.object is not None and found.any():
            offsets, positions = exits.object_positions()
            known = np.array([name == self.object for name in exits.object_names], dtype=bool)
            hits = known[positions] if len(known) else np.zeros(len(positions), dtype=bool)
            found &= np.diff(np.concatenate([[0], np.cumsum(hits)])[offsets]) > 0
        return found

    def has(self, row: EventRecord) -> bool:
        """Whether an event that is a row of its own is asked for."""
        if row.kind not in self.kinds:
            return False
        if row.kind != "violation" or not self.chooses:
            return True
        detail = json.loads(row.body)
        inside = self.gfns is None or self.gfns[0] <= int(detail["gfn"], 16) < self.gfns[1]
        return inside and (self.object is None or self.object in detail["objects"])


class Feed:
    """Reads ``log`` from the id after ``position`` on. Events that are not asked for are passed in silence."""

    def __init__(self, log: EventLog, position: int, wanted: Wanted, part_of: PartOf, stats: LogStats) -> None:
        self.log = log
        self.position = position
        self._wanted = wanted
        self._part_of = part_of
        self._stats = stats
        self._rows: deque[EventRecord] = deque()

    async def next(self, below: int, most: int = _WINDOW) -> list[Item]:
        """Some of the next events with ids below ``below``, up to ``most``; none when there are no more of them.

        ``below`` is the first id of a row, or the one that the next row will have. Raises StoreUnavailable.
        """
        found: list[Item] = []
        while len(found) < most and self.position + 1 < below:
            if not self._rows:
                self._rows.extend(await self.log.rows(self.position, _ROWS))
            if not self._rows or self._rows[0].first >= below:
                found.append(self._dropped(below - 1, NOT_KEPT))
            elif self._rows[0].first > self.position + 1:
                found.append(self._dropped(self._rows[0].first - 1, NOT_KEPT))
            else:
                found += await self._of_row(self._rows[0], most - len(found))
            if self._rows and self.position >= self._rows[0].first + self._rows[0].count - 1:
                self._rows.popleft()
        return found

    async def _of_row(self, row: EventRecord, most: int) -> list[Item]:
        """Some of the events of a row, at most ``most``."""
        last = row.first + row.count - 1
        if row.trace is None or row.kind not in self._wanted.kinds:
            self.position = last
            return [_item(row, row.first, row.body.encode())] if self._wanted.has(row) else []
        if not self._wanted.expand:
            about = {"first": self.position + 1, "last": last, "count": last - self.position}
            self.position = last
            return [_item(row, last, msgspec.json.encode(about))]
        trace = row.trace
        scanned = PART if self._wanted.chooses else min(most, _WINDOW)
        window = await window_of(row, self.position, scanned, lambda *part: self._part_of(trace, *part))
        if window is None:
            listed = row.first + int(json.loads(row.body)["listed"])
            return [self._dropped(last, NOT_LISTED if self.position + 1 >= listed else TRACE_NOT_KEPT)]
        return await self._of_window(row, window, most)

    async def _of_window(self, row: EventRecord, window: Window, most: int) -> list[Item]:
        ids, exits = window.ids, window.exits
        if self._wanted.chooses:
            chosen = np.flatnonzero(await maybe_in_thread(len(exits) <= INLINE_RECORDS, self._wanted.among, exits))
            ids, exits = ids[chosen], exits[chosen]
        if len(ids) > min(most, _WINDOW):
            ids, exits = ids[:most][:_WINDOW], exits[:most][:_WINDOW]
            self.position = int(ids[-1])
        else:
            self.position = window.end - 1
        return await maybe_in_thread(len(exits) <= INLINE_RECORDS, _violations, row, ids, exits)

    def _dropped(self, last: int, reason: str) -> Item:
        first, self.position = self.position + 1, last
        self._stats.dropped += last - first + 1
        return marker(DROPPED, last, {"first": first, "last": last, "count": last - first + 1, "reason": reason})


def marker(kind: str, position: int | None, detail: dict[str, object]) -> Item:
    """What stands in the place of events."""
    document = {"id": position, "kind": kind, "created": stamp(), "trace": None, "detail": detail}
    return Item(position, kind, msgspec.json.encode(document))


def _violations(row: EventRecord, ids: NDArray[np.int64], exits: ExitColumns) -> list[Item]:
    rendered = map(msgspec.json.encode, exit_rows(exits))
    return [_item(row, number, detail) for number, detail in zip(ids.tolist(), rendered, strict=True)]


def _item(row: EventRecord, number: int, detail: bytes) -> Item:
    trace = f'"{row.trace}"' if row.trace is not None else "null"
    start = f'{{"id":{number},"kind":"{row.kind}","created":"{row.created}","trace":{trace},"detail":'
    return Item(number, row.kind, b"%b%b}" % (start.encode(), detail))
