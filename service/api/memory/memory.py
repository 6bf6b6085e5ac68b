"""Guest RAM as bytes: sparse, zero until written, reachable only where a slot is."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from engine.machine import VirtualMachine
from service.api.common import VmId, changing, documented, find, guard, headers, router, settings_of
from service.api.memory.images import ImageFormat, MemoryImage, put_image
from service.http import conditional
from service.http.negotiation import OCTETS, content_type
from service.http.wire_types import Hex64
from service.problems import InvalidDocument
from service.runtime.offload import maybe_in_thread

routes = router("guest memory", "/v1/vms/{vm}/memory", reads="read", writes="write")

Gpa = Annotated[Hex64, Query(description="Guest-physical address of the first byte.", examples=["0x2000360"])]

# Above this, copying takes longer than the event loop should be kept from others.
_INLINE_BYTES = 1 << 18

# The bytes of the example happen to be a text.
_BINARY = {OCTETS: {"schema": {"type": "string", "format": "binary"}, "example": "/bin/sh"}}


def _small(machine: VirtualMachine, size: int) -> bool:
    """Whether bytes are copied in no time: there are few, and none has to come from a disk."""
    return size <= _INLINE_BYTES and not machine.memory_slots.known.files


def _tag(content: bytes, gpa: int) -> str:
    return conditional.entity_tag(f"memory:{gpa:#x}".encode(), content)


@routes.get(
    "",
    operation_id="readMemory",
    summary="Read guest memory",
    responses=documented(
        {
            200: {"description": "The bytes, in memory order.", "content": _BINARY, "headers": headers("ETag")},
            304: {"description": "Unchanged.", "headers": headers("ETag")},
        },
        "not-found",
        "conflict",
        "invalid-value",
    ),
)
async def read_memory(
    request: Request,
    vm: VmId,
    gpa: Gpa,
    size: Annotated[Hex64, Query(description="Number of bytes.", examples=["0x1000"])],
) -> Response:
    entry = find(request, vm)
    limit = settings_of(request).max_memory_window
    if not 1 <= size <= limit:
        raise InvalidDocument(f"must be between 1 and {limit}", field="size", value=size)
    content = await maybe_in_thread(_small(entry.machine, size), entry.machine.read_memory, gpa, size)
    tag = _tag(content, gpa)
    if conditional.not_modified(request, tag):
        return Response(status_code=304, headers={"ETag": tag})
    return Response(content, media_type=OCTETS, headers={"ETag": tag})


@routes.put(
    "",
    operation_id="writeMemory",
    summary="Write guest memory",
    description=(
        "The host writes: no permission of the guest is asked, no exit happens. All of it lands, or nothing. With "
        "`format` the body is a memory image: of any length up to `max_image_bytes`, read while it arrives, and pages "
        "of zeros take no memory. If-Match then takes the entity tag of the VM."
    ),
    status_code=204,
    response_description="Written.",
    openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
    responses=documented(
        {
            200: {"model": MemoryImage, "description": "The image was loaded."},
            204: {"description": "The bytes were written.", "headers": headers("ETag")},
        },
        "malformed-body",
        "not-found",
        "vm-busy",
        "precondition-failed",
        "body-too-large",
        "unsupported-media-type",
        "invalid-value",
        "precondition-required",
        "limit-exceeded",
    ),
)
async def write_memory(
    request: Request,
    vm: VmId,
    gpa: Annotated[
        Hex64 | None,
        Query(
            description="Guest-physical address of the first byte. Without `format` it must be given; a raw image is "
            "for 0 on unless it is, other images say it themselves.",
            examples=["0x2000360"],
        ),
    ] = None,
    size: Annotated[Hex64 | None, Query(description="Number of bytes; when given, the body must have as many.")] = None,
    format: Annotated[
        ImageFormat | None,
        Query(
            description="The body is a memory image: raw bytes, an ELF core as QEMU's `dump-guest-memory` writes it, "
            "LiME, or which of them its beginning tells."
        ),
    ] = None,
) -> Response:
    entry = find(request, vm)
    content_type(request, (OCTETS,))
    if format is not None:
        if size is not None:
            raise InvalidDocument("goes with bytes, not with an image, which has its own", field="size", value=size)
        return await put_image(request, entry, format, gpa)
    if gpa is None:
        raise InvalidDocument("is required", field="gpa")
    content = await request.body()
    if size is not None and size != len(content):
        raise InvalidDocument(f"must be the length of the body, {len(content)}", field="size", value=size)
    if not content:
        raise InvalidDocument("must not be empty", field="body")
    small = _small(entry.machine, len(content))
    async with changing(request, entry, joins=small) as machine:
        guard(request, entry, lambda: [_tag(machine.read_memory(gpa, len(content)), gpa)])
        await maybe_in_thread(_small(machine, len(content)), machine.write_memory, gpa, content)
    return Response(status_code=204, headers={"ETag": _tag(content, gpa)})
