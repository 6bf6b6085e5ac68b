"""Write permissions of 128-byte sub-pages: KVM_SUBPAGES_GET_ACCESS and KVM_SUBPAGES_SET_ACCESS.

A page has a 32-bit bitmap; bit ``i`` set means that bytes ``128 * i`` to ``128 * i + 127`` may be written. Windows
travel as JSON or as raw little-endian u32, one per page.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, FailFast, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.machine import SubpageRange, VirtualMachine
from service.api.common import (
    BINARY,
    GUARDED_CHANGE,
    VmId,
    changing,
    documented,
    find,
    guard,
    headers,
    held_tag,
    octets_reply,
    router,
    settings_of,
    vm_parameter,
)
from service.http import bitmaps, conditional
from service.http.json_bodies import INLINE_BYTES, parsed
from service.http.negotiation import JSON, OCTETS, content_type, preferred
from service.http.route import parse_query, query_parameters, reads_query
from service.http.wire_types import Document, Hex32, Hex64, PageNumber, examples
from service.problems import InvalidDocument
from service.runtime.changes import subpages_set
from service.runtime.offload import maybe_in_thread
from service.settings import Settings

routes = router("subpages", "/v1/vms/{vm}/subpages", reads="read", writes="write")

Layer = Literal["effective", "set", "protected", "granted"]
_OFFERS = (JSON, OCTETS)
# Above this, rendering and parsing take longer than the event loop should be kept from others.
_INLINE_PAGES = 4096
# Pages of one call, whatever the service is set to; and runs of pages.
MOST_PAGES = 1 << 20
_MOST_RANGES = 1 << 16

_WINDOW = {"gfn": "0x2000", "npages": 2, "access": ["0xffffffff", "0x8001ffff"]}


class PlaceQuery(Document):
    """Which bitmaps to set."""

    gfn: Hex64 = Field(description="Number of the first guest page: its address shifted right by 12.")
    npages: Hex64 = Field(1, description="Number of pages.")


class WindowQuery(PlaceQuery):
    """Which bitmaps to read."""

    layer: Layer = Field("effective", description="`effective` is SET AND (not protected OR granted).")

    def values(self) -> tuple[int, int, str]:
        return self.gfn, self.npages, self.layer


class SubpageWindow(Document):
    """The bitmaps of a run of pages."""

    model_config = ConfigDict(json_schema_extra=examples(_WINDOW))

    gfn: PageNumber
    npages: int = Field(description="Number of pages.")
    access: list[Hex32] = Field(description="One bitmap for each page.")


class SubpageWindowRequest(Document):
    """New bitmaps for the run of pages that the URL names."""

    model_config = ConfigDict(json_schema_extra=examples({"access": ["0x8001ffff"]}))

    access: list[Any] = Field(
        max_length=MOST_PAGES,
        description="One bitmap for each page.",
        json_schema_extra={"items": bitmaps.WORD32_SCHEMA},
    )


class SubpageRangeRequest(Document):
    """New bitmaps for one run of pages."""

    gfn: PageNumber
    npages: Hex64 = Field(1, description="Number of pages.")
    access: Any = Field(
        description="One bitmap for all pages, or a list with one for each.",
        json_schema_extra={
            "anyOf": [
                *bitmaps.WORD32_SCHEMA["anyOf"],
                {"type": "array", "items": bitmaps.WORD32_SCHEMA, "maxItems": MOST_PAGES},
            ]
        },
    )


class SubpagePatch(Document):
    """Many runs, all applied or none; where they overlap, the last one counts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "ranges": [
                        {"gfn": "0x2000", "npages": 16, "access": "0x0"},
                        {"gfn": "0x3313", "npages": 2, "access": ["0xffffffff", "0x7fffffff"]},
                    ]
                }
            ]
        }
    )

    ranges: Annotated[list[SubpageRangeRequest], FailFast()] = Field(
        min_length=1, max_length=_MOST_RANGES, description="The runs; the last one counts where they overlap."
    )


def _check_window(gfn: int, npages: int, limit: int, prefix: str = "") -> None:
    if not 1 <= npages <= limit:
        raise InvalidDocument(f"must be between 1 and {limit}", field=f"{prefix}npages", value=npages)
    if gfn + npages > 1 << 52:
        raise InvalidDocument("must leave the range below page 2^52", field=f"{prefix}gfn", value=gfn)


def _tag(media: str, layer: str, gfn: int, words: npt.NDArray[np.uint32]) -> str:
    return conditional.entity_tag(f"{media}:{layer}:{gfn:x}".encode(), words.tobytes())


def _tags(machine: VirtualMachine, gfn: int, npages: int) -> list[str]:
    """The tags a client may know the window by: what it read as JSON or raw, as it acts or as it was SET."""
    tags: list[str] = []
    for layer in ("effective", "set"):
        words = machine.subpages(gfn, npages, layer)
        tags += (_tag(media, layer, gfn, words) for media in _OFFERS)
    return tags


def _set_window(machine: VirtualMachine, wanted: SubpageRange, media: str) -> str:
    """Set the window, and the tag that it has then."""
    machine.set_subpages([wanted])
    return _tag(media, "effective", wanted.gfn, machine.subpages(wanted.gfn, wanted.npages))


def _window(machine: VirtualMachine, gfn: int, npages: int, layer: str, media: str) -> tuple[bytes, str]:
    words = machine.subpages(gfn, npages, layer)
    content = words.astype("<u4", copy=False).tobytes() if media == OCTETS else bitmaps.window_json(gfn, words)
    return content, _tag(media, layer, gfn, words)


