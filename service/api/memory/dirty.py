"""Dirty tracking: what was written since a client last took note of it, by pages and by 128-byte sub-pages."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import NotFound
from engine.machine import dirty as engine
from service.api.common import (
    CHANGE,
    GUARDED_CHANGE,
    Cursor,
    Limit,
    VmId,
    changing,
    documented,
    find,
    guard,
    held_tag,
    json_response,
    router,
    settings_of,
)
from service.http import cursors
from service.http.wire_types import Document, Hex32, Hex64, PageNumber, examples
from service.runtime.offload import maybe_in_thread
from service.runtime.registry import Entry

routes = router("dirty tracking", "/v1/vms/{vm}", reads="read", writes="write")

# Machines with this many pages at most are walked in no time.
_INLINE_PAGES = 1 << 14

Level = Literal["off", "page", "subpage"]
Method = Literal["write-protect", "pml"]

_TRACKING = {"tracking": "subpage", "method": "write-protect"}
_TOTALS = {"npages": 2, "dirty_bytes_page_granular": 8192, "dirty_bytes_subpage": 384}
_WRITTEN = [{"gfn": "0x2a5c", "written": "0x3"}, {"gfn": "0x2a60", "written": "0x80000000"}]
_HARVEST = {"harvest": 1, "pages": _WRITTEN, **_TOTALS, "next": None}
_PEEK = {
    **_TRACKING,
    "outstanding": None,
    "pages": [{**page, "logged": False} for page in _WRITTEN],
    **_TOTALS,
    "next": None,
}


class TrackingRequest(Document):
    """What is to be tracked."""

    model_config = ConfigDict(json_schema_extra=examples(_TRACKING))

    tracking: Level = Field(
        description="`subpage`: which 128 bytes were written, by sub-page protection; `page`: which pages; `off`."
    )
    method: Method = Field(
        "write-protect",
        description=(
            "How writes to whole pages are noticed, for KVM's log of a slot as well: by a fault, or by the "
            "processor's page-modification log."
        ),
    )


class TrackingState(TrackingRequest):
    """What is tracked."""


class WrittenPage(Document):
    """A page that was written."""

    gfn: PageNumber
    written: Hex32 = Field(
        description="Bit s: bytes 128 s to 128 s + 127 were written. All ones where pages are tracked."
    )


class DirtyPage(WrittenPage):
    """A page that is dirty."""

    logged: bool = Field(description="KVM's log of the slot has it: KVM_GET_DIRTY_LOG will return its bit.")


class _Totals(Document):
    npages: int = Field(description="Pages in all, on this page of the list or not.")
    dirty_bytes_page_granular: int = Field(description="Bytes of the whole pages: what page tracking makes one copy.")
    dirty_bytes_subpage: int = Field(description="Bytes of the written sub-pages.")


class Dirty(_Totals):
    """What is dirty now: written since the last harvest, or in KVM's log. Reading it changes nothing."""

    model_config = ConfigDict(json_schema_extra=examples(_PEEK))

    tracking: Level = Field(description="What is tracked.")
    method: Method = Field(description="How writes are noticed.")
    outstanding: int | None = Field(description="The harvest that waits to be acknowledged.")
    pages: list[DirtyPage] = Field(description="By GFN.")
    next: str | None = Field(description="URL of the next page; null on the last.")


class DirtyHarvest(_Totals):
    """A harvest: it stays as it is until it is acknowledged."""

    model_config = ConfigDict(json_schema_extra=examples(_HARVEST))

    harvest: int = Field(description="Its number; the first one is 1.")
    pages: list[WrittenPage] = Field(description="By GFN.")
    next: str | None = Field(description="URL of the next page; null on the last.")


class Acknowledgement(Document):
    """Which harvest arrived."""

    model_config = ConfigDict(json_schema_extra=examples({"harvest": 1}))

    harvest: int = Field(description="Its number.")


class Acknowledged(Document):
    """It is let go of."""

    model_config = ConfigDict(json_schema_extra=examples({"harvest": 1, "repeated": False}))

    harvest: int = Field(description="Its number.")
    repeated: bool = Field(description="It had been acknowledged before; nothing happened.")


class SlotLogRequest(Document):
    """Whose log is read."""

    model_config = ConfigDict(json_schema_extra=examples({"slot": 0}))

    slot: int = Field(ge=0, le=65535, description="Number of the slot.")


