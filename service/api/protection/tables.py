"""Raw EPT and SPPT entries, and frames for further tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.machine.tables import TableEntry, TableOperations
from service.api.common import (
    GUARDED_CHANGE,
    VmId,
    changed_reply,
    changing,
    documented,
    find,
    guard,
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


@dataclass(frozen=True)
class Structure:
    """One of the two kinds of tables whose entries are resources; ``store`` returns the entry as stored."""

    path: str
    title: str
    model: type[WalkEntry]
    read: Callable[[TableOperations, int, int], TableEntry]
    store: Callable[[TableOperations, int, int, int], TableEntry]

    def shown(self, entry: TableEntry) -> WalkEntry:
        return self.model.model_validate(entry, from_attributes=True, strict=False)


STRUCTURES = (
    Structure("ept", "EPT", EptEntry, TableOperations.ept_entry, TableOperations.set_ept_entry),
    Structure("sppt", "SPPT", SpptEntry, TableOperations.sppt_entry, TableOperations.set_sppt_entry),
)


def _entry_routes(structure: Structure) -> None:
    """GET and PUT of the entries of one kind of tables."""

    @routes.get(
        f"/{structure.path}/{{level}}/{{gpa}}",
        operation_id=f"get{structure.model.__name__}",
        summary=f"Read an {structure.title} entry",
        description=_ABOUT,
        responses=documented(
            tagged_reply(structure.model, "The entry."),
            *_READ_PROBLEMS,
        ),
    )
    async def get_entry(request: Request, vm: VmId, level: Level, gpa: Gpa) -> Response:
        return tagged(request, structure.shown(structure.read(find(request, vm).machine.tables, level, gpa)))

    @routes.put(
        f"/{structure.path}/{{level}}/{{gpa}}",
        operation_id=f"put{structure.model.__name__}",
        summary=f"Store an {structure.title} entry",
        description=_ABOUT_PUT + _ABOUT,
        responses=documented(
            changed_reply(structure.model, "The entry as stored."),
            *GUARDED_CHANGE,
        ),
    )
    async def put_entry(request: Request, vm: VmId, level: Level, gpa: Gpa, body: RawEntry) -> Response:
        entry = find(request, vm)
        async with changing(request, entry, joins=True) as machine:
            guard(request, entry, lambda: [tag_of(structure.shown(structure.read(machine.tables, level, gpa)))])
            # Not read again: an entry may change what the walk to it goes through.
            stored = structure.store(machine.tables, level, gpa, body.raw)
        return tagged(request, structure.shown(stored))


for _structure in STRUCTURES:
    _entry_routes(_structure)


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
    async with changing(request, entry, joins=True) as machine:
        address = machine.tables.new_frame()
    return json_response(TableFrame(address=address), status=201)
