"""Memory slots: KVM_SET_USER_MEMORY_REGION as a resource per slot."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Annotated

from fastapi import Path, Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import LimitExceeded, NotFound
from engine.kvm.slot_files import SlotFile
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from service.api.common import (
    GUARDED_CHANGE,
    VmId,
    changing,
    documented,
    find,
    guard,
    headers,
    json_response,
    memory_files_of,
    router,
    settings_of,
    tag_of,
    tagged,
    tagged_reply,
    tenant_of,
)
from service.http.wire_types import Document, Hex64, examples
from service.platform.stamps import EPOCH, stamp
from service.problems import InvalidDocument
from service.runtime.memory_files import LONGEST_PATH, FileState, state_of
from service.runtime.offload import maybe_in_thread
from service.runtime.registry import Entry
from service.settings import Settings

routes = router("memory slots", "/v1/vms/{vm}/memory-slots", reads="read", writes="write")

SlotId = Annotated[int, Path(alias="slot", ge=0, le=65535, description="Number of the slot.", examples=[0])]

AddressSpace = Annotated[
    int | None, Query(ge=0, le=65535, description="0 unless given; 1 is system-management mode.", examples=[0])
]

_REQUEST = {"gpa": "0x0", "size": "0x40000000", "read_only": False, "host_page_size": 4096}
_REPLY = {
    "slot": 0,
    "address_space": 0,
    "gpa": "0x0",
    "size": "0x40000000",
    "read_only": False,
    "log_dirty": False,
    "host_page_size": 4096,
    "userspace_addr": "0x0",
    "backing": None,
}
_FILE = {"file": "/dev/shm/guest", "offset": "0x0"}
_BACKED = {
    **_REPLY,
    "backing": {
        **_FILE,
        "size": 1073741824,
        "modified": "2026-08-22T09:30:00.000000Z",
        "state": "attached",
        "reason": None,
    },
}


class BackingRequest(Document):
    """The file behind a slot: it has the bytes of pages that were never written here. It is only read."""

    model_config = ConfigDict(json_schema_extra=examples(_FILE))

    file: str = Field(
        min_length=1,
        max_length=LONGEST_PATH,
        description="Absolute path, below a directory that `SUBPAGE_MEMORY_FILES` lists.",
    )
    offset: Hex64 = Field(0, description="Where in the file the slot begins; a multiple of 4096.")


class Backing(Document):
    """The file behind a slot."""

    file: str = Field(description="Its path.")
    offset: Hex64 = Field(description="Where in it the slot begins.")
    size: int = Field(description="Bytes that the file had when it was attached.")
    modified: str = Field(
        description="When it had been written last by then: RFC 3339, UTC.", json_schema_extra={"format": "date-time"}
    )
    state: FileState | None = Field(
        description="`changed`: size or time are others by now. `missing`: it could not be opened again after a "
        "restart. Null while the machine is not in memory."
    )
    reason: str | None = Field(description="Why it is `missing`.")

    @classmethod
    def of(cls, file: SlotFile) -> Backing:
        state, reason = state_of(file)
        modified = stamp(EPOCH + timedelta(microseconds=file.modified // 1000))
        return cls(file=file.path, offset=file.offset, size=file.size, modified=modified, state=state, reason=reason)


class MemorySlotRequest(Document):
    """What a slot is to be."""

    model_config = ConfigDict(json_schema_extra=examples(_REQUEST))

    gpa: Hex64 = Field(description="Guest-physical address of the first byte; a multiple of 4096.")
    size: Hex64 = Field(description="Size in bytes; a multiple of 4096, not zero.")
    read_only: bool = Field(False, description="KVM_MEM_READONLY: writes are MMIO exits.")
    log_dirty: bool = Field(False, description="KVM_MEM_LOG_DIRTY_PAGES: writes are logged.")
    host_page_size: int = Field(4096, description="Page size of the host memory behind the slot.")
    address_space: int | None = Field(
        None, ge=0, le=65535, description="As in the query: 0, or 1 for system-management mode."
    )
    backing: BackingRequest | None = Field(None, description="The file behind the slot; null: zeros.")

    async def attached(self, request: Request) -> SlotFile | None:
        """The file behind the slot, opened."""
        if self.backing is None:
            return None
        attach = memory_files_of(request).attach
        return await maybe_in_thread(False, attach, self.backing.file, self.backing.offset, tenant_of(request))

    def spec(self, slot: int, known: SlotSpec | None = None, backing: SlotFile | None = None) -> SlotSpec:
        """What the slot is to be; a known one keeps the host address that an ioctl gave it."""
        return SlotSpec(
            slot=slot,
            gpa=self.gpa,
            size=self.size,
            read_only=self.read_only,
            host_page_size=self.host_page_size,
            address_space=self.address_space or 0,
            log_dirty=self.log_dirty,
            userspace_addr=known.userspace_addr if known is not None else 0,
            backing=backing,
        )


class NumberedSlotRequest(MemorySlotRequest):
    """A slot of a VM to be created."""

    model_config = ConfigDict(json_schema_extra=examples({"slot": 0, **_REQUEST}))

    slot: int = Field(ge=0, le=65535, description="Number of the slot.")


class MemorySlot(Document):
    """A slot as it is."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY, _BACKED))

    slot: int = Field(description="Number of the slot.")
    address_space: int = Field(description="1: seen in system-management mode only.")
    gpa: Hex64 = Field(description="Guest-physical address of its first byte.")
    size: Hex64 = Field(description="In bytes.")
    read_only: bool = Field(description="KVM_MEM_READONLY.")
    log_dirty: bool = Field(description="KVM_MEM_LOG_DIRTY_PAGES.")
    host_page_size: int = Field(description="Size in bytes of the pages behind it.")
    userspace_addr: Hex64 = Field(
        description="Where the slot is in its user's memory: as KVM_SET_USER_MEMORY_REGION says."
    )
    backing: Backing | None = Field(description="The file behind it; null: zeros.")

    @classmethod
    def of(cls, spec: SlotSpec) -> MemorySlot:
        plain = {name: getattr(spec, name) for name in cls.model_fields if name != "backing"}
        return cls(**plain, backing=None if spec.backing is None else Backing.of(spec.backing))


