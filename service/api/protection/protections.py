"""Protections: named byte ranges, and pages, that may not be written, at sub-page granularity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Annotated

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.kvm.protections import ProtectedObject
from engine.kvm.protections import Protection as EngineProtection
from engine.machine.virtual_objects import regroup
from service.api.common import (
    CHANGE,
    Cursor,
    Limit,
    VmId,
    changing,
    documented,
    find,
    guard,
    headers,
    json_response,
    router,
    settings_of,
    tag_of,
    tagged,
    tagged_reply,
)
from service.api.protection.policies import (
    ABOUT,
    CR3,
    GVA,
    RANGE_ITEMS,
    VCPU,
    Granularity,
    ObjectPiece,
    ProtectionRequest,
)
from service.api.protection.symbol_objects import with_addresses
from service.http import cursors
from service.http.wire_types import Document, Hex32, Hex64, examples
from service.runtime.offload import maybe_in_thread

routes = router("protections", "/v1/vms/{vm}/protections", reads="read", writes="write")

_INLINE_PAGES = 4096

ProtectionName = Annotated[str, Path(alias="name", description="Name of the protection.", examples=["kernel"])]

_NOTES = {"granularity": "subpage", "gva": None, "about": None, "vcpu": None, "cr3": None, "pieces": None}
_REPLY = {
    "name": "kernel",
    "about": "what a rootkit overwrites",
    "objects": [
        {"name": "sys_call_table", "gpa": "0x2000360", "size": 3616, **_NOTES, "gva": "0xffffffff82000360"},
        {"name": "modprobe_path", "gpa": "0x2a5c6a0", "size": 256, **_NOTES},
    ],
    "pages": 3,
    "subpages": 36,
    "page_ranges": [["0x2bfb", 1, "0xfffffff0"]],
}
_MOST_MOVED = 1000
_MOVED = {
    "protection": _REPLY,
    "moved": [
        {
            "object": "modprobe_path",
            "gva": "0xffffffff82a5c6a0",
            "old_gpa": "0x2a5c6a0",
            "new_gpa": "0x3a5c6a0",
            "size": 256,
        }
    ],
    "moved_total": 1,
}


class ObjectRange(Document):
    """A protected byte range, as given."""

    name: str = Field(description="Name of the object.")
    gpa: Hex64 = Field(description="Guest-physical address of its first byte.")
    size: int = Field(description="In bytes.")
    granularity: Granularity = Field(description="Outward to what it is rounded: 128 bytes, or 4 KiB.")
    gva: Hex64 | None = Field(description=GVA)
    about: str | None = Field(description=ABOUT)
    vcpu: int | None = Field(description=VCPU + " Null for an object by `gpa`.")
    cr3: Hex64 | None = Field(description=CR3 + " Null: the vCPU's own, whenever it is looked up.")
    pieces: list[ObjectPiece] | None = Field(description="Of an object by `gva`: where it was found, run by run.")

    @classmethod
    def of(cls, pieces: Sequence[ProtectedObject]) -> ObjectRange:
        """The object that pieces are of; ``gpa`` is that of the first."""
        first = pieces[0]
        found = None
        if first.vcpu is not None:
            found = [ObjectPiece(gpa=piece.gpa, gva=piece.gva or 0, size=piece.size) for piece in pieces]
        size = sum(piece.size for piece in pieces)
        return cls(**{**asdict(first), "size": size, "pieces": found})


class Protection(Document):
    """A protection."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    name: str = Field(description="Name of the protection.")
    about: str | None = Field(description=ABOUT)
    objects: list[ObjectRange] = Field(description="Its objects, as given.")
    pages: int = Field(description="Distinct pages with a protected sub-page.")
    subpages: int = Field(description="Distinct protected sub-pages.")
    page_ranges: list[Annotated[tuple[Hex64, int, Hex32], Field(json_schema_extra=RANGE_ITEMS)]] = Field(
        description="The `pages` of the request: first page, number of pages, bitmap of what stays writable in each."
    )

    @classmethod
    def of(cls, protection: EngineProtection) -> Protection:
        return cls(
            name=protection.name,
            about=protection.about,
            objects=[ObjectRange.of(pieces) for pieces in regroup(protection.objects)],
            pages=protection.pages,
            subpages=protection.subpages,
            page_ranges=[(item.gfn, item.npages, item.access) for item in protection.ranges],
        )


def _small(protections: Iterable[EngineProtection]) -> bool:
    """Whether their pages are counted in no time."""
    return sum(protection.extent for protection in protections) <= _INLINE_PAGES


class ProtectionPage(Document):
    """A page of protections, by name."""

    model_config = ConfigDict(json_schema_extra=examples({"protections": [_REPLY], "next": None}))

    protections: list[Protection] = Field(description="In order of creation.")
    next: str | None = Field(description="URL of the next page; null on the last.")


