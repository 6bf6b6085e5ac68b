"""The event log of a VM: pages of JSON, the log as NDJSON, or a stream that goes on (Server-Sent Events or NDJSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

import msgspec
from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.trace.results import ExitColumns
from service.api.common import (
    BINARY,
    EXAMPLE_TRACE,
    EXAMPLE_VM,
    Cursor,
    Limit,
    VmId,
    access_of,
    documented,
    find,
    headers,
    headless,
    principal_of,
    registry_of,
    router,
    settings_of,
)
from service.api.events.event_feed import Feed, Item, PartOf, Wanted
from service.api.events.event_streams import STREAM_HEADERS, EventStream, sse
from service.api.traces.exits import EXAMPLE_EXIT
from service.http import cursors
from service.http.negotiation import JSON, NDJSON, SSE, preferred
from service.http.wire_types import Document, Hex64, decimal, examples
from service.problems import InvalidDocument
from service.runtime.events import KINDS, MARKERS
from service.runtime.registry import Entry

routes = router("events", "/v1/vms/{vm}/events", reads="read")

_OFFERS = (JSON, NDJSON, SSE)
_CURSOR = "events"
_LATEST = "latest"
_MAX_ID = (1 << 53) - 1
_MAX_PAGES = 1 << 40

_EXAMPLE: dict[str, Any] = {
    "id": 4713,
    "kind": "violation",
    "created": "2026-08-22T09:30:00.000000Z",
    "trace": EXAMPLE_TRACE,
    "detail": EXAMPLE_EXIT,
}
_GAP = {
    "id": 4800,
    "kind": "dropped",
    "created": "2026-08-22T09:30:00.000000Z",
    "trace": None,
    "detail": {"first": 4714, "last": 4800, "count": 87, "reason": "not-kept"},
}
_NEXT = f"/v1/vms/{EXAMPLE_VM}/events?cursor=wBIAAAAAAABZ-0FZ"


class Event(Document):
    """Something that happened to a VM, or a marker: `dropped`, `end`."""

    model_config = ConfigDict(json_schema_extra=examples(_EXAMPLE, _GAP))

    id: int | None = Field(
        description="Consecutive in the VM, never given twice. Of `dropped` the last that is missing; `end` has none."
    )
    kind: str = Field(
        description="; ".join(
            f"`{kind}`: {about[0].lower()}{about[1:-1]}" for kind, about in {**KINDS, **MARKERS}.items()
        )
        + ".",
        json_schema_extra={"enum": [*KINDS, *MARKERS]},
    )
    created: str = Field(
        description="When it was committed; RFC 3339, UTC. Of a marker, when it was sent.",
        json_schema_extra={"format": "date-time"},
    )
    trace: str | None = Field(description="The replay that a violation belongs to; null for a single access.")
    detail: dict[str, Any] = Field(
        description="What is told of it, by kind; see docs/events.md. Of a violation, its exit record."
    )


class EventPage(Document):
    """A page of events, oldest first."""

    model_config = ConfigDict(json_schema_extra=examples({"events": [_EXAMPLE], "last": 4713, "next": _NEXT}))

    events: list[Event] = Field(description="Oldest first.")
    last: int = Field(description="How far the page reaches, filtered events included: go on later with `after`.")
    next: str | None = Field(description="URL of the next page; null where the log ends at present.")


def _kinds(text: str | None) -> frozenset[str]:
    if text is None:
        return frozenset(KINDS)
    kinds = [name.strip() for name in text.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            rule = f"must be names among {', '.join(KINDS)}, with commas between them"
            raise InvalidDocument(rule, field="kinds", value=kind)
    return frozenset(kinds)


def _wanted(kinds: str | None, gfn: int | None, npages: int | None, name: str | None, *, expand: bool) -> Wanted:
    if npages is not None and gfn is None:
        raise InvalidDocument("needs a gfn", field="npages", value=npages)
    if gfn is not None and gfn + (npages or 1) > 1 << 52:
        raise InvalidDocument("must leave the range below page 2^52", field="gfn", value=gfn)
    if not expand and (gfn is not None or name is not None):
        raise InvalidDocument("must be true where violations are chosen by gfn or object", field="expand", value=False)
    return Wanted(_kinds(kinds), None if gfn is None else (gfn, gfn + (npages or 1)), name, expand)


def _number(text: str, field: str, last: int) -> int:
    """An id as text: where to begin, at the end of the log at most."""
    number = decimal(text, most=_MAX_ID)
    if number is None:
        raise InvalidDocument("must be the id of an event", field=field, value=text)
    return min(number, last)


def _position(request: Request, entry: Entry, after: str | None, cursor: str | None) -> int:
    """The id after which to begin. A reader that comes back says it in a header, with the query of its first visit."""
    last = entry.events.next_id - 1
    resumed = request.headers.get("last-event-id")
    if resumed is not None:
        return _number(resumed, "Last-Event-ID", last)
    if cursor is not None:
        if after is not None:
            raise InvalidDocument("must not be given beside a cursor", field="after", value=after)
        return min(cursors.decode(_CURSOR, cursor), last)
    if after == _LATEST:
        return last
    return 0 if after is None else _number(after, "after", last)


def _part_of(request: Request, entry: Entry) -> PartOf:
    """Exit records of the machine's replays: those in memory, or from the store."""
    parts = registry_of(request).parts

    async def part_of(trace: str, part: int, least: int) -> ExitColumns:
        held = entry.traces.held(trace, part)
        return held if held is not None else await parts.get(entry.sequence, trace, part, least)

    return part_of


