"""Footprints that are kept for their tenants: added within limits, listed, asked, dropped."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import LimitExceeded, NotFound
from engine.footprint.costs import Costs
from engine.footprint.places import BYTES, SPANS, Footprint
from engine.footprint.question import Check, Question
from engine.footprint.summaries import Counts
from engine.trace.readers import Budget
from service.platform.stamps import EPOCH, moment, stamp
from service.problems import ServiceError
from service.runtime.body_memory import BodyMemory
from service.runtime.commit_hooks import CommitHooks
from service.runtime.footprint_documents import about
from service.runtime.offload import maybe_in_thread
from service.runtime.repository import Repository
from service.runtime.shares import Tenants, one_tenant
from service.settings import Settings
from service.storage.records import FootprintRecord, JobRecord, Side

# Of its file, as it is stored: some megabytes, so that no row is very large.
PART = 4 << 20
# Memory of a place while it is asked: its columns, the sums that are made of them once, and what making them takes
# (where bytes become spans first, what these take is asked for when it is known how many there are); the same of one
# that is apart by time or by the instruction, which is first made one that is not.
ASKED_BYTES = {SPANS: 200, BYTES: 100}
ASKED_APART_BYTES = 300
# Of those that are read at one time.
READ = 1 << 24
# Of each that is in memory, however few places it has, and of each of its traces.
EACH, ORIGIN = 4096, 1024
_OF_FEWER = "asking a footprint may take up to {} bytes of memory: ask one of fewer places"
# The last moment that there is, in microseconds.
_LAST = moment(datetime.max.replace(tzinfo=UTC))


def footprint_not_kept(footprint: str) -> NotFound:
    """There is no such footprint, or it was dropped."""
    return NotFound("must be the id of a footprint that is still kept", field="footprint", value=footprint)


class Count(Protocol):
    """One of ``engine.footprint.summaries``."""

    def __call__(self, footprint: Footprint, *, check: Check) -> Counts: ...


@dataclass(slots=True, eq=False)
class Asked:
    """A footprint in memory, and what was last worked out of it. From any thread."""

    record: FootprintRecord
    footprint: Footprint
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _costs: Costs | None = None
    _counts: tuple[Count, Counts, NDArray[np.int64]] | None = None

    @property
    def nbytes(self) -> int:
        """What it takes, with all that was worked out of it."""
        counts = self._counts
        sums = 0 if self._costs is None else self._costs.nbytes
        listed = 0 if counts is None else sum(column.nbytes for column in (*counts[1], counts[2]))
        return EACH + ORIGIN * len(self.footprint.origins) + self.footprint.nbytes + sums + listed

    def costs(self, question: Question, check: Check) -> Costs:
        """What policies cost under a question: made once for the last one. Raises what ``check`` does."""
        with self._lock:
            if self._costs is None or self._costs.question != question:
                self._costs = None  # not both in memory
                self._costs = Costs(self.footprint, question, check)
            return self._costs

    def counts(self, count: Count, check: Check, *, most: bool) -> tuple[Counts, NDArray[np.int64]]:
        """One of ``engine.footprint.summaries``, counted once for the last one, and the order of those with the most
        first, empty unless it is asked for. Raises what ``check`` and counting do."""
        with self._lock:
            if self._counts is None or self._counts[0] is not count:
                self._counts = None
                self._counts = (count, count(self.footprint, check=check), np.zeros(0, dtype=np.int64))
            _, counts, order = self._counts
            if most and len(order) < len(counts.key):
                check(len(counts.key) * 40)
                order = counts.order()
                self._counts = (count, counts, order)
            return counts, order


class Room:
    """The memory of one question. Whoever works on it asks before something large is made."""

    def __init__(self, budget: Budget, most: int, rule: str = _OF_FEWER) -> None:
        self._budget = budget
        self._most = most
        self._rule = rule

    def check(self, size: int) -> None:
        """Raise LimitExceeded or ShareExceeded unless ``size`` bytes more may be taken for a while."""
        if size > self._most - self._budget.kept:
            rule = self._rule.format(self._most)
            raise LimitExceeded(rule, field="footprint_memory_bytes", value=self._budget.kept + size)
        self._budget.check(size, "a footprint that is asked")

    def keep(self, size: int) -> None:
        """The same of what stays until the end."""
        self.check(size)
        self._budget.keep(size, "a footprint that is asked")


class Keeping(Protocol):
    """Where footprints are: a repository, or ``FootprintsInMemory``."""

    async def footprints(self, tenant: str, after: str = "", limit: int | None = None) -> list[FootprintRecord]: ...

    async def footprints_called(self, ids: Collection[str]) -> list[FootprintRecord]: ...

    async def footprints_before(self, created: str) -> list[str]: ...

    async def footprint_part(self, footprint: str, part: int) -> bytes | None: ...


class FootprintsInMemory:
    """Footprints for as long as the process lives."""

    def __init__(self) -> None:
        self._records: dict[str, FootprintRecord] = {}  # in the order of their creation

    def settle(self, side: Side) -> None:
        for footprint in side.dropped:
            self._records.pop(footprint, None)
        self._records |= {record.id: record for record in side.footprints}

    async def footprints(self, tenant: str, after: str = "", limit: int | None = None) -> list[FootprintRecord]:
        mine = [record for record in self._records.values() if record.tenant == tenant and record.created > after]
        return sorted(mine, key=lambda record: (record.created, record.id))[:limit]

    async def footprints_called(self, ids: Collection[str]) -> list[FootprintRecord]:
        return [self._records[name] for name in ids if name in self._records]

    async def footprints_before(self, created: str) -> list[str]:
        return [record.id for record in self._records.values() if record.created < created]

    async def footprint_part(self, footprint: str, part: int) -> bytes | None:
        record = self._records.get(footprint)
        return None if record is None or part >= len(record.parts) else record.parts[part]


class Footprints:
    """The footprints of one application; used from the event loop only.

    Each belongs to a tenant, of which the last ones are kept. They never change, so that whoever has one in memory need
    not look whether it is still the same. ``memory`` is what those may take that are built or asked.
    """

    def __init__(self, settings: Settings, repository: Repository, tenants: Tenants = one_tenant) -> None:
        self._settings = settings
        self._repository = repository
        self._memory = None if repository.durable else FootprintsInMemory()
        self._kept: Keeping = self._memory or repository
        self._adding: dict[str, asyncio.Lock] = {}
        self._latest: dict[str, datetime] = {}
        self._loaded: OrderedDict[str, Asked] = OrderedDict()
        self._loading: dict[str, asyncio.Lock] = {}
        self._drops = 0
        self.memory = BodyMemory(
            settings.footprint_memory_bytes,
            settings.max_footprint_memory_bytes,
            tenants,
            "max_footprint_memory_bytes",
            "footprints that are built or asked at one time",
        )

    # Adding

    async def add(
        self,
        tenant: str,
        footprint: Footprint,
        hooks: CommitHooks,
        told: Callable[[FootprintRecord], Sequence[JobRecord]] = lambda record: (),
    ) -> FootprintRecord:
        """Keep it, stored with what ``hooks`` say. ``told`` sees it before that, and says which jobs end with it.

        Raises StoreUnavailable.
        """
        async with self.coming(tenant, footprint) as side:
            (record,) = side.footprints
            side = Side(jobs=tuple(told(record)), footprints=side.footprints, dropped=side.dropped)
            await self._repository.note(side, hooks)
            self.settle(side)
        return record

    @asynccontextmanager
    async def coming(self, tenant: str, footprint: Footprint, vm: str = "") -> AsyncIterator[Side]:
        """What is stored when a footprint is kept: it, and that others go for it. ``settle`` follows the commit.

        The context ends behind the commit: until then none of the tenant's others comes, which would not count this
        one, and might be created after it and stored before.
        """
        head, parts = await maybe_in_thread(False, _encoded, footprint)
        async with self._adding.setdefault(tenant, asyncio.Lock()):
            yield await self._side(tenant, head, parts, vm)

    async def _side(self, tenant: str, head: str, parts: list[bytes], vm: str) -> Side:
        now = max(datetime.now(UTC), self._latest.get(tenant, EPOCH) + timedelta(microseconds=1))
        self._latest[tenant] = now
        size = sum(map(len, parts))
        record = FootprintRecord(f"fp_{secrets.token_hex(8)}", tenant, vm, stamp(now), size, head, parts)
        known = await self._kept.footprints(tenant)
        return Side(footprints=(record,), dropped=(*self._going(known, size), *await self._of_others(tenant, known)))

    async def _of_others(self, tenant: str, known: Sequence[FootprintRecord]) -> list[str]:
        """Those of other tenants whose days are over: theirs may never look again."""
        if not self._settings.kept_footprint_days:
            return []
        mine = {record.id for record in known}
        return [name for name in await self._kept.footprints_before(self._oldest()) if name not in mine]

    def _going(self, known: Sequence[FootprintRecord], size: int) -> tuple[str, ...]:
        """Those of a tenant, oldest first, that have to go for one of ``size`` bytes."""
        settings, gone = self._settings, []
        count, total = len(known) + 1, sum(record.size for record in known) + size
        for record in known:
            if (
                count <= settings.kept_footprints
                and total <= settings.kept_footprint_bytes
                and not self._is_too_old(record)
            ):
                break
            count, total = count - 1, total - record.size
            gone.append(record.id)
        return tuple(gone)

    def settle(self, side: Side) -> None:
        """A commit with ``side`` has been made."""
        self._drops += len(side.dropped)
        for footprint in side.dropped:
            self._loaded.pop(footprint, None)
        if self._memory is not None:
            self._memory.settle(side)

    async def delete(self, tenant: str, footprint: str, hooks: CommitHooks) -> None:
        """Raises NotFound, StoreUnavailable."""
        record = await self.get(tenant, footprint)
        side = Side(dropped=(record.id,))
        await self._repository.note(side, hooks)
        self.settle(side)

    # Reading

    def _is_too_old(self, record: FootprintRecord) -> bool:
        return bool(self._settings.kept_footprint_days) and record.created < self._oldest()

    def _oldest(self) -> str:
        """Those that were created before this time have had their days."""
        return stamp(datetime.now(UTC) - timedelta(days=self._settings.kept_footprint_days))

    async def _without_old(self, found: Sequence[FootprintRecord]) -> list[FootprintRecord]:
        """Those of these whose days are not over; the others are dropped, if the store takes that now."""
        old = tuple(record.id for record in found if self._is_too_old(record))
        if old:
            side = Side(dropped=old)
            with contextlib.suppress(ServiceError):
                await self._repository.note(side)
                self.settle(side)
        return [record for record in found if record.id not in old]

    async def get(self, tenant: str, footprint: str) -> FootprintRecord:
        """Without its file. Raises NotFound, also for one of another tenant, StoreUnavailable."""
        found = await self._kept.footprints_called([footprint])
        if not found or found[0].tenant != tenant or not await self._without_old(found):
            raise footprint_not_kept(footprint)
        return found[0]

    async def kept(self, ids: Collection[str]) -> set[str]:
        """Those of these that can be read."""
        found = await self._kept.footprints_called(ids) if ids else []
        return {record.id for record in found if not self._is_too_old(record)}

    async def page(self, tenant: str, after: int, limit: int) -> tuple[list[FootprintRecord], int | None]:
        """Up to ``limit`` footprints of a tenant after the moment ``after``, and where the next page starts."""
        since = stamp(EPOCH + timedelta(microseconds=min(after, _LAST)))
        found = await self._kept.footprints(tenant, since, limit + 1)
        shown = await self._without_old(found[:limit])
        following = moment(datetime.fromisoformat(found[limit - 1].created)) if len(found) > limit else None
        return shown, following

    async def file(self, tenant: str, record: FootprintRecord) -> AsyncGenerator[bytes, None]:
        """The Parquet file in parts, one of which is in memory at a time.

        Raises NotFound, also where it is dropped meanwhile, StoreUnavailable, and ShareExceeded or LimitExceeded where
        there is too little memory.
        """
        with self.memory.budget(tenant) as budget:
            Room(budget, self._settings.max_footprint_memory_bytes).keep(min(record.size, PART))
            part = sent = 0
            while sent < record.size:
                data = await self._kept.footprint_part(record.id, part)
                if not data:
                    raise footprint_not_kept(record.id)
                yield data
                part, sent = part + 1, sent + len(data)

    @asynccontextmanager
    async def asked(self, tenant: str, footprint: str) -> AsyncIterator[tuple[Asked, Room]]:
        """The footprint in memory, which it takes for the time of the context, and room for what is made of it.

        Raises NotFound, StoreUnavailable, and ShareExceeded or LimitExceeded where there is too little memory.
        """
        drops = self._drops
        record = await self.get(tenant, footprint)
        head = json.loads(record.head)
        with self.memory.budget(tenant) as budget:
            room = Room(budget, self._settings.footprint_memory_bytes)
            each = ASKED_APART_BYTES if any(head["by"].values()) else ASKED_BYTES[head["level"]]
            room.keep(head["places"] * each + head["traces_total"] * ORIGIN + EACH)
            room.check(min(head["places"] * each, READ))
            lock = self._loading.setdefault(record.id, asyncio.Lock())
            try:
                async with lock:
                    found = self._loaded.get(record.id) or Asked(record, await self.loaded(record))
            finally:
                if not lock.locked():
                    self._loading.pop(record.id, None)
            try:
                yield found, room
            finally:
                if drops == self._drops:  # otherwise it may be gone by now
                    self._remember(found)

    async def loaded(self, record: FootprintRecord) -> Footprint:
        """What is in its file, which takes ``READ_BYTES`` a place. Raises NotFound where it is dropped meanwhile, and
        StoreUnavailable."""
        parts: list[bytes] = []
        while sum(map(len, parts)) < record.size:
            part = await self._kept.footprint_part(record.id, len(parts))
            if not part:
                raise footprint_not_kept(record.id)
            parts.append(part)
        return await maybe_in_thread(False, _decoded, parts)

    def _remember(self, asked: Asked) -> None:
        """Keep what was asked last in memory, as much as may be there."""
        most = self._settings.loaded_footprint_bytes
        self._loaded.pop(asked.record.id, None)
        if asked.nbytes <= most:
            self._loaded[asked.record.id] = asked
        while sum(item.nbytes for item in self._loaded.values()) > most:
            self._loaded.popitem(last=False)


def _encoded(footprint: Footprint) -> tuple[str, list[bytes]]:
    """What a record says of it, and its file in parts."""
    from engine.footprint import stored  # noqa: PLC0415 - the Arrow library is 33 MB

    sink = io.BytesIO()
    stored.write(footprint, sink)
    data = sink.getbuffer()
    return json.dumps(about(footprint)), [bytes(data[at : at + PART]) for at in range(0, len(data), PART)]


def _decoded(parts: Sequence[bytes]) -> Footprint:
    from engine.footprint import stored  # noqa: PLC0415

    # It is ours, and counted: what it may take was looked at when it came.
    return stored.read(io.BytesIO(b"".join(parts)), Budget(1 << 62))