class MemorySlotList(Document):
    """All slots of a VM, by number, those of address space 1 last. The kernel bounds them; the list is never cut."""

    model_config = ConfigDict(json_schema_extra=examples({"memory_slots": [_REPLY]}))

    memory_slots: list[MemorySlot] = Field(description="By number, those of address space 1 last.")


def slots_of(entry: Entry) -> list[MemorySlot]:
    """The slots of a machine, by number, those of address space 1 last."""
    return [MemorySlot.of(spec) for spec in entry.machine.slots()]


def _find(machine: VirtualMachine, slot: int, space: int | None) -> MemorySlot | None:
    found = machine.memory_slots.find(slot, space or 0)
    return MemorySlot.of(found) if found is not None else None


def _tags(machine: VirtualMachine, slot: int, space: int | None) -> list[str]:
    found = _find(machine, slot, space)
    return [tag_of(found)] if found else []


def _unknown(slot: int) -> NotFound:
    return NotFound("must be the number of an existing slot", field="slot", value=slot)


def check_slots(settings: Settings, count: int) -> None:
    """Raise LimitExceeded when one machine may not have ``count`` slots."""
    if count > settings.max_memory_slots:
        rule = f"one VM may have at most {settings.max_memory_slots} memory slots"
        raise LimitExceeded(rule, field="max_memory_slots", value=settings.max_memory_slots)


@routes.get(
    "",
    operation_id="listMemorySlots",
    summary="List memory slots",
    responses=documented({200: {"model": MemorySlotList, "description": "All slots."}}, "not-found"),
)
async def list_memory_slots(request: Request, vm: VmId) -> Response:
    return json_response(MemorySlotList(memory_slots=slots_of(find(request, vm))))


@routes.get(
    "/{slot}",
    operation_id="getMemorySlot",
    summary="Read a memory slot",
    responses=documented(
        tagged_reply(MemorySlot, "The slot."),
        "not-found",
        "invalid-value",
    ),
)
async def get_memory_slot(request: Request, vm: VmId, slot: SlotId, address_space: AddressSpace = None) -> Response:
    found = _find(find(request, vm).machine, slot, address_space)
    if found is None:
        raise _unknown(slot)
    return tagged(request, found)


@routes.put(
    "/{slot}",
    operation_id="putMemorySlot",
    summary="Create, move or change a memory slot",
    description=(
        "A known slot may move, and change whether its writes are logged. It keeps its size, its read-only flag, its "
        "host page size and the file behind it for life; to change them, delete it first. Sent again, a file is opened "
        "again."
    ),
    responses=documented(
        {
            200: {"model": MemorySlot, "description": "The slot as changed.", "headers": headers("ETag")},
            201: {
                "model": MemorySlot,
                "description": "The slot as created.",
                "headers": headers("ETag", "Location"),
            },
        },
        *GUARDED_CHANGE,
        "conflict",
    ),
)
async def put_memory_slot(
    request: Request, vm: VmId, slot: SlotId, body: MemorySlotRequest, address_space: AddressSpace = None
) -> Response:
    entry = find(request, vm)
    space = address_space if body.address_space is None else body.address_space
    if address_space not in (None, space):
        raise InvalidDocument("must be that of the query", field="address_space", value=space)
    backing = await body.attached(request)
    async with changing(request, entry, joins=True) as machine:
        guard(request, entry, lambda: _tags(machine, slot, space))
        known = machine.memory_slots.find(slot, space or 0)
        if known is None:
            check_slots(settings_of(request), len(machine.memory_slots.known) + 1)
        machine.set_slot(replace(body.spec(slot, known, backing), address_space=space or 0))
        found = _find(machine, slot, space)
    assert found is not None
    if known is not None:
        return tagged(request, found)
    query = f"?address_space={space}" if space else ""
    location = f"/v1/vms/{entry.id}/memory-slots/{slot}{query}"
    return tagged(request, found, status=201, extra={"Location": location})


@routes.delete(
    "/{slot}",
    operation_id="deleteMemorySlot",
    summary="Delete a memory slot",
    description="Guest memory and SET bitmaps go with it; protections stay and apply again when a slot covers them.",
    status_code=204,
    response_description="Deleted.",
    responses=documented({}, "not-found", "vm-busy", "precondition-failed", "invalid-value", "precondition-required"),
)
async def delete_memory_slot(request: Request, vm: VmId, slot: SlotId, address_space: AddressSpace = None) -> Response:
    entry = find(request, vm)
    async with changing(request, entry, joins=True) as machine:
        if _find(machine, slot, address_space) is None:
            raise _unknown(slot)
        guard(request, entry, lambda: _tags(machine, slot, address_space))
        machine.memory_slots.delete(slot, address_space or 0)
    return Response(status_code=204)
