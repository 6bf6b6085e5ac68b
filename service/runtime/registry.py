"""The machines that exist."""

from __future__ import annotations

import bisect
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from engine.config import VmConfig
from engine.errors import EngineError, InvalidValue, LimitExceeded, NotFound
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from service.runtime.offload import maybe_in_thread
from service.runtime.traces import TraceStore
from service.runtime.writer import Writer
from service.settings import Settings

_INLINE_SLOTS = 4


@dataclass(slots=True)
class Entry:
    """One machine and what the service keeps about it. ``sequence`` orders entries by creation."""

    id: str
    sequence: int
    machine: VirtualMachine
    writer: Writer
    traces: TraceStore
    created: datetime
    tenant: str
    revision: int = 1
    gone: bool = field(default=False)

    @property
    def require_match(self) -> bool:
        return self.machine.config.require_match

    @asynccontextmanager
    async def mutation(self) -> AsyncIterator[VirtualMachine]:
        """The machine, held for one mutation. Leaving without an exception counts as one new revision.

        Raises Busy after the configured wait, NotFound if the machine was deleted meanwhile.
        """
        async with self.writer.hold():
            if self.gone:
                raise unknown_vm(self.id)
            yield self.machine
            self.revision += 1


def unknown_vm(vm_id: str) -> NotFound:
    return NotFound("must be the id of an existing VM", field="vm", value=vm_id)


def _build(config: VmConfig, slots: Sequence[SlotSpec], *, spp: bool) -> VirtualMachine:
    """A machine with its slots; an error of a slot names its place in ``memory_slots``."""
    machine = VirtualMachine.create(config)
    for position, spec in enumerate(slots):
        try:
            if any(spec.slot == earlier.slot for earlier in slots[:position]):
                raise InvalidValue("a slot number occurs once", field="slot", value=spec.slot)
            machine.set_slot(spec)
        except EngineError as error:
            error.field = f"memory_slots[{position}].{error.field}"
            raise
    if spp:
        machine.enable_spp()
    return machine


class Registry:
    """Creates, finds, lists and deletes machines; used from the event loop only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._entries: dict[str, Entry] = {}
        self._sequence = 0
        self._coming = 0

    async def create(self, config: VmConfig, slots: Sequence[SlotSpec], *, spp: bool, tenant: str) -> Entry:
        """A new machine of ``tenant`` under a fresh id. Raises LimitExceeded, or what the engine says of the input."""
        settings = self._settings
        if len(self._entries) + self._coming >= settings.max_vms:
            rule = f"at most {settings.max_vms} VMs may exist at one time"
            raise LimitExceeded(rule, field="max_vms", value=settings.max_vms)
        self._coming += 1
        try:
            machine = await maybe_in_thread(len(slots) <= _INLINE_SLOTS, _build, config, slots, spp=spp)
        finally:
            self._coming -= 1
        self._sequence += 1
        entry = Entry(
            id=f"vm_{secrets.token_hex(8)}",
            sequence=self._sequence,
            machine=machine,
            writer=Writer(settings.busy_timeout),
            traces=TraceStore(settings.kept_traces, settings.kept_exit_records),
            created=datetime.now(UTC),
            tenant=tenant,
        )
        self._entries[entry.id] = entry
        return entry

    def get(self, vm_id: str) -> Entry:
        """The machine called ``vm_id``. Raises NotFound."""
        entry = self._entries.get(vm_id)
        if entry is None:
            raise unknown_vm(vm_id)
        return entry

    def all(self) -> list[Entry]:
        """The machines of every tenant."""
        return list(self._entries.values())

    def page(self, tenant: str, after: int, limit: int) -> tuple[list[Entry], int | None]:
        """Up to ``limit`` machines of ``tenant`` after sequence number ``after``, and where the next page starts."""
        entries = [entry for entry in self._entries.values() if entry.tenant == tenant]
        start = bisect.bisect_right(entries, after, key=lambda entry: entry.sequence)
        found = entries[start : start + limit]
        return found, found[-1].sequence if start + limit < len(entries) else None

    def forget(self, entry: Entry) -> None:
        """Remove the machine; the caller holds its writer, and whoever waits for that will find it gone."""
        entry.gone = True
        del self._entries[entry.id]
