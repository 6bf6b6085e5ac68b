"""Clones: virtual machines that begin as another one is."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.api.common import VmId, documented, find, headers, registry_of, router
from service.api.machines.vms import Vm, created_reply
from service.http.idempotency import hooks_of
from service.http.wire_types import Document, examples

routes = router("vms", "/v1/vms", reads="read", writes="write")


class CloneRequest(Document):
    """A clone to be made."""

    model_config = ConfigDict(json_schema_extra=examples({"name": "second policy"}))

    name: str | None = Field(None, max_length=200, description="Its label; null: that of the VM.")


@routes.post(
    "/{vm:id}:clone",
    operation_id="cloneVm",
    summary="Clone a VM",
    description=(
        "Another VM that begins as this one is: memory, slots, vCPUs, bitmaps, protections, symbols, tables, counters. "
        "From then on neither sees what the other does. Frames are shared until the clone is changed, and counted for "
        "both. Results of replays, jobs and events stay with this one. While a change of it is under way, the clone is "
        "what it was before."
    ),
    status_code=201,
    responses=documented(
        {201: {"model": Vm, "description": "Created.", "headers": headers("Location", "ETag")}},
        "malformed-body",
        "not-found",
        "body-too-large",
        "unsupported-media-type",
        "invalid-value",
        "limit-exceeded",
    ),
)
async def clone_vm(request: Request, vm: VmId, body: Annotated[CloneRequest, Body()]) -> Response:
    entry = await registry_of(request).clone(find(request, vm), body.name, hooks_of(request))
    return await created_reply(entry)
