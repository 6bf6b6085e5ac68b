"""The machines that exist."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from engine.config import VmConfig
from engine.errors import Busy, EngineError, InvalidValue, LimitExceeded
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.outline import Outline
from service.problems import NotReady, StoreUnavailable
from service.runtime.batches import Parts
from service.runtime.changes import created
from service.runtime.entry import Entry, Listed, unknown_vm
from service.runtime.events import EventLog, LogStats
from service.runtime.home import Home
from service.runtime.offload import maybe_in_thread
from service.runtime.traces import TraceStore
from service.runtime.writer import Writer
from service.settings import Settings
from service.storage.records import VmRecord

__all__ = ["Entry", "Registry", "unknown_vm"]

_INLINE_SLOTS = 4


def build(config: VmConfig, slots: Sequence[SlotSpec], *, spp: bool) -> VirtualMachine:
    """A machine with its slots; an error of a slot names its place in ``memory_slots``."""
    machine = VirtualMachine.create(config)
    for position, spec in enumerate(slots):
        try:
            if any(spec.key == earlier.key for earlier in slots[:position]):
                raise InvalidValue("a slot number occurs once", field="slot", value=spec.slot)
            machine.set_slot(spec)
        except EngineError as error:
            error.field = f"memory_slots[{position}].{error.field}"
            raise
    if spp:
        machine.enable_spp()
    return machine


class Registry:
    """Creates, finds, lists and deletes machines; used from the event loop only.

    Machines of a durable home are read when they are first asked for, and the least recently used are forgotten while
    there are more than ``max_loaded_vms``.
    """

    def __init__(self, settings: Settings, home: Home) -> None:
        self._settings = settings
        self.home = home
        self._entries: dict[str, Entry] = {}
        self._sequence = 0
        self._coming = 0
        self.logs = LogStats()
        self.parts = Parts(home.exit_part)

    # What the home says

    def arrive(self, machines: Sequence[VmRecord], *, goes_on: bool) -> None:
        """The store has these machines; with ``goes_on`` those in memory are the same."""
        if not goes_on:
            self.leave()
        for record in machines:
            if record.id not in self._entries:
                since = datetime.fromisoformat(record.created)
                entry = self._entry(record.id, record.number, since, record.revision, record.tenant)
                entry.events.adopt(record.next_event)
                self._entries[record.id] = entry
            self._sequence = max(self._sequence, record.number)

    def leave(self) -> None:
        """Another process may change the store: whatever is under way will find its machine gone."""
        for entry in self._entries.values():
            entry.gone = entry.lost = True
            entry.events.close("store-lost")
            entry.desk.end(entry.absence)
        self._entries = {}

    def end_streams(self, reason: str) -> None:
        """Let every reader of events go: the service stops."""
        for entry in self._entries.values():
            entry.events.close(reason)

    # What requests ask for

    @asynccontextmanager
    async def using(self, vm_id: str | None) -> AsyncIterator[None]:
        """A request about a machine, or about none: what it names is loaded, and stays so until the end.

        Raises NotReady while the home is not open, StoreUnavailable. A machine that does not exist is the route's
        to report.
        """
        if not self.home.open:
            raise NotReady(self.home.trouble)
        entry = self._entries.get(vm_id) if vm_id is not None else None
        if entry is None:
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

    async def _load(self, entry: Entry) -> None:
        if entry.loaded is not None and not (entry.doubtful and self.home.ready):
            return
        if entry.doubtful:
            try:
                async with entry.writer.hold():
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
            self._entries.pop(entry.id, None)

    def _forget_unused(self) -> None:
        loaded = [entry for entry in self._entries.values() if entry.loaded is not None]
        for entry in loaded[: max(0, len(loaded) - self._settings.max_loaded_vms)]:
            if not entry.uses and not entry.doubtful:
                entry.unload()

    async def create(self, config: VmConfig, slots: Sequence[SlotSpec], *, spp: bool, tenant: str) -> Entry:
        """A new machine of ``tenant`` under a fresh unguessable id, committed.

        Raises LimitExceeded, what the engine says of the input, or StoreUnavailable.
        """
        settings = self._settings
        self._drop_gone()
        if len(self._entries) + self._coming >= settings.max_vms:
            rule = f"at most {settings.max_vms} VMs may exist at one time"
            raise LimitExceeded(rule, field="max_vms", value=settings.max_vms)
        self._coming += 1
        try:
            machine = await maybe_in_thread(len(slots) <= _INLINE_SLOTS, build, config, slots, spp=spp)
            self._sequence += 1
            entry = self._entry(f"vm_{secrets.token_hex(8)}", self._sequence, datetime.now(UTC), 1, tenant)
            log, next_event = entry.events.coming([created(machine)])
            await self.home.create(entry.record(next_event=next_event), machine, log)
        finally:
            self._coming -= 1
        entry.events.settle()
        entry.loaded = machine
        self._entries[entry.id] = entry
        if self.home.durable:
            self._forget_unused()
        return entry

    def _entry(self, vm_id: str, sequence: int, since: datetime, revision: int, tenant: str) -> Entry:
        settings = self._settings
        traces = TraceStore(
            settings.kept_traces,
            settings.kept_exit_records,
            settings.kept_trace_days,
            loaded_exit_records=settings.loaded_exit_records,
            load=self.home.loader(sequence),
        )
        events = EventLog(
            settings.kept_events,
            settings.kept_event_days,
            load=self.home.event_loader(sequence),
            stats=self.logs,
        )
        writer = Writer(settings.busy_timeout)
        return Entry(vm_id, sequence, since, revision, tenant, self.home, writer, traces, events)

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
        self._entries = {vm_id: entry for vm_id, entry in self._entries.items() if not entry.gone}

    async def page(self, tenant: str, after: int, limit: int) -> tuple[list[Listed], int | None]:
        """Up to ``limit`` machines of ``tenant`` after sequence number ``after``, and where the next page starts.

        Machines that are not in memory stay out of it: what a list shows is in their heads.
        """
        later = sorted(
            (entry for entry in self.all() if entry.tenant == tenant and entry.sequence > after),
            key=lambda entry: entry.sequence,
        )
        found = later[:limit]
        stored = [entry.sequence for entry in found if entry.loaded is None and not entry.doubtful]
        outlines = await self.home.outlines(stored) if stored else {}
        shown = [await self._shown(entry, *outlines.get(entry.sequence, (0, None))) for entry in found]
        following = found[-1].sequence if limit < len(later) else None
        return [listed for listed in shown if listed is not None], following

    async def _shown(self, entry: Entry, revision: int, outline: Outline | None) -> Listed | None:
        """A machine for a list, given what the store said of it; None if it is gone."""
        if entry.loaded is None or entry.doubtful:
            if outline is not None and not entry.gone:
                return Listed(entry.id, entry.created, revision, outline, entry.sequence)
            entry.uses += 1
            try:
                await self._load(entry)
            finally:
                entry.uses -= 1
        return None if entry.gone else entry.listed

    def forget(self, entry: Entry) -> None:
        """Delete the machine with the commit of the mutation that the caller is in; whoever waits finds it gone."""
        entry.leaving = True
