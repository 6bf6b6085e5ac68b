"""The machines that exist."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from engine.errors import Busy, EngineError, InvalidValue, LimitExceeded
from engine.kvm.slots import SlotSpec
from engine.machine import FRAME_BYTES, VirtualMachine
from engine.machine.summary import Summary
from engine.state.config import VmConfig
from service.platform.stamps import moment
from service.problems import StoreUnavailable
from service.runtime.batches import Parts
from service.runtime.changes import created
from service.runtime.commit_hooks import CommitHooks
from service.runtime.entry import Entry, Listed, unknown_vm
from service.runtime.events import EventLog, LogStats
from service.runtime.offload import maybe_in_thread
from service.runtime.repository import Repository
from service.runtime.room import Room
from service.runtime.shares import Share, Tenants, one_tenant
from service.runtime.traces import TraceStore
from service.runtime.vm_lock import VmLock
from service.settings import Settings
from service.storage.records import VmRecord

__all__ = ["Entry", "Registry", "unknown_vm"]

_INLINE_SLOTS = 4
# Of machines with more frames it takes a while to tell which they are.
_INLINE_FRAMES = 1 << 14

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Machines of one tenant are apart by this at least, so that their times put them in order.
_TICK = timedelta(microseconds=1)


def build(config: VmConfig, slots: Sequence[SlotSpec], *, spp: bool) -> VirtualMachine:
    """A machine with its slots; an error of a slot names its place in ``memory_slots``."""
    machine = VirtualMachine.create(config)
    for position, spec in enumerate(slots):
        try:
            if spec.key in machine.memory_slots.known:
                raise InvalidValue("must not occur twice", field="slot", value=spec.slot)
            machine.set_slot(spec)
        except LimitExceeded:
            raise  # the machine's own: it is not the slot that is wrong
        except EngineError as error:
            error.field = f"memory_slots[{position}].{error.field}"
            raise
    if spp:
        machine.enable_spp()
    return machine


class Registry:
    """Creates, finds, lists and deletes machines; used from the event loop only.

    Machines of a durable repository are read when they are first asked for, and the least recently used are forgotten
    while there are more than ``max_loaded_vms``.
    """

    def __init__(self, settings: Settings, repository: Repository, tenants: Tenants = one_tenant) -> None:
        self._settings = settings
        self.repository = repository
        self._entries: dict[str, Entry] = {}
        self._sequence = 0
        self._made: Counter[str] = Counter()
        self._latest: dict[str, datetime] = {}
        self._places = Share("max_vms", settings.max_vms, "VMs may exist at one time", tenants)
        self._memory = Share(
            "max_memory_bytes", settings.max_memory_bytes, "bytes may be in the frames of all VMs", tenants, firm=True
        )
        self.streams = Share(
            "max_event_streams", settings.max_event_streams, "streams of events may be open at one time", tenants
        )
        self.logs = LogStats()
        self.parts = Parts(repository.exit_part)

    # What the repository says

    def arrive(self, machines: Sequence[VmRecord], *, goes_on: bool) -> None:
        """The store has these machines; with ``goes_on`` those in memory are the same."""
        if not goes_on:
            self.leave()
        for record in machines:
            if record.id not in self._entries:
                since = datetime.fromisoformat(record.created)
                entry = self._entry(record.id, record.number, since, record.revision, record.tenant)
                entry.events.adopt(record.next_event)
                self._keep(entry, record.frames)
            self._sequence = max(self._sequence, record.number)

    def leave(self) -> None:
        """Another process may change the store: whatever is under way will find its machine gone."""
        for entry in self._entries.values():
            entry.gone = entry.lost = True
            entry.events.close("store-lost")
            entry.broker.end(entry.absence)
            self._places.count(entry.tenant, -1)
            entry.room.settle(0)
        self._entries = {}
        self._made.clear()
        self._latest.clear()

    def end_streams(self, reason: str) -> None:
        """Let every reader of events go: the service stops."""
        for entry in self._entries.values():
            entry.events.close(reason)

    # What requests ask for

    @asynccontextmanager
    async def using(self, vm_id: str, tenant: str) -> AsyncIterator[None]:
        """A request of ``tenant`` about a machine, which is loaded if it is the tenant's, and stays so until the end.

        Raises NotReady, StoreUnavailable. A machine that does not exist for the tenant is the caller's to report.
        """
        entry = self._entries.get(vm_id)
        if entry is None or entry.tenant != tenant:
            yield
            return
        # Now the most recently used.
        self._entries[entry.id] = self._entries.pop(entry.id)
        entry.uses += 1
        try:
            await self._load(entry)
            yield
        finally:
            entry.uses -= 1
            if self._memory.used > self._settings.max_loaded_bytes:
                self._forget_unused()

    async def _load(self, entry: Entry) -> None:
        if entry.loaded is not None and not (entry.doubtful and self.repository.ready):
            return
        if entry.doubtful:
            try:
                async with entry.lock.hold():
                    await self._read(entry)
            except (Busy, StoreUnavailable):
                # What was committed before the doubtful change is still a state that clients may be shown.
                if entry.loaded is None:
                    raise
        else:
            await self._read(entry)
        self._forget_unused()

    async def _read(self, entry: Entry) -> None:
        try:
            await entry.load()
        except EngineError:
            self._drop(entry)

    def _forget_unused(self) -> None:
        loaded = [entry for entry in self._entries.values() if entry.loaded is not None]
        excess = len(loaded) - self._settings.max_loaded_vms
        surplus = sum(entry.room.used for entry in loaded) - self._settings.max_loaded_bytes
        for entry in loaded[:-1]:
            if excess <= 0 and surplus <= 0:
                return
            if not entry.uses and not entry.doubtful:
                excess -= 1
                surplus -= entry.room.used
                entry.unload()

    async def create(
        self, config: VmConfig, slots: Sequence[SlotSpec], *, spp: bool, tenant: str, hooks: CommitHooks
    ) -> Entry:
        """A new machine of ``tenant`` under a fresh unguessable id, committed with what ``hooks`` say.

        Raises LimitExceeded, what the engine says of the input, or StoreUnavailable.
        """
        quick = len(slots) <= _INLINE_SLOTS
        return await self._create(lambda: build(config, slots, spp=spp), quick, tenant, hooks)

    async def clone(self, origin: Entry, name: str | None, hooks: CommitHooks) -> Entry:
        """A new machine of the tenant of ``origin`` that begins as that is, committed with what ``hooks`` say. It keeps
        the name unless it is given one.

        Counted is what it may come to have for itself: all frames, though they are shared until it is changed.
        Raises LimitExceeded, StoreUnavailable.
        """
        machine = origin.machine
        label = machine.config.name if name is None else name
        quick = machine.frames_in_use <= _INLINE_FRAMES
        return await self._create(lambda: machine.clone(label), quick, origin.tenant, hooks, origin.id)

    async def _create(
        self,
        make: Callable[[], VirtualMachine],
        quick: bool,
        tenant: str,
        hooks: CommitHooks,
        origin: str | None = None,
    ) -> Entry:
        self._drop_gone()
        self._places.take(tenant)
        room = self._room(tenant)
        try:
            machine = await maybe_in_thread(quick, make)
            room.admit(machine)
            room.settle(machine.frames_in_use)  # while the store commits it, others are refused what it takes
            self._sequence += 1
            now = max(datetime.now(UTC), self._latest.get(tenant, _EPOCH) + _TICK)
            entry = self._entry(f"vm_{secrets.token_hex(8)}", self._sequence, now, 1, tenant)
            entry.events.stage([created(machine, origin)])
            log, next_event = entry.events.coming()
            await self.repository.create(entry.record(next_event=next_event), machine, log, hooks)
        except LimitExceeded as error:
            if room.is_refusal(error):
                raise room.refusal() from None
            raise
        finally:
            self._places.count(tenant, -1)
            room.settle(0)  # from here on the entry counts it
        entry.events.settle()
        entry.loaded = machine
        self._keep(entry, machine.frames_in_use)
        if self.repository.durable:
            self._forget_unused()
        return entry

    def _keep(self, entry: Entry, used: int) -> None:
        """There is a machine more, of so many frames."""
        self._entries[entry.id] = entry
        self._places.count(entry.tenant, 1)
        self._made[entry.tenant] += 1
        self._latest[entry.tenant] = max(self._latest.get(entry.tenant, _EPOCH), entry.created)
        entry.ordinal = self._made[entry.tenant]
        entry.room.settle(used)

    def _entry(self, vm_id: str, sequence: int, since: datetime, revision: int, tenant: str) -> Entry:
        settings = self._settings
        traces = TraceStore(
            settings.kept_traces,
            settings.kept_exit_records,
            settings.kept_trace_days,
            loaded_exit_records=settings.loaded_exit_records,
            load=self.repository.loader(sequence),
        )
        events = EventLog(
            settings.kept_events,
            settings.kept_event_days,
            load=self.repository.event_loader(sequence),
            stats=self.logs,
        )
        lock = VmLock(settings.busy_timeout)
        room = self._room(tenant)
        return Entry(vm_id, sequence, since, revision, tenant, self.repository, lock, traces, events, room)

    def _room(self, tenant: str) -> Room:
        """For one machine more of a tenant."""
        images = self._settings.max_image_memory_bytes // FRAME_BYTES
        return Room(self._memory, tenant, self._settings.max_table_frames, images)

    def get(self, vm_id: str) -> Entry:
        """The machine called ``vm_id``. Raises NotFound."""
        entry = self._entries.get(vm_id)
        if entry is None or entry.gone:
            raise unknown_vm(vm_id)
        return entry

    def find(self, vm_id: str) -> Entry | None:
        """The same, None if there is no such machine."""
        entry = self._entries.get(vm_id)
        return None if entry is None or entry.gone else entry

    def all(self) -> list[Entry]:
        """The machines of every tenant, loaded or not. From any thread."""
        return [entry for entry in list(self._entries.values()) if not entry.gone]

    def _drop_gone(self) -> None:
        for entry in [entry for entry in self._entries.values() if entry.gone]:
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        """It exists no longer."""
        if self._entries.get(entry.id) is entry:
            del self._entries[entry.id]
            self._places.count(entry.tenant, -1)
            entry.room.settle(0)

    async def page(self, tenant: str, after: int, limit: int) -> tuple[list[Listed], int | None]:
        """Up to ``limit`` machines of ``tenant`` after the moment ``after``, and where the next page starts.

        Machines that are not in memory stay out of it: what a list shows is in their heads.
        """
        later = sorted(
            (entry for entry in self.all() if entry.tenant == tenant and moment(entry.created) > after),
            key=lambda entry: entry.created,
        )
        found = later[:limit]
        stored = [entry.sequence for entry in found if entry.loaded is None and not entry.doubtful]
        summaries = await self.repository.summaries(stored) if stored else {}
        shown = [await self._shown(entry, *summaries.get(entry.sequence, (0, None))) for entry in found]
        following = moment(found[-1].created) if limit < len(later) else None
        return [listed for listed in shown if listed is not None], following

    async def _shown(self, entry: Entry, revision: int, summary: Summary | None) -> Listed | None:
        """A machine for a list, given what the store said of it; None if it is gone."""
        if entry.loaded is None or entry.doubtful:
            if summary is not None and not entry.gone:
                return Listed(entry.id, entry.created, revision, summary)
            entry.uses += 1
            try:
                await self._load(entry)
            finally:
                entry.uses -= 1
        return None if entry.gone else entry.listed
