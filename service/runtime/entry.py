"""One machine as the service keeps it, and the way every change of it goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from engine.errors import NotFound, OutOfMemory
from engine.machine import VirtualMachine
from engine.machine.summary import Summary
from service.problems import NotReady, StoreUnavailable
from service.runtime.broker import Broker
from service.runtime.changes import batches_of, changes_of
from service.runtime.commit_hooks import CommitHooks
from service.runtime.events import EventLog
from service.runtime.offload import maybe_in_thread
from service.runtime.repository import Repository
from service.runtime.room import Room
from service.runtime.traces import TraceStore
from service.runtime.vm_lock import VmLock
from service.storage.records import VmRecord

# Of clones with more frames it takes a while to copy them.
_INLINE_FRAMES = 256


def unknown_vm(vm_id: str) -> NotFound:
    return NotFound("must be the id of an existing VM", field="vm", value=vm_id)


@dataclass(frozen=True, slots=True)
class Listed:
    """One machine in a list: what it is at a revision."""

    id: str
    created: datetime
    revision: int
    summary: Summary


@dataclass(slots=True, eq=False)
class Mutation:
    """A change of one machine that is under way: all of it is committed, or nothing.

    ``machine`` takes the changes; ``hooks`` say what is stored with them. With ``deletes`` the machine is deleted
    instead, and whoever waits for it finds it gone.
    """

    machine: VirtualMachine
    hooks: CommitHooks
    deletes: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """One machine and what the service keeps about it.

    ``sequence`` is its number in the store, which no client is shown; ``ordinal`` counts the machines of its tenant, as
    far as this process knows them. ``revision`` counts committed changes. ``room`` is what its frames may take.
    ``loaded`` is the machine as committed, None until it is asked for; ``uses`` are requests that need it to stay.
    ``gone`` means deleted or, with ``lost``, in the hands of another process.
    """

    id: str
    sequence: int
    created: datetime
    revision: int
    tenant: str
    repository: Repository
    lock: VmLock
    traces: TraceStore
    events: EventLog
    room: Room
    ordinal: int = 0
    loaded: VirtualMachine | None = None
    uses: int = 0
    gone: bool = False
    lost: bool = False
    doubtful: bool = False
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    broker: Broker = field(default_factory=Broker)
    created_text: str = field(init=False)

    def __post_init__(self) -> None:
        self.created_text = self.created.astimezone(UTC).isoformat()

    @property
    def machine(self) -> VirtualMachine:
        """The machine as committed; a mutation that is under way has its own."""
        if self.loaded is None:
            raise NotReady("the machine is being read from the store")
        return self.loaded

    @property
    def listed(self) -> Listed:
        """The machine as a list shows it."""
        return Listed(self.id, self.created, self.revision, self.machine.summary())

    @property
    def require_match(self) -> bool:
        return self.machine.config.require_match

    @asynccontextmanager
    async def mutation(
        self, hooks: CommitHooks, *, patient: bool = False, image: bool = False
    ) -> AsyncIterator[Mutation]:
        """The machine, held for one mutation, which is committed as one when the block ends without an exception.

        ``hooks`` say what is stored with it: for a request those of its key, which it must not go without.
        Readers see it from then on. Leaving with an exception, or a commit that fails, leaves the machine as it was;
        but an allocation of the host that failed is counted, so that a retry finds the next one. ``image``: it loads a
        memory image, which has limits of its own.
        Raises Busy after the configured wait unless ``patient``, NotFound if the machine was deleted meanwhile,
        StoreUnavailable.
        """
        await self.lock.take(patient=patient)
        try:
            await self.load()
            before = self.machine
            if before.borrows_frames:
                await maybe_in_thread(before.frames_in_use <= _INLINE_FRAMES, before.own_frames)
            after = before.successor()
            self.room.open(after, image=image)
            change = Mutation(after, hooks)
            failed: OutOfMemory | None = None
            try:
                try:
                    yield change
                except OutOfMemory as error:
                    failed = error
                self.room.check(after)
                await self._commit(before, change)
            except BaseException as error:
                if isinstance(error, StoreUnavailable) and not error.certain:
                    self.doubtful = True
                before.withdraw(after)
                self.room.release()
                self.traces.discard()
                self.events.discard()
                # No variable keeps the new one: with its traceback it would be a circle, and hold the request's body.
                if self.room.is_refusal(error):
                    raise self.room.refusal() from None
                raise
            if failed is not None:
                raise failed
        finally:
            self.lock.give()

    async def _commit(self, before: VirtualMachine, change: Mutation) -> None:
        """Make the change durable, then show it. Nothing is awaited between the one and the other."""
        if self.gone:
            raise self.absence()
        after = change.machine
        if change.deletes:
            await self.repository.delete(self.record(), change.hooks)
            self.gone = True
            self.room.settle(0)
            self.events.close("deleted")
            self.broker.end(self.absence)
        else:
            added = self.traces.added()
            traces, dropped = self.traces.coming()
            log, next_event = self.events.coming([*changes_of(before, after), *batches_of(added)])
            record = self.record(self.revision + 1, next_event)
            await self.repository.commit(self.record(), record, (before, after), traces, dropped, log, change.hooks)
            self.traces.settle()
            self.events.settle()
            self.room.settle(0 if self.lost else after.frames_in_use)
        self.loaded = after
        self.revision += 1
        if len(after.config.vcpus) > len(before.config.vcpus):
            # What tools make of it is no part of the commit, which has been made.
            asyncio.get_running_loop().call_soon(self.broker.vcpus_came)

    def record(self, revision: int | None = None, next_event: int | None = None) -> VmRecord:
        """The entry as the store keeps it, without its head."""
        revision = self.revision if revision is None else revision
        next_event = self.events.next_id if next_event is None else next_event
        return VmRecord(self.sequence, self.id, self.created_text, revision, tenant=self.tenant, next_event=next_event)

    async def load(self) -> None:
        """Read the machine from the store unless it is here. Raises NotFound if it is gone, StoreUnavailable."""
        if self.gone:
            raise self.absence()
        if self.loaded is not None and not self.doubtful:
            return
        async with self.loading:
            if self.doubtful:
                # A commit may or may not have been made; what the store says now is what was.
                if await self.repository.revision(self.sequence) != self.revision:
                    self.loaded = None
                self.doubtful = False
            if self.loaded is None:
                found = await self.repository.load(self.sequence)
                if found is None:
                    self.gone = True
                    self.events.close("deleted")
                    raise unknown_vm(self.id)
                record, machine, traces = found
                self.revision = record.revision
                self.events.adopt(record.next_event)
                self.traces.adopt(traces)
                self.loaded = machine

    def absence(self) -> Exception:
        """Why there is no such machine any more."""
        if self.lost:
            return StoreUnavailable("another process has taken the store over; nothing was changed")
        return unknown_vm(self.id)

    def unload(self) -> None:
        """Forget the machine; the store has it. Only while nobody uses it."""
        self.loaded = None
        self.traces.adopt(())