@routes.post(
    "",
    operation_id="createProtection",
    summary="Protect named objects and pages",
    description=(
        "The body is a policy as the command line reads it from a file, too. "
        "Sub-pages are reference-counted: one stays protected until the last protection that covers it is deleted. "
        "Grants given during a replay end with the protection. Objects of granularity `page`, and ranges whose bitmap "
        "is 0, need no SPP: without it KVM tracks the page.\n\n"
        "An object by `gva` alone is looked up in the guest's page tables now, and split where its frames are no "
        "neighbours; `retranslateProtection` follows it when the guest has moved it."
    ),
    status_code=201,
    responses=documented(
        {201: {"model": Protection, "description": "Protected.", "headers": headers("Location", "ETag")}},
        "spp-not-enabled",
        "conflict",
        "not-yet-supported",
        *CHANGE,
    ),
)
async def create_protection(request: Request, vm: VmId, body: ProtectionRequest) -> Response:
    entry = find(request, vm)
    few = len(body.objects) + len(body.pages) <= _INLINE_PAGES
    named = await maybe_in_thread(not entry.machine.symbols.loaded, with_addresses, body, entry.machine)
    objects = await maybe_in_thread(few, named.given_objects)
    ranges = await maybe_in_thread(few, named.given_pages)
    known = [item for item in objects if isinstance(item, ProtectedObject)]
    small = few and len(known) == len(objects) and _small([EngineProtection(body.name, tuple(known), ranges)])
    async with changing(request, entry, joins=small) as machine:
        protection = await maybe_in_thread(small, machine.protect, body.name, objects, ranges, body.about)
    location = f"/v1/vms/{entry.id}/protections/{protection.name}"
    shown = await maybe_in_thread(_small([protection]), Protection.of, protection)
    return tagged(request, shown, status=201, extra={"Location": location})


@routes.get(
    "",
    operation_id="listProtections",
    summary="List protections",
    responses=documented(
        {200: {"model": ProtectionPage, "description": "One page, in order of creation."}}, "not-found", "invalid-value"
    ),
)
async def list_protections(request: Request, vm: VmId, limit: Limit = None, cursor: Cursor = None) -> Response:
    entry = find(request, vm)
    settings = settings_of(request)
    size = cursors.page_limit(limit, settings.page_size, settings.max_page_size)
    start = cursors.decode("protections", cursor) if cursor is not None else 0
    protections = entry.machine.protections()
    end = start + size
    follow = None
    if end < len(protections):
        follow = cursors.next_url(f"/v1/vms/{entry.id}/protections", "protections", end, limit)
    found = protections[start:end]
    shown = await maybe_in_thread(_small(found), lambda: [Protection.of(item) for item in found])
    return json_response(ProtectionPage(protections=shown, next=follow))


@routes.get(
    "/{name:id}",
    operation_id="getProtection",
    summary="Read a protection",
    responses=documented(
        tagged_reply(Protection, "The protection."),
        "not-found",
    ),
)
async def get_protection(request: Request, vm: VmId, name: ProtectionName) -> Response:
    protection = find(request, vm).machine.protection(name)
    return tagged(request, await maybe_in_thread(_small([protection]), Protection.of, protection))


class MovedRun(Document):
    """Bytes of an object that are in other frames now."""

    object: str = Field(description="Name of the object.")
    gva: Hex64 = Field(description="Where the guest sees them.")
    old_gpa: Hex64 = Field(description="Where they were protected until now.")
    new_gpa: Hex64 = Field(description="Where they are protected now.")
    size: int = Field(description="How many.")


class Retranslation(Document):
    """A protection whose objects were looked up again."""

    model_config = ConfigDict(json_schema_extra=examples(_MOVED))

    protection: Protection = Field(description="As it is now.")
    moved: list[MovedRun] = Field(description=f"The first {_MOST_MOVED} of the runs that moved, object by object.")
    moved_total: int = Field(description="How many moved.")


@routes.post(
    "/{name:id}:retranslate",
    operation_id="retranslateProtection",
    summary="Follow objects that the guest has moved",
    description=(
        "Every object by `gva` is looked up again, under its `cr3` or else the CR3 that its vCPU has now, and what is "
        "protected moves with it, all at once. Where one does not translate any more, nothing moves."
    ),
    responses=documented(
        {200: {"model": Retranslation, "description": "Looked up.", "headers": headers("ETag")}},
        "precondition-failed",
        "precondition-required",
        "spp-not-enabled",
        *CHANGE,
    ),
)
async def retranslate_protection(request: Request, vm: VmId, name: ProtectionName) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        guard(request, entry, lambda: [tag_of(Protection.of(machine.protection(name)))])
        protection, moved = await maybe_in_thread(False, machine.retranslate, name)
    runs = [MovedRun(**run._asdict()) for run in moved[:_MOST_MOVED]]
    shown = await maybe_in_thread(_small([protection]), Protection.of, protection)
    found = Retranslation(protection=shown, moved=runs, moved_total=len(moved))
    return json_response(found, extra={"ETag": tag_of(shown)})


@routes.delete(
    "/{name:id}",
    operation_id="deleteProtection",
    summary="Delete a protection",
    description="What other protections cover stays covered; what was SET stays SET.",
    status_code=204,
    response_description="Deleted.",
    responses=documented({}, "not-found", "vm-busy", "precondition-failed", "precondition-required", "limit-exceeded"),
)
async def delete_protection(request: Request, vm: VmId, name: ProtectionName) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        protection = machine.protection(name)
        guard(request, entry, lambda: [tag_of(Protection.of(protection))])
        await maybe_in_thread(_small([protection]), machine.unprotect, name)
    return Response(status_code=204)