_EXAMPLE_ITEM = Item(4713, "violation", msgspec.json.encode(_EXAMPLE))


@routes.get(
    "",
    operation_id="getEvents",
    summary="Read or follow the events of a VM",
    description=(
        "What happened to the VM, in the order of the commits, from the first that is kept on or `after` an id. JSON "
        "comes in pages. NDJSON is the log up to now; with `follow` it goes on, and blank lines show that the stream "
        "lives. `text/event-stream` always goes on, with `id`, `event` (the kind) and `data` (the event). Events that "
        "are no longer kept are never left out in silence: a marker `dropped` has their ids and their number. A stream "
        "ends with a marker `end`; come back with the last id."
    ),
    openapi_extra={
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "required": False,
                "description": "As `after`, and stronger: what an EventSource sends when it comes back.",
                "schema": {"type": "string", "pattern": "^[0-9]{1,16}$"},
            }
        ]
    },
    responses=documented(
        {
            200: {
                "model": EventPage,
                "description": "Events.",
                "content": {
                    NDJSON: {**BINARY, "example": _EXAMPLE_ITEM.data.decode() + "\n"},
                    SSE: {"schema": {"type": "string"}, "example": sse([_EXAMPLE_ITEM]).decode()},
                },
                "headers": headers("Vary"),
            }
        },
        "not-found",
        "not-acceptable",
        "invalid-value",
        "limit-exceeded",
    ),
)
async def get_events(
    request: Request,
    vm: VmId,
    kinds: Annotated[
        str | None, Query(description="Only these kinds, with commas between them.", examples=["violation,host-memory"])
    ] = None,
    gfn: Annotated[Hex64 | None, Query(description="Of the violations, those of this page.")] = None,
    npages: Annotated[
        int | None, Query(ge=1, le=_MAX_PAGES, description="And of the pages after it, so many together.")
    ] = None,
    object_: Annotated[
        str | None, Query(alias="object", description="Of the violations, those of this protected object.")
    ] = None,
    expand: Annotated[
        bool, Query(description="`false`: the violations of a replay are one event with `first`, `last` and `count`.")
    ] = True,
    after: Annotated[
        str | None,
        Query(pattern="^(latest|[0-9]{1,16})$", description="Begin after this id; `latest`: with what comes next."),
    ] = None,
    follow: Annotated[bool, Query(description="NDJSON: go on with what comes.")] = False,
    limit: Limit = None,
    cursor: Cursor = None,
) -> Response:
    entry = find(request, vm)
    media = preferred(request, _OFFERS)
    settings = settings_of(request)
    registry = registry_of(request)
    wanted = _wanted(kinds, gfn, npages, object_, expand=expand)
    position = _position(request, entry, after, cursor)
    feed = Feed(entry.events, position, wanted, _part_of(request, entry), registry.logs)
    if media == JSON:
        if follow:
            raise InvalidDocument("is for streams: ask for NDJSON or text/event-stream", field="follow", value=True)
        size = cursors.page_limit(limit, settings.page_size, settings.max_page_size)
        return await _page(request, feed, size, limit)
    if limit is not None:
        raise InvalidDocument("is for pages of JSON; a stream has no end of its own", field="limit", value=limit)
    if request.method == "HEAD":
        return headless(media, STREAM_HEADERS)
    return EventStream(
        request,
        feed,
        registry.logs,
        media=media,
        heartbeat=settings.event_heartbeat,
        places=registry.streams,
        access=access_of(request),
        reader=principal_of(request),
        follow=follow or media == SSE,
    )


async def _page(request: Request, feed: Feed, size: int, limit: int | None) -> Response:
    below = feed.log.next_id
    items: list[Item] = []
    while len(items) < size and (found := await feed.next(below, size - len(items))):
        items += found
    follow = _next_url(request, feed.position, limit) if feed.position + 1 < below else None
    return Response(_document(items, feed.position, follow), media_type=JSON, headers={"Vary": "Accept"})


def _document(items: Sequence[Item], last: int, follow: str | None) -> bytes:
    events = b",".join(item.data for item in items)
    return b'{"events":[%b],"last":%d,"next":%b}' % (events, last, msgspec.json.encode(follow))


def _next_url(request: Request, position: int, limit: int | None) -> str:
    """URL of the page after ``position``, with the same filters."""
    kept = {name: value for name, value in request.query_params.items() if name not in ("after", "cursor", "limit")}
    query: dict[str, Any] = {**kept, "cursor": cursors.encode(_CURSOR, position)}
    if limit is not None:
        query["limit"] = limit
    return f"{request.url.path}?{urlencode(query)}"
