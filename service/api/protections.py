"""Protections: named byte ranges that may not be written, at sub-page granularity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.kvm import protections as engine
from service.api.common import (
    CHANGE,
    Cursor,
    Limit,
    VmId,
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
from service.http import cursors
from service.http.words import Document, Hex64, examples
from service.runtime.offload import maybe_in_thread

routes = router("protections", "/v1/vms/{vm}/protections", reads="read", writes="write")

_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.~-]*$"
_INLINE_PAGES = 4096

ProtectionName = Annotated[str, Path(alias="name", description="Name of the protection.", examples=["kernel"])]

_OBJECTS = [
    {"name": "sys_call_table", "gpa": "0x2000360", "size": 3616},
    {"name": "modprobe_path", "gpa": "0x2a5c6a0", "size": 256},
]
_REPLY = {"name": "kernel", "objects": _OBJECTS, "pages": 2, "subpages": 32}


class ObjectRequest(Document):
    """A byte range to protect; rounded outward to 128 bytes."""

    name: str = Field(min_length=1, max_length=256, description="Ranges of one name count as one object.")
    gpa: Hex64
    size: Hex64


class ProtectionRequest(Document):
    """Objects to protect together."""

    model_config = ConfigDict(json_schema_extra=examples({"name": "kernel", "objects": _OBJECTS}))

    name: str = Field(min_length=1, max_length=128, pattern=_NAME, description="Unique in the VM; part of the URL.")
    objects: list[ObjectRequest] = Field(min_length=1)


class ObjectRange(Document):
    """A protected byte range, as given."""

    name: str
    gpa: Hex64
    size: int


class Protection(Document):
    """A protection."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    name: str
    objects: list[ObjectRange]
    pages: int = Field(description="Distinct pages with a protected sub-page.")
    subpages: int = Field(description="Distinct protected sub-pages.")

    @classmethod
    def of(cls, protection: engine.Protection) -> Protection:
        return cls(
            name=protection.name,
            objects=[ObjectRange(name=item.name, gpa=item.gpa, size=item.size) for item in protection.objects],
            pages=protection.pages,
            subpages=protection.subpages,
        )


def _small(protections: Iterable[engine.Protection]) -> bool:
    """Whether their pages are counted in no time."""
    return sum(item.pages for protection in protections for item in protection.objects) <= _INLINE_PAGES


class Protections(Document):
    """A page of protections, by name."""

    model_config = ConfigDict(json_schema_extra=examples({"protections": [_REPLY], "next": None}))

    protections: list[Protection]
    next: str | None = Field(description="URL of the next page; null on the last.")


@routes.post(
    "",
    operation_id="createProtection",
    summary="Protect named objects",
    description=(
        "Sub-pages are reference-counted: one stays protected until the last protection that covers it is deleted. "
        "Grants given during a replay end with the protection."
    ),
    status_code=201,
    responses=documented(
        {201: {"model": Protection, "description": "Protected.", "headers": headers("Location", "ETag")}},
        "spp-not-enabled",
        "conflict",
        *CHANGE,
    ),
)
async def create_protection(request: Request, vm: VmId, body: ProtectionRequest) -> Response:
    entry = find(request, vm)
    objects = [engine.ProtectedObject(item.name, item.gpa, item.size) for item in body.objects]
    small = len(objects) <= _INLINE_PAGES and _small([engine.Protection(body.name, tuple(objects))])
    async with entry.mutation() as machine:
        protection = await maybe_in_thread(small, machine.protect, body.name, objects)
    location = f"/v1/vms/{entry.id}/protections/{protection.name}"
    shown = await maybe_in_thread(_small([protection]), Protection.of, protection)
    return tagged(request, shown, status=201, extra={"Location": location})


@routes.get(
    "",
    operation_id="listProtections",
    summary="List protections",
    responses=documented(
        {200: {"model": Protections, "description": "One page, in order of creation."}}, "not-found", "invalid-value"
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
    return json_response(Protections(protections=shown, next=follow))


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
    async with entry.mutation() as machine:
        protection = machine.protection(name)
        guard(request, entry, lambda: [tag_of(Protection.of(protection))])
        await maybe_in_thread(_small([protection]), machine.unprotect, name)
    return Response(status_code=204)
