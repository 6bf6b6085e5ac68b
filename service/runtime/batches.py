"""The violations of a replay as single events, looked up in the replay's exit records when somebody reads them."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import NotFound
from engine.kvm.resolutions import VIOLATION
from engine.trace.results import ExitColumns
from service.runtime.traces import PART
from service.storage.records import EventRecord

# Parts of exit records in memory, over all machines: 5 MB each.
_KEPT_PARTS = 8

LoadPart = Callable[[int, str, int], Awaitable[ExitColumns]]


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive violations of a batch: the ids from ``first`` on; ``end`` is the id after the last one."""

    first: int
    exits: ExitColumns

    @property
    def end(self) -> int:
        return self.first + len(self.exits)

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.arange(self.first, self.end, dtype=np.int64)


class Parts:
    """Parts of exit records that were read from the store, the least recently used forgotten first.

    Streams that ask for the same part at once share the reading of it.
    """

    def __init__(self, load: LoadPart) -> None:
        self._load = load
        self._parts: OrderedDict[tuple[str, int], asyncio.Task[ExitColumns]] = OrderedDict()

    async def get(self, number: int, trace: str, part: int, least: int = 0) -> ExitColumns:
        """A part, which has ``least`` records or more by now. Raises NotFound when the trace is not kept,
        StoreUnavailable."""
        key = (trace, part)
        found = self._parts.get(key)
        if found is None or (least and _is_short(found, least)):
            found = self._parts[key] = asyncio.ensure_future(self._load(number, trace, part))
            while len(self._parts) > _KEPT_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(key)
        try:
            # A reader that leaves must not take the others' part along.
            return await asyncio.shield(found)
        except BaseException:
            if found.done() and self._parts.get(key) is found:
                del self._parts[key]
            raise


def _is_short(found: asyncio.Task[ExitColumns], least: int) -> bool:
    """Whether the part was read when it had fewer records."""
    return found.done() and not found.cancelled() and found.exception() is None and len(found.result()) < least


async def window_of(
    batch: EventRecord, after: int, most: int, part_of: Callable[[int, int], Awaitable[ExitColumns]]
) -> Window | None:
    """Up to ``most`` violations of ``batch`` with ids above ``after``, at least one; all are of one part.

    ``part_of`` is given a part and how many records it has at least.

    None when the rest of the batch has no exit records: they passed the limit of the replay, or are not kept any more.
    """
    body = json.loads(batch.body)
    place = max(0, after + 1 - batch.first)
    if place >= body["listed"]:
        return None
    # Of a trace that was published bit by bit this is a bit: records before it are in its first part, and after it
    # perhaps in its last.
    told, rows = body.get("from", 0), body.get("rows")
    first, offset = divmod(told, PART)
    if body["parts"] is None:
        part, skipped = divmod(told + place, PART)
    else:
        part, skipped = _part_at(body["parts"], place)
        part += first
    least = 0 if rows is None else min(PART, told + rows - part * PART)
    try:
        exits = await part_of(part, least)
    except NotFound:
        return None
    if body["parts"] is not None:
        of_the_bit = exits[offset if part == first else 0 :]
        exits = of_the_bit[np.flatnonzero(of_the_bit.column("resolution") == VIOLATION)]
    return Window(batch.first + place, exits[skipped : skipped + min(most, body["listed"] - place)])


def _part_at(counts: list[int], place: int) -> tuple[int, int]:
    """The part that has the violation at ``place``, and how many of the part come before it."""
    ends = np.cumsum(counts)
    part = int(np.searchsorted(ends, place, side="right"))
    return part, place - int(ends[part] - counts[part])
