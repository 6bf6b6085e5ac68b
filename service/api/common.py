"""What the routes of every resource share: the machine of a request, its guard, and documented headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Annotated, Any, cast

import msgspec
from fastapi import Path, Query
from pydantic import BaseModel
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from engine.machine import VirtualMachine
from service import __version__
from service.http import conditional
from service.http.conditional import entity_tag
from service.http.idempotency import hooks_of
from service.http.negotiation import OCTETS
from service.http.route import Routes
from service.problems import responses
from service.runtime.asking import Asker
from service.runtime.entry import Listed
from service.runtime.footprints import Footprints
from service.runtime.jobs import Jobs
from service.runtime.memory_files import MemoryFiles
from service.runtime.registry import Entry, Registry, unknown_vm
from service.runtime.replays import Replaying
from service.security.access import AccessControl, Permission, Principal
from service.settings import Settings
from service.telemetry.metrics import Metrics

EXAMPLE_VM = "vm_3f9c2a1be07d4c55"
EXAMPLE_TRACE = "tr_9d41c07a5be2f386"
# The schema of bytes.
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}

_VM_ABOUT = "Id of the VM."
VmId = Annotated[str, Path(alias="vm", description=_VM_ABOUT, examples=[EXAMPLE_VM])]
Limit = Annotated[int | None, Query(ge=1, description="Items in one page.", examples=[100])]
Cursor = Annotated[str | None, Query(min_length=1, description="Opaque cursor, from `next` of the page before.")]

_NAMES = {
    "ETag": "Entity tag of the representation.",
    "Location": "URL of what was created.",
    "Preference-Applied": "Which preferences of the request were honoured (RFC 7240).",
    "Retry-After": "Seconds after which looking again is worth it.",
    "Vary": "Headers of the request that chose the representation.",
}
# Headers that not every reply of their status has.
_SOMETIMES = frozenset({"Preference-Applied", "Retry-After"})


# Problems of every change of a machine that a JSON body describes; and of one that honours If-Match.
CHANGE = (
    "malformed-body",
    "not-found",
    "vm-busy",
    "body-too-large",
    "unsupported-media-type",
    "invalid-value",
    "limit-exceeded",
)
GUARDED_CHANGE = (*CHANGE, "precondition-failed", "precondition-required")


def vm_parameter() -> dict[str, Any]:
    """OpenAPI of the path parameter, for a route that reads it by itself."""
    return {
        "name": "vm",
        "in": "path",
        "required": True,
        "description": _VM_ABOUT,
        "schema": {"type": "string", "examples": [EXAMPLE_VM]},
    }


def headers(*names: str) -> dict[str, Any]:
    """OpenAPI of response headers."""
    return {
        name: {
            "description": _NAMES[name],
            "schema": {"type": "integer", "minimum": 0} if name == "Retry-After" else {"type": "string"},
            **({"required": False} if name in _SOMETIMES else {}),
        }
        for name in names
    }


def tagged_reply(model: type[BaseModel], about: str) -> dict[int | str, dict[str, Any]]:
    """What a read answers that ``tagged`` renders: the document with its tag, or that the client has it."""
    told = headers("ETag")
    return {
        200: {"model": model, "description": about, "headers": told},
        304: {"description": "Unchanged.", "headers": told},
    }


def changed_reply(model: type[BaseModel], about: str) -> dict[int | str, dict[str, Any]]:
    """What a change answers that ends in ``tagged``: the document as it is now, with its tag."""
    return {200: {"model": model, "description": about, "headers": headers("ETag")}}


def octets_reply(model: type[BaseModel], about: str) -> dict[int | str, dict[str, Any]]:
    """As ``tagged_reply``, of a read that is JSON or bytes as the client asks."""
    told = headers("ETag", "Vary")
    return {
        200: {"model": model, "description": about, "content": {OCTETS: BINARY}, "headers": told},
        304: {"description": "Unchanged.", "headers": told},
    }


def documented(success: dict[int | str, dict[str, Any]], *problems: str) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route: what it answers with, and the problems it may end in."""
    return {**success, **responses(*problems)}


def router(tag: str, prefix: str = "", *, reads: Permission | None = None, writes: Permission | None = None) -> Routes:
    """A router of one resource. ``reads`` and ``writes`` are what its routes demand of their callers."""
    return Routes(reads=reads, writes=writes, prefix=prefix, tags=[tag], default_response_class=Response)


def settings_of(request: HTTPConnection) -> Settings:
    return cast(Settings, request.app.state.settings)


def registry_of(request: HTTPConnection) -> Registry:
    return cast(Registry, request.app.state.registry)


def memory_files_of(request: HTTPConnection) -> MemoryFiles:
    return cast(MemoryFiles, request.app.state.memory_files)


def jobs_of(request: HTTPConnection) -> Jobs:
    return cast(Jobs, request.app.state.jobs)


