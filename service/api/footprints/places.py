"""What a footprint shows: its pages, its buckets of time, its writers; of one collected beside a replay, too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import NotFound
from engine.footprint import summaries
from engine.footprint.question import Check
from engine.footprint.summaries import Counts
from service.api.common import (
    Cursor,
    Limit,
    VmId,
    documented,
    find,
    json_response,
    router,
    settings_of,
)
from service.api.footprints.asking import ask
from service.api.footprints.footprints import FootprintId
from service.api.traces.exits import TraceId
from service.http import cursors
from service.http.wire_types import Document, Hex32, Hex64, examples
from service.runtime.footprints import Asked, Count

routes = router("footprints", "/v1", reads="read")

_ABOUT_ORDER = "`place`: by address or time. `writes`: those with the most writes first."
Order = Annotated[Literal["place", "writes"], Query(description=_ABOUT_ORDER)]

_PAGE = {"gfn": "0x2a5c", "accesses": 902, "writes": 902, "subpages": "0x0000e000"}
_BUCKET = {"bucket": 12, "accesses": 131072, "writes": 131072}
_WRITER = {"pc": "0xffffffff810a3f20", "accesses": 4711, "writes": 4711}


class PageCount(Document):
    """A page that is accessed. An access over several pages counts in each."""

    gfn: Hex64 = Field(description="Number of the page.")
    accesses: int = Field(description="How many.")
    writes: int = Field(description="Writes among them.")
    subpages: Hex32 = Field(description="Its sub-pages that are touched.")


class BucketCount(Document):
    """A bucket of time, or of records, in which something is accessed."""

    bucket: int = Field(description="Its number: the time, or the index of the record, by the size of a bucket.")
    accesses: int = Field(description="How many.")
    writes: int = Field(description="Writes among them.")


class WriterCount(Document):
    """An instruction that accesses something."""

    pc: Hex64 = Field(description="Its address.")
    accesses: int = Field(description="How many.")
    writes: int = Field(description="Writes among them.")


class FootprintPages(Document):
    """Pages that are accessed."""

    model_config = ConfigDict(json_schema_extra=examples({"pages": [_PAGE], "total": 1, "next": None}))

    pages: list[PageCount] = Field(description="In the order that was asked for.")
    total: int = Field(description="How many there are.")
    next: str | None = Field(description="URL of the next page of the list; null on the last.")


class FootprintTimeline(Document):
    """Buckets in which something is accessed."""

    model_config = ConfigDict(json_schema_extra=examples({"timeline": [_BUCKET], "total": 1, "next": None}))

    timeline: list[BucketCount] = Field(description="In the order that was asked for.")
    total: int = Field(description="How many there are.")
    next: str | None = Field(description="URL of the next page of the list; null on the last.")


class FootprintWriters(Document):
    """Instructions that access something."""

    model_config = ConfigDict(json_schema_extra=examples({"writers": [_WRITER], "total": 1, "next": None}))

    writers: list[WriterCount] = Field(description="In the order that was asked for.")
    total: int = Field(description="How many there are.")
    next: str | None = Field(description="URL of the next page of the list; null on the last.")


def _rows(name: str, counts: Counts, at: Any) -> list[dict[str, Any]]:
    """Items of a list, those at the positions ``at``."""
    numbers = {"accesses": counts.accesses[at].tolist(), "writes": counts.writes[at].tolist()}
    keys = counts.key[at].tolist()
    if name == "pages":
        masks = [f"{mask:#010x}" for mask in counts.subpages[at].tolist()]
        columns = {"gfn": list(map(hex, keys)), **numbers, "subpages": masks}
    elif name == "writers":
        columns = {"pc": list(map(hex, keys)), **numbers}
    else:
        columns = {"bucket": keys, **numbers}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


async def _list(
    request: Request,
    footprint: str,
    path: str,
    count: Count,
    order: str,
    limit: int | None,
    cursor: str | None,
) -> Response:
    """One page of one of the three lists, which ``path`` ends in the name of."""
    name = path.rpartition("/")[2]
    settings = settings_of(request)
    size = cursors.page_limit(limit, settings.page_size, settings.max_page_size)
    kind = f"{name} of {footprint} by {order}"
    start = cursors.decode(kind, cursor) if cursor is not None else 0

    def work(known: Asked, check: Check) -> tuple[list[dict[str, Any]], int]:
        counts, ranked = known.counts(count, check, most=order != "place")
        part = slice(start, start + size)
        return _rows(name, counts, part if order == "place" else ranked[part]), len(counts.key)

    rows, total = await ask(request, footprint, work)
    follow = None
    if start + size < total:
        follow = cursors.next_url(path, kind, start + size, limit)
        follow += f"&order={order}" if order != "place" else ""
    return json_response({name: rows, "total": total, "next": follow})


def _of(model: type[Document]) -> dict[int | str, dict[str, Any]]:
    return documented(
        {200: {"model": model, "description": "One page."}},
        "not-found",
        "invalid-value",
        "limit-exceeded",
        "invalid-trace",
    )


@routes.get(
    "/footprints/{footprint}/pages",
    operation_id="getFootprintPages",
    summary="List the pages of a footprint",
    responses=_of(FootprintPages),
)
async def get_pages(
    request: Request, footprint: FootprintId, order: Order = "place", limit: Limit = None, cursor: Cursor = None
) -> Response:
    return await _list(request, footprint, request.url.path, summaries.pages, order, limit, cursor)


@routes.get(
    "/footprints/{footprint}/timeline",
    operation_id="getFootprintTimeline",
    summary="List the buckets of a footprint",
    description="Of one that was made with `by=time:N` or `by=records:N`.",
    responses=_of(FootprintTimeline),
)
async def get_timeline(
    request: Request, footprint: FootprintId, order: Order = "place", limit: Limit = None, cursor: Cursor = None
) -> Response:
    return await _list(request, footprint, request.url.path, summaries.timeline, order, limit, cursor)


@routes.get(
    "/footprints/{footprint}/writers",
    operation_id="getFootprintWriters",
    summary="List the writers of a footprint",
    description="Of one that was made with `by=pc`.",
    responses=_of(FootprintWriters),
)
async def get_writers(
    request: Request, footprint: FootprintId, order: Order = "place", limit: Limit = None, cursor: Cursor = None
) -> Response:
    return await _list(request, footprint, request.url.path, summaries.writers, order, limit, cursor)


def _beside(request: Request, vm: str, trace: str) -> str:
    """The footprint that was collected beside a replay. Raises NotFound, which says how one is."""
    entry = find(request, vm)
    found = entry.traces.known(trace)
    if found.footprint is None:
        rule = "has no footprint: post the trace with footprint=spans or footprint=bytes to have one collected"
        raise NotFound(rule, field="footprint", value=trace)
    return found.footprint


_BESIDE = "Of the footprint that was collected beside the replay, with `footprint=spans` or `bytes`; 404 without one."


@routes.get(
    "/vms/{vm}/traces/{trace}/pages",
    operation_id="getTracePages",
    summary="List the pages of a replay",
    description=_BESIDE,
    responses=_of(FootprintPages),
)
async def get_trace_pages(
    request: Request, vm: VmId, trace: TraceId, order: Order = "place", limit: Limit = None, cursor: Cursor = None
) -> Response:
    footprint = _beside(request, vm, trace)
    return await _list(request, footprint, request.url.path, summaries.pages, order, limit, cursor)


@routes.get(
    "/vms/{vm}/traces/{trace}/timeline",
    operation_id="getTraceTimeline",
    summary="List the buckets of a replay",
    description=_BESIDE + " `footprint_by` says how large they are.",
    responses=_of(FootprintTimeline),
)
async def get_trace_timeline(
    request: Request, vm: VmId, trace: TraceId, order: Order = "place", limit: Limit = None, cursor: Cursor = None
) -> Response:
    footprint = _beside(request, vm, trace)
    return await _list(request, footprint, request.url.path, summaries.timeline, order, limit, cursor)


@routes.get(
    "/vms/{vm}/traces/{trace}/writers",
    operation_id="getTraceWriters",
    summary="List the writers of a replay",
    description=_BESIDE + " `footprint_by=pc` keeps them apart.",
    responses=_of(FootprintWriters),
)
async def get_trace_writers(
    request: Request, vm: VmId, trace: TraceId, order: Order = "place", limit: Limit = None, cursor: Cursor = None
) -> Response:
    footprint = _beside(request, vm, trace)
    return await _list(request, footprint, request.url.path, summaries.writers, order, limit, cursor)
