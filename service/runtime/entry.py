"""One machine as the service keeps it, and the way every change of it goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType

from engine.errors import NotFound, OutOfMemory
from engine.machine import VirtualMachine
from engine.machine.summary import Summary
from service.problems import NotReady, StoreUnavailable
from service.runtime.broker import Broker
from service.runtime.changes import batches_of, changes_of
from service.runtime.commit_hooks import CommitHooks
from service.runtime.events import EventLog
from service.runtime.group import Group
from service.runtime.offload import maybe_in_thread
from service.runtime.repository import Repository
from service.runtime.room import Room
from service.runtime.traces import TraceStore
from service.runtime.vm_lock import VmLock
from service.storage.records import VmRecord

# Of clones with more frames it takes a while to copy them.
_INLINE_FRAMES = 256
# How often the loop goes round before a group is committed that nobody joins: requests that have come are read then.
_ROUNDS = 2


def unknown_vm(vm_id: str) -> NotFound:
    return NotFound("must be the id of an existing VM", field="vm", value=vm_id)


@dataclass(frozen=True, slots=True)
class Listed:
    """One machine in a list: what it is at a revision."""

    id: str
    created: datetime
    revision: int
    summary: Summary


class Mutation:
    """A change of one machine: all of it is committed, or nothing. See ``Entry.mutation``.

    ``machine`` takes the changes. With ``deletes`` it is deleted instead, and whoever waits for it finds it gone.
    """

    __slots__ = ("_entry", "_group", "_image", "_patient", "deletes", "hooks", "joins", "machine")

    def __init__(self, entry: Entry, hooks: CommitHooks, *, patient: bool, image: bool, joins: bool) -> None:
        self._entry = entry
        self._patient = patient
        self._image = image
        self.hooks = hooks
        self.joins = joins
        self.deletes = False

    async def __aenter__(self) -> Mutation:
        entry = self._entry
        place = entry.lock.ask(joins=self.joins)
        if place is not None:
            try:
                await entry.lock.turn(place, patient=self._patient)
            except BaseException:
                if not entry.lock.leave(place):
                    entry.pass_on()
                raise
        try:
            self._group = entry.group or await entry.begin()
            self.machine = self._group.machine.successor()
            entry.room.open(self.machine, image=self._image)
        except BaseException:
            entry.pass_on()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refusal = self._end(error)
        try:
            # Who is refused waits, too: what it was judged by is not durable before.
            if self._group.changes and (error is None or isinstance(error, Exception)):
                await self._group.ended()
            if refusal is not None:
                raise refusal from None
        finally:
            # No variable keeps them: with their tracebacks they would be circles, and hold the request's body.
            del refusal, error, trace

    def _end(self, error: BaseException | None) -> BaseException | None:
        """Add the change to its group, unless it has failed, and let others begin. What to raise in place of
        ``error``."""
        entry, refusal = self._entry, None
        try:
            # An allocation of the host that failed is counted, so that a retry finds the next one.
            if error is None or isinstance(error, OutOfMemory):
                try:
                    entry.room.check(self.machine)
                    entry.accept(self)
                    return None
                except BaseException as fault:  # noqa: BLE001 - raised by the caller
                    error = refusal = fault
            entry.reject(self.machine)
            return entry.room.refusal() if entry.room.is_refusal(error) else refusal
        finally:
            entry.pass_on()
            del error, refusal


@dataclass(slots=True, eq=False)
class Entry:
    """One machine and what the service keeps about it.

    ``sequence`` is its number in the store, which no client is shown; ``ordinal`` counts the machines of its tenant, as
    far as this process knows them. ``revision`` counts committed changes. ``room`` is what its frames may take.
    ``loaded`` is the machine as committed, None until it is asked for; ``uses`` are requests that need it to stay.
    ``gone`` means deleted or, with ``lost``, in the hands of another process. ``group`` are the changes that are made
    and not committed yet.
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
    group: Group | None = None
    committing: asyncio.Task[None] | None = None
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

    @property
    def held_revision(self) -> int:
        """For who holds the machine: the revision of the state that it changes."""
        return self.revision + (self.group.changes if self.group is not None else 0)

    def mutation(
        self, hooks: CommitHooks, *, patient: bool = False, image: bool = False, joins: bool = False
    ) -> Mutation:
        """The machine, held for one mutation, which is committed as one when the block ends without an exception.

        ``hooks`` say what is stored with it: for a request those of its key, which it must not go without.
        Readers see it from then on. Leaving with an exception, or a commit that fails, leaves the machine as it was;
        but an allocation of the host that failed is counted, so that a retry finds the next one. ``image``: it loads a
        memory image, which has limits of its own. ``joins``: its block takes well under a millisecond, awaits nothing
        and makes no traces; it may share a transaction with others like it (see ``group``).
        Raises Busy after the configured wait unless ``patient``, NotFound if the machine was deleted meanwhile,
        StoreUnavailable.
        """
        return Mutation(self, hooks, patient=patient, image=image, joins=joins)

    # The steps of a mutation, for who holds the machine

    async def begin(self) -> Group:
        """A new group on the machine as committed. Raises as ``load``."""
        await self.load()
        before = self.machine
        if before.borrows_frames:
            await maybe_in_thread(before.frames_in_use <= _INLINE_FRAMES, before.own_frames)
        self.group = Group(before)
        return self.group

    def accept(self, change: Mutation) -> None:
        """Add a change to the group, and what events tell of it."""
        assert self.group is not None
        after = change.machine
        self.events.stage([*changes_of(self.group.machine, after), *batches_of(self.traces.added())])
        self.group.add(after, change.hooks, joins=change.joins, deletes=change.deletes)

    def reject(self, after: VirtualMachine) -> None:
        """Undo what a change has made of the machine of the group, which stays as it was before that."""
        assert self.group is not None
        self.group.machine.withdraw(after)
        self.events.forget()
        if not self.group.changes:
            self.room.release()
            self.traces.discard()

    def pass_on(self) -> None:
        """Let the next change begin, in the same group if it may; otherwise that is committed first.

        Those may join it, too, whose requests are about to be read: clients that were all answered a moment ago.
        """
        group = self.group
        if group is None or not group.changes:
            self.group = None
            self.lock.give()
        elif group.takes_more and self.lock.next_joins:
            self.lock.give()
        elif group.takes_more and self.repository.durable and self.lock.lend():
            self._await_more(group, _ROUNDS)
        else:
            self._commit(group)

    def _await_more(self, group: Group, rounds: int) -> None:
        asyncio.get_running_loop().call_soon(self._look, group, group.changes, rounds)

    def _look(self, group: Group, changes: int, rounds: int) -> None:
        """Commit a group that nobody joins; who did since there were so many ``changes`` sees to it himself."""
        if self.group is not group or group.changes != changes:
            return
        if rounds and self.lock.lent:
            self._await_more(group, rounds - 1)
        elif self.lock.recall():
            self._commit(group)

    def _commit(self, group: Group) -> None:
        """Make a group durable, then show it; everybody else waits."""
        if self.repository.durable:
            # In a task of its own: a change that is cancelled takes no other along.
            self.committing = asyncio.get_running_loop().create_task(self._store(group))
            return
        error: Exception | None = None
        try:
            self._store_of(group)
        except Exception as fault:  # noqa: BLE001 - told to those whose changes they were
            error = fault
        self._over(group, error)

    async def _store(self, group: Group) -> None:
        error: BaseException | None = None
        try:
            await self._store_of(group)()
        except BaseException as fault:  # noqa: BLE001 - told to those whose changes they were
            error = fault
        # Nothing is awaited between the commit and what shows it.
        self._over(group, error)
        if error is not None and not isinstance(error, Exception):
            raise error

    def _store_of(self, group: Group) -> Callable[[], Awaitable[None]]:
        """What stores a group. Raises NotFound or StoreUnavailable if the machine is gone."""
        if self.gone:
            raise self.absence()
        repository, hooks = self.repository, group.hooks
        if group.deletes:
            return lambda: repository.delete(self.record(), hooks)
        traces, dropped = self.traces.coming()
        log, next_event = self.events.coming()

        def commit() -> Awaitable[None]:
            before, after = self.record(), self.record(self.revision + group.changes, next_event)
            machines = (group.before, group.machine)
            return repository.commit(before, after, machines, traces, dropped, log, hooks)

        return commit

    def _over(self, group: Group, error: BaseException | None) -> None:
        """The transaction has ended: show what was committed, or leave the machine as it was before."""
        try:
            if error is None:
                self._settle(group)
            else:
                self._withdraw(group, error)
        except BaseException as fault:
            error = fault
            raise
        finally:
            self.group = self.committing = None
            group.end(error)
            self.lock.give()

    def _withdraw(self, group: Group, error: BaseException) -> None:
        if isinstance(error, StoreUnavailable) and not error.certain:
            self.doubtful = True
        group.before.withdraw(group.machine)
        self.room.release()
        self.traces.discard()
        self.events.discard()

    def _settle(self, group: Group) -> None:
        if group.deletes:
            self.gone = True
            self.room.settle(0)
            self.events.close("deleted")
            self.broker.end(self.absence)
        else:
            self.traces.settle()
            self.events.settle()
            self.room.settle(0 if self.lost else group.machine.frames_in_use)
        self.loaded = group.machine
        self.revision += group.changes
        if len(group.machine.config.vcpus) > len(group.before.config.vcpus):
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