def footprints_of(request: HTTPConnection) -> Footprints:
    return cast(Footprints, request.app.state.footprints)


def metrics_of(request: HTTPConnection) -> Metrics:
    return cast(Metrics, request.app.state.metrics)


def replaying_of(request: HTTPConnection) -> Replaying:
    """Where replays are done."""
    return cast(Replaying, request.app.state.replaying)


def access_of(request: HTTPConnection) -> AccessControl:
    return cast(AccessControl, request.app.state.access)


def principal_of(request: HTTPConnection) -> Principal:
    """Who is asking."""
    return cast(Principal, request.scope["principal"])


def tenant_of(request: HTTPConnection) -> str:
    """Whose machines the caller sees."""
    return principal_of(request).tenant


def asker_of(request: HTTPConnection, entry: Entry, *, traced: bool, landed: bool = False) -> Asker:
    """Who asks the tools of a machine for this request; ``traced``: about a replay, whose result gets an id now;
    ``landed``: of a guest that runs meanwhile."""
    state = request.app.state
    trace = entry.traces.next_id()[0] if traced else None
    return Asker(entry, settings_of(request), metrics_of(request), lambda: state.draining, trace, landed)


def find(request: HTTPConnection, vm_id: str) -> Entry:
    """The machine that the path names. Raises NotFound, also for one of another tenant."""
    entry = registry_of(request).get(vm_id)
    if entry.tenant != tenant_of(request):
        raise unknown_vm(vm_id)
    return entry


def guard(request: Request, entry: Entry, current: Callable[[], Iterable[str]]) -> None:
    """Honour If-Match against the tags of the resource now; demanded on machines created with ``require_match``.

    Call it while holding the machine's lock, so that the state compared is the state changed.
    """
    conditional.require_match(request, current, required=entry.require_match)


class changing:  # noqa: N801 - it reads as the function that it could be, which would take twice the time
    """``async with changing(request, entry) as machine``: held for one mutation that ``request`` makes; see
    ``Entry.mutation``."""

    __slots__ = ("_mutation",)

    def __init__(self, request: Request, entry: Entry, *, joins: bool = False) -> None:
        self._mutation = entry.mutation(hooks_of(request), joins=joins)

    async def __aenter__(self) -> VirtualMachine:
        return (await self._mutation.__aenter__()).machine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._mutation.__aexit__(kind, error, trace)
        finally:
            del error, trace


def vm_tag(entry: Entry | Listed) -> str:
    """The entity tag of a machine as it is: every committed change counts its revision up."""
    return _vm_tag(entry, entry.revision)


def held_tag(entry: Entry) -> str:
    """The same of the state that a mutation changes, which others of its group may have changed before it."""
    return _vm_tag(entry, entry.held_revision)


def _vm_tag(entry: Entry | Listed, revision: int) -> str:
    return entity_tag(f"{entry.id} {entry.created.isoformat()} {revision} {__version__}".encode())


def encode(document: BaseModel | Any) -> bytes:
    """JSON of a model or of plain Python values."""
    if isinstance(document, BaseModel):
        return document.model_dump_json().encode()
    return msgspec.json.encode(document)


def json_response(document: Any, *, status: int = 200, extra: dict[str, str] | None = None) -> Response:
    """``document`` as JSON."""
    return Response(encode(document), status, media_type="application/json", headers=extra)


def headless(media: str, extra: dict[str, str]) -> Response:
    """What HEAD gets where GET would get a stream, whose length nobody knows and which is not made for it."""
    reply = Response(media_type=media, headers=extra)
    del reply.headers["content-length"]
    return reply


def tagged(request: Request, document: Any, *, status: int = 200, extra: dict[str, str] | None = None) -> Response:
    """``document`` as JSON with its entity tag, or 304 when the client has it."""
    content = encode(document)
    tag = conditional.entity_tag(content)
    if request.method in ("GET", "HEAD") and conditional.not_modified(request, tag):
        return Response(status_code=304, headers={"ETag": tag})
    return Response(content, status, media_type="application/json", headers={"ETag": tag, **(extra or {})})


def tag_of(document: Any) -> str:
    """The entity tag that ``tagged`` gives to ``document``."""
    return conditional.entity_tag(encode(document))


async def changed(
    request: Request, entry: Entry, shown: Callable[[VirtualMachine], Any], change: Callable[[VirtualMachine], object]
) -> Response:
    """Change a resource of a machine as one mutation, if If-Match allows it; replies as ``tagged`` with what it is now.

    ``shown`` reads the representation that GET of the resource has; ``change`` takes well under a millisecond.
    """
    async with changing(request, entry, joins=True) as machine:
        guard(request, entry, lambda: [tag_of(shown(machine))])
        change(machine)
    return tagged(request, shown(machine))
