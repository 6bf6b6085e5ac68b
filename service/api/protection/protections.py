"""Protections: named byte ranges, and pages, that may not be written, at sub-page granularity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.kvm.protections import Protection as EngineProtection
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
from service.api.protection.policies import ABOUT, GVA, RANGE_ITEMS, Granularity, ProtectionRequest
from service.api.protection.symbol_objects import with_addresses
from service.http import cursors
from service.http.wire_types import Document, Hex32, Hex64, examples
from service.runtime.offload import maybe_in_thread

routes = router("protections", "/v1/vms/{vm}/protections", reads="read", writes="write")

_INLINE_PAGES = 4096

ProtectionName = Annotated[str, Path(alias="name", description="Name of the protection.", examples=["kernel"])]

_NOTES = {"granularity": "subpage", "gva": None, "about": None}
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


class ObjectRange(Document):
    """A protected byte range, as given."""

    name: str = Field(description="Name of the object.")
    gpa: Hex64 = Field(description="Guest-physical address of its first byte.")
    size: int = Field(description="In bytes.")
    granularity: Granularity = Field(description="Outward to what it is rounded: 128 bytes, or 4 KiB.")
    gva: Hex64 | None = Field(description=GVA)
    about: str | None = Field(description=ABOUT)


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
            objects=[ObjectRange(**asdict(item)) for item in protection.objects],
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
        "is 0, need no SPP: without it KVM tracks the page."
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
    wanted = await maybe_in_thread(few, named.protection)
    async with changing(request, entry) as machine:
        protection = await maybe_in_thread(
            few and _small([wanted]), machine.protect, wanted.name, wanted.objects, wanted.ranges, wanted.about
        )
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
    "/{name}",
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


@routes.delete(
    "/{name}",
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
