"""Footprints that are kept, added up to another one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar

from engine.errors import InvalidValue, NotFound
from engine.footprint.combine import merge
from engine.footprint.places import ROW_GROUP, WRITTEN_BYTES, Footprint
from service.runtime.footprints import EACH, ORIGIN, READ, Footprints, Room
from service.runtime.offload import maybe_in_thread
from service.runtime.work_progress import Told
from service.settings import Settings
from service.storage.records import FootprintRecord

MOST = 100
# Memory of a place that was read, and of one that is apart by time or by the instruction.
_PLACE, _APART = 40, 56
_STEP = 1 << 17  # places that are added up at a time, about
# Of how many what is told of them is read on the event loop.
_INLINE = 4
_RULE = "adding up footprints may take up to {} bytes of memory: add up fewer, or use `subpage footprint merge`"


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """What the client asked for: ids of footprints."""

    footprints: tuple[str, ...]
    format: ClassVar[str] = ""
    record: ClassVar[str | None] = None
    start: ClassVar[int] = 0


Work = Callable[[Callable[[], None]], Footprint]
"""Adds up in a thread; is given what raises when nobody wants that any more."""


async def check_alike(footprints: Footprints, tenant: str, wanted: MergeRequest) -> tuple[list[FootprintRecord], int]:
    """What is to be added up, and the memory that it takes once it is read.

    Raises NotFound, which says which one is not kept, InvalidValue unless they are of one level and apart by the same,
    StoreUnavailable.
    """
    found = []
    for position, name in enumerate(wanted.footprints):
        try:
            found.append(await footprints.get(tenant, name))
        except NotFound as error:
            error.field = f"footprints[{position}]"
            raise
    return found, await maybe_in_thread(len(found) <= _INLINE, _memory_of, found)


class _Following:
    """Tells how far the sum of ``count`` footprints is: the first half is to read them, the other to add them up."""

    def __init__(self, told: Told, count: int) -> None:
        self._told, self._count = told, count
        self._read = self._places = self._steps = 0

    def read(self, footprint: Footprint) -> Footprint:
        """One is there."""
        self._read += 1
        self._places += len(footprint)
        self._told.records_done += footprint.records
        self._told.share = self._read / self._count / 2
        return footprint

    def step(self) -> None:
        """Some thousand places are about to be added up."""
        self._told.share = 0.5 + min(0.5, self._steps / (2 + self._places / _STEP) / 2)
        self._steps += 1


def _memory_of(records: Sequence[FootprintRecord]) -> int:
    heads = [json.loads(record.head) for record in records]
    one, size = heads[0], 0
    for position, head in enumerate(heads):
        for name, rule in (("level", "must be of one level"), ("by", "must be apart by the same")):
            if head[name] != one[name]:
                rule = f"{rule}: that of footprints[0] is {json.dumps(one[name])}"
                raise InvalidValue(rule, field=f"footprints[{position}].{name}", value=head[name])
        size += head["places"] * (_APART if any(head["by"].values()) else _PLACE)
        size += EACH + head["traces_total"] * ORIGIN
    return size


@asynccontextmanager
async def merging(
    footprints: Footprints,
    tenant: str,
    wanted: MergeRequest,
    settings: Settings,
    run: Callable[[Work], Awaitable[Footprint]],
    told: Told | None = None,
) -> AsyncIterator[Footprint]:
    """The sum, in memory of its tenant until the context ends; ``run`` has the work done in a thread. ``told`` tells
    how far it is.

    Raises what ``check_alike``, ``engine.footprint.combine.merge`` and ``run`` do, and ShareExceeded or LimitExceeded
    where there is too little memory.
    """
    records, size = await check_alike(footprints, tenant, wanted)
    with footprints.memory.budget(tenant) as budget:
        room = Room(budget, settings.footprint_memory_bytes, _RULE)
        room.keep(size)
        room.check(min(size, READ))
        following = _Following(told or Told(), len(records))
        read = [following.read(await footprints.loaded(record)) for record in records]

        def work(going_on: Callable[[], None]) -> Footprint:
            def check(size: int) -> None:
                going_on()
                room.check(size)
                following.step()

            return merge(read, check)

        found = await run(work)
        room.keep(found.nbytes)
        room.check(min(len(found), ROW_GROUP) * WRITTEN_BYTES)
        yield found
