"""Raw EPT and SPPT entries, and frames for further tables."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.machine.tables import TableEntry
from service.api.common import (
    GUARDED_CHANGE,
    VmId,
    changing,
    documented,
    find,
    guard,
    headers,
    json_response,
    router,
    tag_of,
    tagged,
    tagged_reply,
)
from service.api.protection.walk import EXAMPLE_EPT_LEAF, EXAMPLE_SPPT_LEAF, WalkEntry
from service.http.wire_types import Document, Hex64, examples

routes = router("tables", "/v1/vms/{vm}", reads="read", writes="write")

_ABOUT = (
    "The entry is the one that the first vCPU's walk of `gpa` reads at `level`, by EPTP or SPPTP and the entries "
    "above. A table outside table memory reads as all ones (`absent`). The walk ends above `level` at an "
    "entry that is not present, is misconfigured or maps a page: 422. KVM makes the tables when a page is first "
    "touched: `POST …/accesses`, and for the SPPT a page that is protected."
)
_ABOUT_PUT = (
    "Stores the 64 bits as they are; malformed entries are legal, and are walked as the processor walks them. Nothing "
    "is flushed from the translation caches. Refused where there is no table memory to store in. "
)
_READ_PROBLEMS = ("not-found", "invalid-value")
Level = Annotated[int, Path(ge=1, le=5, description="1 is the leaf: the PTE, or the vector of a page.", examples=[1])]
Gpa = Annotated[Hex64, Path(description="Guest-physical address.", examples=["0x2a5c000"])]


class EptEntry(WalkEntry):
    """An EPT entry."""

    model_config = ConfigDict(json_schema_extra=examples(EXAMPLE_EPT_LEAF))


class SpptEntry(WalkEntry):
    """An SPPT entry."""

    model_config = ConfigDict(json_schema_extra=examples(EXAMPLE_SPPT_LEAF))


class RawEntry(Document):
    """What to store."""

    model_config = ConfigDict(json_schema_extra=examples({"raw": "0x2000000002a5c335"}))

    raw: Hex64 = Field(description="The entry.")


class TableFrame(Document):
    """A new table."""

    model_config = ConfigDict(json_schema_extra=examples({"address": "0x200000009000"}))

    address: Hex64 = Field(description="Host-physical address, a multiple of 4096.")


def _ept(entry: TableEntry) -> EptEntry:
    return EptEntry.model_validate(entry, from_attributes=True, strict=False)


def _sppt(entry: TableEntry) -> SpptEntry:
    return SpptEntry.model_validate(entry, from_attributes=True, strict=False)


@routes.get(
    "/ept/{level}/{gpa}",
    operation_id="getEptEntry",
    summary="Read an EPT entry",
    description=_ABOUT,
    responses=documented(
        tagged_reply(EptEntry, "The entry."),
        *_READ_PROBLEMS,
    ),
)
async def get_ept_entry(request: Request, vm: VmId, level: Level, gpa: Gpa) -> Response:
    return tagged(request, _ept(find(request, vm).machine.tables.ept_entry(level, gpa)))


@routes.put(
    "/ept/{level}/{gpa}",
    operation_id="putEptEntry",
    summary="Store an EPT entry",
    description=_ABOUT_PUT + _ABOUT,
    responses=documented(
        {200: {"model": EptEntry, "description": "The entry as stored.", "headers": headers("ETag")}},
        *GUARDED_CHANGE,
    ),
)
async def put_ept_entry(request: Request, vm: VmId, level: Level, gpa: Gpa, body: RawEntry) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        guard(request, entry, lambda: [tag_of(_ept(machine.tables.ept_entry(level, gpa)))])
        stored = machine.tables.set_ept_entry(level, gpa, body.raw)
    return tagged(request, _ept(stored))


@routes.get(
    "/sppt/{level}/{gpa}",
    operation_id="getSpptEntry",
    summary="Read an SPPT entry",
    description=_ABOUT,
    responses=documented(
        tagged_reply(SpptEntry, "The entry."),
        *_READ_PROBLEMS,
    ),
)
async def get_sppt_entry(request: Request, vm: VmId, level: Level, gpa: Gpa) -> Response:
    return tagged(request, _sppt(find(request, vm).machine.tables.sppt_entry(level, gpa)))


@routes.put(
    "/sppt/{level}/{gpa}",
    operation_id="putSpptEntry",
    summary="Store an SPPT entry",
    description=_ABOUT_PUT + _ABOUT,
    responses=documented(
        {200: {"model": SpptEntry, "description": "The entry as stored.", "headers": headers("ETag")}},
        *GUARDED_CHANGE,
    ),
)
async def put_sppt_entry(request: Request, vm: VmId, level: Level, gpa: Gpa, body: RawEntry) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        guard(request, entry, lambda: [tag_of(_sppt(machine.tables.sppt_entry(level, gpa)))])
        stored = machine.tables.set_sppt_entry(level, gpa, body.raw)
    return tagged(request, _sppt(stored))


@routes.post(
    "/table-frames",
    operation_id="createTableFrame",
    summary="Make a table",
    description="A table of 512 entries, all 0, for entries to point to. It lives as long as the VM.",
    status_code=201,
    responses=documented(
        {201: {"model": TableFrame, "description": "Made."}},
        "not-found",
        "vm-busy",
        "limit-exceeded",
    ),
)
async def create_table_frame(request: Request, vm: VmId) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        address = machine.tables.new_frame()
    return json_response(TableFrame(address=address), status=201)
