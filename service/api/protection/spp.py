"""Enabling sub-page protection: KVM_INIT_SPP, or KVM_ENABLE_CAP."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.machine import VirtualMachine
from service.api.common import (
    GUARDED_CHANGE,
    VmId,
    changed,
    changed_reply,
    documented,
    find,
    router,
    tagged,
    tagged_reply,
)
from service.api.machines.vm_capabilities import switch_spp
from service.http.wire_types import Document, examples

routes = router("spp", "/v1/vms/{vm}/spp", reads="read", writes="write")


class SppRequest(Document):
    """What SPP is to be."""

    model_config = ConfigDict(json_schema_extra=examples({"active": True}))

    active: bool = Field(description="True; it cannot be switched off.")


class Spp(Document):
    """What SPP is."""

    model_config = ConfigDict(json_schema_extra=examples({"active": True}))

    active: bool = Field(description="Once enabled it stays so for the life of the VM.")


def _spp(machine: VirtualMachine) -> Spp:
    return Spp(active=machine.spp_active)


@routes.get(
    "",
    operation_id="getSpp",
    summary="Whether SPP is enabled",
    responses=documented(
        tagged_reply(Spp, "The state."),
        "not-found",
    ),
)
async def get_spp(request: Request, vm: VmId) -> Response:
    return tagged(request, _spp(find(request, vm).machine))


@routes.put(
    "",
    operation_id="putSpp",
    summary="Enable SPP",
    description="Idempotent. SPP cannot be switched off again: `false` is a conflict once it is enabled.",
    responses=documented(
        changed_reply(Spp, "The state now."),
        *GUARDED_CHANGE,
        "conflict",
        "unsupported",
        "out-of-memory",
    ),
)
async def put_spp(request: Request, vm: VmId, body: SppRequest) -> Response:
    entry = find(request, vm)
    return await changed(request, entry, _spp, lambda machine: switch_spp(machine, body.active, "active"))