@routes.get(
    "",
    operation_id="getSubpages",
    summary="Read sub-page permissions",
    openapi_extra={"parameters": [vm_parameter(), *query_parameters(WindowQuery)]},
    responses=documented(
        octets_reply(SubpageWindow, "The bitmaps; as `application/octet-stream`, one little-endian u32 for each page."),
        "not-found",
        "not-acceptable",
        "spp-not-enabled",
        "invalid-value",
    ),
)
@reads_query
async def get_subpages(request: Request) -> Response:
    # The shortest path there is: the framework's handling of parameters would take longer than everything else.
    machine = find(request, request.path_params["vm"]).machine
    gfn, npages, layer = parse_query(WindowQuery, request).values()
    media = preferred(request, _OFFERS)
    _check_window(gfn, npages, settings_of(request).max_subpage_window)
    small = npages <= _INLINE_PAGES
    content, tag = await maybe_in_thread(small, _window, machine, gfn, npages, layer, media)
    if conditional.not_modified(request, tag):
        return Response(status_code=304, headers={"ETag": tag, "Vary": "Accept"})
    return Response(content, media_type=media, headers={"ETag": tag, "Vary": "Accept"})


def _parse_window(media: str, content: bytes, npages: int, settings: Settings) -> npt.NDArray[np.uint32]:
    if media == OCTETS:
        if len(content) != 4 * npages:
            rule = f"must be {4 * npages} bytes, one little-endian u32 for each of {npages} pages"
            raise InvalidDocument(rule, field="body", value=len(content))
        return np.frombuffer(content, dtype="<u4")
    document = parsed(SubpageWindowRequest, content, settings)
    words = bitmaps.words32(document.access, "access")
    if len(words) != npages:
        raise InvalidDocument(f"must have one bitmap for each of {npages} pages", field="access", value=len(words))
    return words


@routes.put(
    "",
    operation_id="putSubpages",
    summary="Set the permissions of a run of pages",
    description="Replaces the SET bitmaps of the window, all or nothing. It never lifts a protection; it ends grants.",
    status_code=204,
    openapi_extra={
        "parameters": [vm_parameter(), *query_parameters(PlaceQuery)],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/SubpageWindowRequest"}},
                OCTETS: BINARY,
            },
        },
    },
    responses=documented(
        {
            204: {
                "description": "Set. The tag is that of a GET in the media type that was sent.",
                "headers": headers("ETag"),
            }
        },
        "spp-not-enabled",
        *GUARDED_CHANGE,
    ),
)
@reads_query
async def put_subpages(request: Request) -> Response:
    entry = find(request, request.path_params["vm"])
    place = parse_query(PlaceQuery, request)
    gfn, npages = place.gfn, place.npages
    media = content_type(request, _OFFERS)
    settings = settings_of(request)
    _check_window(gfn, npages, settings.max_subpage_window)
    content = await request.body()
    small = npages <= _INLINE_PAGES and len(content) <= INLINE_BYTES
    words = await maybe_in_thread(small, _parse_window, media, content, npages, settings)
    async with changing(request, entry, joins=small) as machine:
        guard(request, entry, lambda: _tags(machine, gfn, npages))
        wanted = SubpageRange(gfn, npages, words)
        tag = await maybe_in_thread(small, _set_window, machine, wanted, media)
        entry.events.note("subpages", subpages_set([wanted]))
    return Response(status_code=204, headers={"ETag": tag})


def _parse_patch(content: bytes, settings: Settings) -> list[SubpageRange]:
    return ranges_of(parsed(SubpagePatch, content, settings), settings.max_subpage_window)


def ranges_of(document: SubpagePatch, limit: int) -> list[SubpageRange]:
    """The ranges of a patch, which cover at most ``limit`` pages together. Raises InvalidDocument."""
    ranges: list[SubpageRange] = []
    pages = 0
    for position, item in enumerate(document.ranges):
        prefix = f"ranges[{position}]."
        _check_window(item.gfn, item.npages, limit, prefix)
        pages += item.npages
        if pages > limit:
            raise InvalidDocument(f"must cover at most {limit} pages together", field="ranges", value=pages)
        if isinstance(item.access, list):
            words = bitmaps.words32(item.access, f"{prefix}access")
            if len(words) != item.npages:
                rule = f"must have one bitmap for each of {item.npages} pages"
                raise InvalidDocument(rule, field=f"{prefix}access", value=len(words))
            ranges.append(SubpageRange(item.gfn, item.npages, words, prefix))
        else:
            word = bitmaps.word32(item.access, f"{prefix}access")
            ranges.append(SubpageRange(item.gfn, item.npages, word, prefix))
    return ranges


@routes.patch(
    "",
    operation_id="patchSubpages",
    summary="Set the permissions of many runs of pages",
    description="All or nothing. If-Match is compared with the tag of the VM.",
    status_code=204,
    response_description="Set.",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/SubpagePatch"}}},
        }
    },
    responses=documented(
        {},
        "spp-not-enabled",
        *GUARDED_CHANGE,
    ),
)
async def patch_subpages(request: Request, vm: VmId) -> Response:
    entry = find(request, vm)
    content_type(request, (JSON,))
    content = await request.body()
    small = len(content) <= INLINE_BYTES
    ranges = await maybe_in_thread(small, _parse_patch, content, settings_of(request))
    small = small and sum(change.npages for change in ranges) <= _INLINE_PAGES
    async with changing(request, entry, joins=small) as machine:
        guard(request, entry, lambda: [held_tag(entry)])
        await maybe_in_thread(small, machine.set_subpages, ranges)
        entry.events.note("subpages", subpages_set(ranges))
    return Response(status_code=204)