class SlotLog(Document):
    """KVM's log of a slot, which is empty from then on."""

    model_config = ConfigDict(json_schema_extra=examples({"slot": 0, "bitmap": "0500000000000000", "npages": 2}))

    slot: int = Field(description="Number of the slot.")
    bitmap: str = Field(description="Bytes in memory order, as hex: page n of the slot is bit n % 8 of byte n // 8.")
    npages: int = Field(description="How many bits are 1.")


def _small(entry: Entry) -> bool:
    return sum(spec.pages for spec in entry.machine.slots()) <= _INLINE_PAGES


def _written(found: engine.WrittenPages, start: int, size: int) -> list[WrittenPage]:
    rows = zip(found.gfns[start : start + size].tolist(), found.maps[start : start + size].tolist(), strict=True)
    return [WrittenPage(gfn=gfn, written=mask) for gfn, mask in rows]


def _size(request: Request, limit: int | None) -> int:
    """Pages in one page of a list: as many as there may be, unless fewer are asked for."""
    largest = settings_of(request).max_page_size
    return cursors.page_limit(limit, largest, largest)


def _harvest(
    request: Request, entry: Entry, found: engine.Harvest, limit: int | None, cursor: str | None
) -> DirtyHarvest:
    size = _size(request, limit)
    kind = f"harvest {found.harvest}"
    start = cursors.decode(kind, cursor) if cursor is not None else 0
    follow = None
    if start + size < len(found):
        path = f"/v1/vms/{entry.id}/dirty/harvests/{found.harvest}"
        follow = cursors.next_url(path, kind, start + size, limit)
    return DirtyHarvest(
        harvest=found.harvest,
        pages=_written(found, start, size),
        npages=len(found),
        dirty_bytes_page_granular=found.page_bytes,
        dirty_bytes_subpage=found.subpage_bytes,
        next=follow,
    )


@routes.get(
    "/dirty",
    operation_id="getDirty",
    summary="Look at what is dirty",
    description="Of the whole VM, of a `slot`, or of `npages` from `gfn`. Nothing is taken: pages stay dirty.",
    responses=documented({200: {"model": Dirty, "description": "One page, by GFN."}}, "not-found", "invalid-value"),
)
async def get_dirty(
    request: Request,
    vm: VmId,
    slot: Annotated[int | None, Query(ge=0, le=65535, description="Only the pages of this slot.")] = None,
    gfn: Annotated[Hex64, Query(description="First page.")] = 0,
    npages: Annotated[Hex64 | None, Query(description="Number of pages; all that follow unless given.")] = None,
    limit: Limit = None,
    cursor: Cursor = None,
) -> Response:
    entry = find(request, vm)
    machine = entry.machine
    size = _size(request, limit)
    if slot is not None:
        spec = next((spec for spec in machine.slots() if spec.slot == slot), None)
        if spec is None:
            raise NotFound("must be the number of an existing slot", field="slot", value=slot)
        gfn, npages = spec.gfn, spec.pages
    found = await maybe_in_thread(_small(entry), machine.dirty.pages, gfn, npages)
    first = cursors.decode("dirty", cursor) if cursor is not None else 0
    start = int(found.gfns.searchsorted(first))
    end = start + size
    follow = None
    if end < len(found):
        follow = cursors.next_url(f"/v1/vms/{entry.id}/dirty", "dirty", int(found.gfns[end]), limit)
        window = {"slot": slot} if slot is not None else {"gfn": hex(gfn), "npages": npages} if npages else {}
        follow += "".join(f"&{name}={value}" for name, value in window.items())
    now, outstanding = machine.dirty.tracking(), machine.dirty.outstanding_number()
    pages = [
        DirtyPage(gfn=page.gfn, written=page.written, logged=logged)
        for page, logged in zip(_written(found, start, size), found.logged[start:end].tolist(), strict=True)
    ]
    return json_response(
        Dirty(
            tracking=now.tracking,  # type: ignore[arg-type]
            method=now.method,  # type: ignore[arg-type]
            outstanding=outstanding,
            pages=pages,
            npages=len(found),
            dirty_bytes_page_granular=found.page_bytes,
            dirty_bytes_subpage=found.subpage_bytes,
            next=follow,
        )
    )


