"""Attaching a machine to a tool that speaks KVMI (docs/kvmi.md)."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal
from uuid import UUID

from pydantic import ConfigDict, Field, SecretStr, StringConstraints
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from engine.errors import NotFound
from service.api.common import (
    CHANGE,
    VmId,
    documented,
    find,
    json_response,
    principal_of,
    router,
    settings_of,
)
from service.http.wire_types import Document, examples
from service.kvmi.attachment import Attachment, Attachments, Wanted
from service.kvmi.handshake import cookie_hash
from service.platform.sockets import Address, NotAllowed, check
from service.platform.stamps import stamp
from service.problems import InvalidDocument

routes = router("introspection", "/v1/vms/{vm}/kvmi", reads="read", writes="write")

_LONGEST_TIMEOUT = 3600
_UUID = "0f2a7c1e-8d4b-5a63-9c10-6b7e5d3f2a18"
_CONNECT = "unix:/run/subpage/kvmi/hookguest"

Dialect = Literal["v7", "v6"]
Connect = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern="^(unix:/|vsock:)")]


class KvmiRequest(Document):
    """Where the tool listens, and what the machine is to it."""

    model_config = ConfigDict(json_schema_extra=examples({"connect": _CONNECT, "dialect": "v7"}))

    connect: Connect = Field(
        description="`unix:` and a path, or `vsock:CID:PORT`, where the operator allows it (setting `kvmi_sockets`)."
    )
    dialect: Dialect = Field("v7", description="libkvmi 1.0 and later speak `v7`, its branch kvmi-v6 `v6`.")
    cookie: SecretStr | None = Field(
        None, min_length=1, max_length=256, description="What the tool has to know; null: any tool will do."
    )
    reconnect: float = Field(0.5, ge=0.1, le=60, description="Seconds from one attempt to connect to the next.")
    uuid: UUID | None = Field(None, description="By what the tool tells guests apart; null: made of the VM's id.")
    name: str | None = Field(
        None, min_length=1, max_length=63, description="What the tool calls it; null: the VM's name, or its id."
    )
    priority: int = Field(0, ge=-1000, le=1000, description="Among all tools: higher ones are asked first.")
    timeout: float | None = Field(
        None,
        gt=0,
        le=_LONGEST_TIMEOUT,
        description="Seconds that the tool has for an answer; null: setting `ask_timeout`.",
    )


class Kvmi(Document):
    """An attachment as it is."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "connect": _CONNECT,
                "dialect": "v7",
                "cookie": False,
                "reconnect": 0.5,
                "uuid": _UUID,
                "name": "guest",
                "priority": 0,
                "timeout": 30.0,
                "tool": "tool_c81f0a4d7e2b9356",
                "state": "connected",
                "connected": "2026-11-30T08:00:00.000000Z",
                "attempts": 3,
                "commands": 41,
                "events": 4,
                "restricted_pages": 20,
                "silent_because": None,
                "last_error": None,
            }
        )
    )

    connect: str = Field(description="Where the tool listens.")
    dialect: Dialect = Field(description="What is spoken.")
    cookie: bool = Field(description="Whether the tool has to know one.")
    reconnect: float = Field(description="Seconds from one attempt to the next.")
    uuid: str = Field(description="What the tool sees.")
    name: str = Field(description="What the tool sees.")
    priority: int = Field(description="Among all tools of the VM.")
    timeout: float = Field(description="Seconds that the tool has for an answer.")
    tool: str = Field(description="Its id in `by` of other tools' messages and in the audit log.")
    state: Literal["connecting", "handshake", "connected", "ending"] = Field(
        description="`connecting`: nobody listens, or the last tool has left; it is tried again."
    )
    connected: str | None = Field(description="RFC 3339, UTC: since when; null while no tool is connected.")
    attempts: int = Field(description="How often it has tried to connect.")
    commands: int = Field(description="Commands of the tool that is connected, or was last.")
    events: int = Field(description="Events that were sent to it.")
    restricted_pages: int = Field(description="Pages that it has restricted.")
    silent_because: str | None = Field(description="Why no PF event can come; null where one can.")
    last_error: str | None = Field(description="Why the last attempt or connection ended; null while one goes well.")

    @classmethod
    def of(cls, found: Attachment) -> Kvmi:
        wanted, identity = found.wanted, found.identity
        return cls(
            connect=wanted.connect,
            dialect=wanted.dialect,  # type: ignore[arg-type]
            cookie=wanted.cookie is not None,
            reconnect=wanted.reconnect,
            uuid=str(identity.uuid),
            name=identity.name,
            priority=found.priority,
            timeout=found.timeout,
            tool=found.id,
            state=found.state,  # type: ignore[arg-type]
            connected=stamp(found.connected_at) if found.connected_at is not None else None,
            attempts=found.attempts,
            commands=found.commands,
            events=found.events,
            restricted_pages=len(found.guest.restricted),
            silent_because=found.silence,
            last_error=found.last_error,
        )


def _attachments(request: HTTPConnection) -> Attachments:
    found: Attachments = request.app.state.kvmi
    return found


def _attachment(request: Request, vm: str) -> Attachment:
    found = _attachments(request).find(find(request, vm))
    if found is None:
        raise NotFound("must be a VM that is attached to a tool: PUT does that", field="kvmi", value=vm)
    return found


@routes.get(
    "",
    operation_id="getKvmi",
    summary="Read how a VM is attached to a KVMI tool",
    responses=documented({200: {"model": Kvmi, "description": "The attachment."}}, "not-found"),
)
async def get_kvmi(request: Request, vm: VmId) -> Response:
    return json_response(Kvmi.of(_attachment(request, vm)))


@routes.put(
    "",
    operation_id="putKvmi",
    summary="Attach a VM to a KVMI tool",
    description=(
        "The VM becomes the hypervisor's end of KVMI: it connects to the socket where a tool of libkvmi listens, and "
        "tries again until one does and whenever it has left. An attachment lasts until it or the VM is deleted, the "
        "token is revoked or the service stops. While a tool is connected another PUT is a conflict."
    ),
    responses=documented(
        {
            200: {"model": Kvmi, "description": "It takes the place of one that no tool had."},
            201: {"model": Kvmi, "description": "Attached; the VM looks for its tool."},
        },
        *CHANGE,
        "conflict",
    ),
)
async def put_kvmi(request: Request, vm: VmId, body: KvmiRequest) -> Response:
    entry = find(request, vm)
    try:
        address = Address.parse(body.connect)
        check(address, settings_of(request).kvmi_sockets, entry.tenant)
    except NotAllowed as error:
        raise InvalidDocument(str(error), field="connect", value=body.connect) from None
    cookie = cookie_hash(body.cookie.get_secret_value()) if body.cookie is not None else None
    wanted = Wanted(
        body.connect,
        address,
        body.dialect,
        cookie,
        body.reconnect,
        body.uuid,
        body.name,
        body.priority,
        body.timeout,
    )
    made, first = await _attachments(request).put(entry, wanted, principal_of(request))
    return json_response(Kvmi.of(made), status=201 if first else 200)


@routes.delete(
    "",
    operation_id="deleteKvmi",
    summary="Detach a VM from its KVMI tool",
    description=(
        "A tool that has enabled UNHOOK is told, and has five seconds to leave by itself. What it has restricted is "
        "given back; accesses that wait for its answer land."
    ),
    status_code=204,
    response_description="Detached.",
    responses=documented({204: {"description": "Detached."}}, "not-found"),
)
async def delete_kvmi(request: Request, vm: VmId) -> Response:
    await asyncio.wait([_attachment(request, vm).begin_end()])
    return Response(status_code=204)
