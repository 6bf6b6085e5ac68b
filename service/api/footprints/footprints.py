"""Footprints: made of a trace, listed, read as a file, deleted."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.footprint.places import Footprint as EngineFootprint
from engine.trace.option_names import Address, RecordFormat, ToolFormatName
from service.api.common import (
    BINARY,
    CHANGE,
    Cursor,
    Limit,
    documented,
    footprints_of,
    headers,
    json_response,
    replaying_of,
    router,
    settings_of,
    tagged,
    tenant_of,
)
from service.api.traces.bodies import COLUMNS_ABOUT, FORMAT_ABOUT, FORMATS, SKIP_ABOUT, format_of
from service.api.traces.jobs import ACCEPTED, PREFER, done_as_job, wanted_async
from service.api.traces.traces import static
from service.http import conditional, cursors
from service.http.idempotency import hooks_of, will_answer
from service.http.negotiation import ARROW, CSV, JSON, NDJSON, OCTETS, PARQUET, TEXT, content_type, preferred
from service.http.prefer import Preferences
from service.http.wire_types import Document, examples
from service.runtime.footprint_bodies import built_body
from service.runtime.footprint_builds import FootprintRequest, by_of
from service.runtime.footprints import Footprints
from service.runtime.job import Wanted
from service.runtime.offload import maybe_in_thread
from service.storage.records import FootprintRecord, JobRecord

routes = router("footprints", "/v1/footprints", reads="read", writes="write")

# Positions are moments of creation.
_CURSOR = "footprints by moment"
_OFFERS = (JSON, PARQUET)
# Footprints whose documents are read on the event loop: each tells up to 100 traces.
_INLINE = 4
_ABOUT_LEVEL = (
    "What places are made of. `spans`: runs of sub-pages. `bytes`: runs of bytes, which tell collateral exactly."
)
_ABOUT_BY = (
    "What places are apart by beside: `time:N` (nanoseconds) or `records:N` (equal runs of records), and `pc`, with a "
    "comma between two."
)

EXAMPLE_FOOTPRINT = "fp_1b7e0c55d2a94f63"
FootprintId = Annotated[
    str, Path(alias="footprint", description="Id of the footprint.", examples=[EXAMPLE_FOOTPRINT], max_length=64)
]
Level = Annotated[Literal["spans", "bytes"] | None, Query(description=_ABOUT_LEVEL)]
ByText = Annotated[str | None, Query(max_length=100, description=_ABOUT_BY)]

_TRACE = {
    "digest": "8d40c1e35cf1f79c8b3df1e1a1a3f1d7f0c0a5c5b2e9d7b6a4f3e2d1c0b9a897",
    "records": 16000000,
    "format": "packed",
    "columns": ["gpa", "size", "access"],
    "address": "gpa",
    "name": "boot",
    "nanoseconds": 0,
}
ABOUT: dict[str, Any] = {
    "id": EXAMPLE_FOOTPRINT,
    "created": "2026-08-22T09:30:00.000000Z",
    "vm": None,
    "level": "spans",
    "by": {"time": None, "records": None, "pc": False},
    "places": 120419,
    "records": 16000000,
    "writes": 16000000,
    "seconds": None,
    "traces": [_TRACE],
    "traces_total": 1,
    "size": 871204,
}


class FootprintBy(Document):
    """What places are apart by beside where they are and what is done there."""

    time: int | None = Field(description="Buckets of so many nanoseconds.")
    records: int | None = Field(description="Buckets of so many records.")
    pc: bool = Field(description="The address of the instruction.")


class FootprintTrace(Document):
    """A trace that is in a footprint."""

    digest: str = Field(description="SHA-256 of its body; beside a replay the id of the trace.")
    records: int = Field(description="How many accesses.")
    format: str = Field(description="What the body was taken for.")
    columns: list[str] = Field(description="The columns that were read.")
    address: str = Field(description="`gpa`, or `flat`.")
    name: str = Field(description="A label.")
    nanoseconds: int = Field(description="How long it is; 0 where it has no times.")


class Footprint(Document):
    """What is in a footprint."""

    model_config = ConfigDict(json_schema_extra=examples(ABOUT))

    id: str = Field(description="Id of the footprint.")
    created: str = Field(description="RFC 3339, UTC.", json_schema_extra={"format": "date-time"})
    vm: str | None = Field(description="The VM whose replay it was collected beside; null where there was none.")
    level: str = Field(description="`spans` or `bytes`.")
    by: FootprintBy = Field(description="What places are apart by.")
    places: int = Field(description="Distinct places.")
    records: int = Field(description="Accesses in all.")
    writes: int = Field(description="Writes among them.")
    seconds: float | None = Field(description="How long its traces are; null where one has no times.")
    traces: list[FootprintTrace] = Field(description="The first 100 of its traces, by digest.")
    traces_total: int = Field(description="How many there are.")
    size: int = Field(description="Bytes of the Parquet file.")


class FootprintPage(Document):
    """A page of footprints, oldest first."""

    model_config = ConfigDict(json_schema_extra=examples({"footprints": [ABOUT], "next": None}))

    footprints: list[Footprint] = Field(description="Oldest first.")
    next: str | None = Field(description="URL of the next page; null on the last.")


def footprint_document(record: FootprintRecord) -> dict[str, Any]:
    """A ``Footprint``."""
    known = {"id": record.id, "created": record.created, "vm": record.vm or None, "size": record.size}
    return {**known, **json.loads(record.head)}


def created(record: FootprintRecord, extra: dict[str, str] | None = None) -> Response:
    """The reply that says what was made."""
    location = {"Location": f"/v1/footprints/{record.id}"}
    return json_response(footprint_document(record), status=201, extra=location | (extra or {}))


async def kept(request: Request, found: EngineFootprint) -> Response:
    """Keep a footprint; the reply, which is kept with it for the key of the request. Raises what ``add`` does."""

    def told(record: FootprintRecord) -> list[JobRecord]:
        will_answer(request, created(record))
        return []

    return created(await footprints_of(request).add(tenant_of(request), found, hooks_of(request), told))


async def made_as_job(request: Request, wanted: Wanted, wishes: Preferences) -> Response:
    """The reply of a job that makes a footprint, or of its footprint if that was there in time."""
    outcome = await done_as_job(request, "", wanted, wishes)
    if isinstance(outcome, Response):
        return outcome
    return created(await footprints_of(request).get(tenant_of(request), outcome[0]), outcome[1])


@routes.post(
    "",
    operation_id="createFootprint",
    summary="Reduce a trace to its places",
    description=(
        "The body is a trace of any format that a replay takes, or a footprint, as it is read from here or written by "
        "`subpage footprint build`. It is counted while it arrives; memory is that of its distinct places. What "
        "depends on what was before is refused: operations between accesses, address spaces, `address=gva`.\n\n"
        "With `Prefer` it becomes a job, as a replay does. The last footprints of a tenant are kept."
    ),
    status_code=201,
    openapi_extra={
        "parameters": [PREFER],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/TraceBody"}},
                **dict.fromkeys((NDJSON, ARROW, PARQUET, TEXT, CSV, OCTETS), BINARY),
            },
        },
    },
    responses=documented(
        {
            201: {
                "model": Footprint,
                "description": "Counted, and kept.",
                "headers": headers("Location", "Preference-Applied"),
            },
            **ACCEPTED,
        },
        *(problem for problem in CHANGE if problem not in ("not-found", "vm-busy")),
        "invalid-trace",
        "not-yet-supported",
    ),
)
async def create_footprint(
    request: Request,
    level: Level = None,
    by: ByText = None,
    name: Annotated[str, Query(max_length=200, description="A label of the trace.")] = "",
    record: Annotated[
        RecordFormat | None,
        Query(description="Layout of packed records; with `application/octet-stream` only."),
    ] = None,
    format: Annotated[ToolFormatName | None, Query(description=FORMAT_ABOUT)] = None,
    skip_unknown: Annotated[bool, Query(description=SKIP_ABOUT)] = False,
    columns: Annotated[str | None, Query(max_length=2000, description=COLUMNS_ABOUT)] = None,
    address: Annotated[
        Address, Query(description="What the addresses are. `flat`: of a process, taken as `gpa`. `gva` is refused.")
    ] = "gpa",
) -> Response:
    settings, tenant, footprints = settings_of(request), tenant_of(request), footprints_of(request)
    media = content_type(request, tuple(FORMATS))
    static(address)
    wanted = FootprintRequest(
        format_of(media, format),
        record,
        level,
        by_of(by),
        address,
        skip_unknown,
        columns,
        name,
        settings.max_body_bytes,
    )
    wishes = wanted_async(request)
    if wishes is not None:
        return await made_as_job(request, wanted, wishes)

    async with built_body(wanted, request, tenant, replaying_of(request), footprints.memory, settings) as found:
        return await kept(request, found)


@routes.get(
    "",
    operation_id="listFootprints",
    summary="List footprints",
    description="Those that are still kept, oldest first.",
    responses=documented({200: {"model": FootprintPage, "description": "One page."}}, "invalid-value"),
)
async def list_footprints(request: Request, limit: Limit = None, cursor: Cursor = None) -> Response:
    settings = settings_of(request)
    size = cursors.page_limit(limit, settings.page_size, settings.max_page_size)
    after = cursors.decode(_CURSOR, cursor) if cursor is not None else 0
    found, following = await footprints_of(request).page(tenant_of(request), after, size)
    follow = cursors.next_url("/v1/footprints", _CURSOR, following, limit) if following is not None else None
    documents = await maybe_in_thread(len(found) <= _INLINE, lambda: [footprint_document(record) for record in found])
    return json_response({"footprints": documents, "next": follow})


class _File(Response):
    """The file of a footprint, of which one part is in memory of its tenant while it is sent."""

    media_type = PARQUET

    def __init__(self, footprints: Footprints, record: FootprintRecord, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._footprints = footprints
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        async with aclosing(self._footprints.file(self._record.tenant, self._record)) as parts:
            async for part in parts:
                if not begun:  # what is wrong with the first one is told as it is
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                begun = True
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@routes.get(
    "/{footprint}",
    operation_id="getFootprint",
    summary="Read a footprint",
    description="What is in it, or with `Accept: application/vnd.apache.parquet` all of it (docs/footprints.md).",
    responses=documented(
        {
            200: {
                "model": Footprint,
                "description": "The footprint.",
                "content": {PARQUET: BINARY},
                "headers": headers("ETag", "Vary"),
            },
            304: {"description": "Unchanged.", "headers": headers("ETag", "Vary")},
        },
        "not-found",
        "not-acceptable",
    ),
)
async def get_footprint(request: Request, footprint: FootprintId) -> Response:
    footprints, tenant = footprints_of(request), tenant_of(request)
    told = {"Vary": "Accept"}
    if preferred(request, _OFFERS) == JSON:
        reply = tagged(request, footprint_document(await footprints.get(tenant, footprint)), extra=told)
        reply.headers["Vary"] = "Accept"
        return reply
    record = await footprints.get(tenant, footprint)
    told["ETag"] = conditional.entity_tag(record.id.encode())  # it never changes
    if conditional.not_modified(request, told["ETag"]):
        return Response(status_code=304, headers=told)
    told["Content-Disposition"] = f'attachment; filename="{record.id}.footprint"'
    told["Content-Length"] = str(record.size)
    if request.method == "HEAD":
        return Response(media_type=PARQUET, headers=told)
    return _File(footprints, record, told)


@routes.delete(
    "/{footprint}",
    operation_id="deleteFootprint",
    summary="Delete a footprint",
    status_code=204,
    responses=documented({204: {"description": "It is gone."}}, "not-found"),
)
async def delete_footprint(request: Request, footprint: FootprintId) -> Response:
    await footprints_of(request).delete(tenant_of(request), footprint, hooks_of(request))
    return Response(status_code=204)