@routes.put(
    "/dirty",
    operation_id="putDirty",
    summary="Switch dirty tracking",
    description=(
        "Tracks the pages of every slot from now on; what was written before is not known. Switched off, what was "
        "noted and not harvested is forgotten; a harvest that waits stays. From `subpage` to `page`, a page written in "
        "part counts whole. KVM's own log of a slot is switched by the slot's `log_dirty`. "
        "If-Match is compared with the tag of the VM."
    ),
    responses=documented(
        {200: {"model": TrackingState, "description": "What is tracked now."}},
        "spp-not-enabled",
        "unsupported",
        "conflict",
        *GUARDED_CHANGE,
    ),
)
async def put_dirty(request: Request, vm: VmId, body: TrackingRequest) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        guard(request, entry, lambda: [held_tag(entry)])
        now = await maybe_in_thread(_small(entry), machine.dirty.track, body.tracking, body.method)
    return json_response({"tracking": now.tracking, "method": now.method})


@routes.post(
    "/dirty:harvest",
    operation_id="harvestDirty",
    summary="Take what was written",
    description=(
        "The pages written since the last harvest; they are clean from then on, and what is written later is in the "
        "next one. Until it is acknowledged the same harvest is returned again: a reply that was lost loses nothing."
    ),
    responses=documented(
        {200: {"model": DirtyHarvest, "description": "The harvest, its first pages."}},
        "not-found",
        "conflict",
        "vm-busy",
        "invalid-value",
        "limit-exceeded",
    ),
)
async def harvest_dirty(request: Request, vm: VmId, limit: Limit = None) -> Response:
    entry = find(request, vm)
    _size(request, limit)
    async with changing(request, entry) as machine:
        found = await maybe_in_thread(_small(entry), machine.dirty.harvest)
    return json_response(_harvest(request, entry, found, limit, None))


@routes.get(
    "/dirty/harvests/{harvest}",
    operation_id="getHarvest",
    summary="Read a harvest that waits",
    description="Page by page, until it is acknowledged; then 404.",
    responses=documented(
        {200: {"model": DirtyHarvest, "description": "One page, by GFN."}}, "not-found", "invalid-value"
    ),
)
async def get_harvest(
    request: Request,
    vm: VmId,
    harvest: Annotated[int, Path(description="Number of the harvest.", examples=[1])],
    limit: Limit = None,
    cursor: Cursor = None,
) -> Response:
    entry = find(request, vm)
    found = await maybe_in_thread(_small(entry), entry.machine.dirty.outstanding)
    if found is None or found.harvest != harvest:
        raise NotFound("must be the number of the harvest that waits", field="harvest", value=harvest)
    return json_response(_harvest(request, entry, found, limit, cursor))


@routes.post(
    "/dirty:acknowledge",
    operation_id="acknowledgeDirty",
    summary="Let go of a harvest",
    description=(
        "A second time it says `repeated`; a number that no harvest has had is 404: `POST …/dirty:harvest` gives one."
    ),
    responses=documented(
        {200: {"model": Acknowledged, "description": "Acknowledged."}},
        *CHANGE,
    ),
)
async def acknowledge_dirty(request: Request, vm: VmId, body: Acknowledgement) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        first = await maybe_in_thread(_small(entry), machine.dirty.acknowledge, body.harvest)
    return json_response(Acknowledged(harvest=body.harvest, repeated=not first))


@routes.post(
    "/dirty:get-log",
    operation_id="getDirtyLog",
    summary="Read and clear KVM's log of a slot",
    description=(
        "KVM_GET_DIRTY_LOG, with what the log of the VM's profile misses or says too much. It takes nothing from the "
        "harvests. 404 for a slot without `log_dirty`, which `PUT …/memory-slots/{slot}` sets."
    ),
    responses=documented(
        {200: {"model": SlotLog, "description": "The log as it was."}},
        *CHANGE,
    ),
)
async def get_dirty_log(request: Request, vm: VmId, body: SlotLogRequest) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        log = await maybe_in_thread(_small(entry), machine.dirty.take_log, body.slot)
    return json_response(SlotLog(slot=body.slot, bitmap=log.hex(), npages=int.from_bytes(log, "little").bit_count()))
