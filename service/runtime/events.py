"""The event log of one machine: what happened to it, in order, under ids that are never given twice.

A row stands for one event, or for all violations of one replay, whose exit records are looked up when somebody reads
them. Rows are made durable with the change that they tell of; what is read is what was committed.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from service.platform.stamps import stamp
from service.storage.records import EventRecord, LogChange, LogPruning

# What events tell of; markers, which are no events of the machine, are listed below.
KINDS: dict[str, str] = {
    "lifecycle": "The VM was created, or restored from a backup, or SPP was enabled.",
    "memory-slot": "A memory slot was created, changed or deleted.",
    "protection": "A protection was created or deleted.",
    "subpages": "SET bitmaps were replaced.",
    "page-access": "Page access and write bitmaps were replaced.",
    "violation": "A guest access was refused: one event for each, with the members of its exit record.",
    "host-memory": "The host did something to the memory behind the guest.",
    "flush": "A vCPU made a hypercall.",
    "vcpu": "A vCPU was created.",
    "nested": "The nested state of a vCPU was replaced.",
}
DROPPED = "dropped"
END = "end"
MARKERS: dict[str, str] = {
    DROPPED: "Events with the ids `first` to `last` cannot be shown: `reason` says why.",
    END: "The stream ends: `reason` is deleted, draining, unauthenticated, store-lost or store-unavailable. No id.",
}

# Rows of a stored log that stay in memory, so that a stream which is up to date never asks the store.
_TAIL = 64
# Streams that are woken at once; others come to their turn before the next.
_WAKE = 128

Load = Callable[[int, int, str, int], Awaitable[list[EventRecord]]]


@dataclass(slots=True)
class LogStats:
    """What metrics tell of the logs of a service."""

    appended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    dropped: int = 0
    streams: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    """An event to be: ``count`` of them with ``trace``."""

    kind: str
    detail: dict[str, Any]
    count: int = 1
    trace: str | None = None


class EventLog:
    """Used from the event loop only. ``load`` reads rows that are no longer in memory; without it all stay there."""

    def __init__(
        self, kept: int, kept_days: float = 0, *, load: Load | None = None, stats: LogStats | None = None
    ) -> None:
        self._kept = kept
        self._kept_for = timedelta(days=kept_days) if kept_days else None
        self._load = load
        self._stats = stats or LogStats()
        self._tail: list[EventRecord] = []
        self._notes: list[Note] = []
        self._coming: list[EventRecord] = []
        # Pruning at each commit would cost more than the rows that it saves.
        self._prune_every = min(1024, max(1, kept // 16))
        self._unpruned = self._prune_every
        self._waiting: set[asyncio.Future[None]] = set()
        self.next_id = 1
        self.ended: str | None = None

    # The writing side

    def adopt(self, next_id: int) -> None:
        """Go on with the log as the store has it."""
        if next_id != self.next_id:
            self._tail.clear()
            self.next_id = next_id
            self._wake()

    def note(self, kind: str, detail: dict[str, Any]) -> None:
        """Add an event with the machine's next commit."""
        self._notes.append(Note(kind, detail))

    def forget(self) -> None:
        """What was noted last is no event: its change was refused."""
        self._notes.clear()

    def stage(self, others: Iterable[Note] = ()) -> None:
        """One more change of the next commit: what was noted since the one before, and ``others`` after that."""
        notes = (*self._notes, *others)
        if not notes:
            return
        now, next_id = stamp(), self._next_staged
        rows = []
        for note in notes:
            body = msgspec.json.encode(note.detail).decode()
            rows.append(EventRecord(next_id, note.count, now, note.kind, body, note.trace))
            next_id += note.count
        self._coming += rows
        self._notes.clear()

    @property
    def _next_staged(self) -> int:
        return self._coming[-1].first + self._coming[-1].count if self._coming else self.next_id

    def coming(self) -> tuple[LogChange, int]:
        """What the next commit stores, and the id that the next event gets then."""
        pruning = None
        if self._coming and self._unpruned + len(self._coming) >= self._prune_every:
            pruning = LogPruning(self._kept, self.since())
        return LogChange(self._coming, pruning), self._next_staged

    def settle(self) -> None:
        """The commit has been made."""
        added, self._coming = self._coming, []
        if not added:
            return
        self._unpruned += len(added)
        if self._unpruned >= self._prune_every:
            self._unpruned = 0
        self._tail += added
        for event in added:
            self._stats.appended[event.kind] += event.count
        self.next_id = added[-1].first + added[-1].count
        self._shrink()
        self._wake()

    def discard(self) -> None:
        """There was no commit."""
        self._notes.clear()
        self._coming = []

    def close(self, reason: str) -> None:
        """End the streams; the first reason counts."""
        if self.ended is None:
            self.ended = reason
            self._wake()

    def since(self) -> str:
        """Rows created before this are not kept any more; empty: all are."""
        return stamp(datetime.now(UTC) - self._kept_for) if self._kept_for is not None else ""

    def _shrink(self) -> None:
        most = self._kept if self._load is None else _TAIL
        # A slice of a long list costs as much as the list: do it seldom.
        if len(self._tail) > most + min(most, 1024) // 16:
            del self._tail[: len(self._tail) - most]

    # The reading side

    async def rows(self, after: int, limit: int) -> list[EventRecord]:
        """Up to ``limit`` rows with events whose ids are above ``after``, in order. Raises StoreUnavailable.

        A row that holds ``after`` comes whole. Ids that no row has are those of events that are not kept.
        """
        since = self.since()
        if self._load is not None and not (self._tail and self._tail[0].first <= after + 1):
            return await self._load(after, self.next_id, since, limit)
        found = []
        for event in self._tail[self._position(after) :]:
            if event.created >= since:
                found.append(event)
                if len(found) == limit:
                    break
        return found

    def _position(self, after: int) -> int:
        """Of the first row in memory that ends above ``after``."""
        return bisect_right(self._tail, after, key=lambda row: row.first + row.count - 1)

    async def wait(self, after: int, seconds: float) -> bool:
        """Until there is an event with an id above ``after``, or the log has ended; False if it takes too long."""
        if after + 1 < self.next_id or self.ended is not None:
            return True
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            async with asyncio.timeout(seconds):
                await waiting
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(waiting)
        return True

    def nudge(self) -> None:
        """Let those who wait look around."""
        self._wake()

    def _wake(self) -> None:
        if self._waiting:
            waiting, self._waiting = list(self._waiting), set()
            _wake_some(waiting)


def _wake_some(waiting: list[asyncio.Future[None]]) -> None:
    for future in waiting[-_WAKE:]:
        if not future.done():
            future.set_result(None)
    del waiting[-_WAKE:]
    if waiting:
        asyncio.get_running_loop().call_soon(_wake_some, waiting)
