"""Capabilities that KVM has per VM, as resources: what KVM_CHECK_EXTENSION says, and KVM_ENABLE_CAP."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import Conflict, NotFound
from engine.ioctls import CAP_X86_SPP, check_vm_extension
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
from service.http.wire_types import Document, Hex64, examples

routes = router("spp", "/v1/vms/{vm}/capabilities", reads="read", writes="write")

NAME = "x86-spp"
_KNOWN = (str(CAP_X86_SPP), NAME, "KVM_CAP_X86_SPP", "spp")
_REPLY = {"capability": CAP_X86_SPP, "name": NAME, "available": 512, "enabled": True, "result": {}}

CapabilityName = Annotated[
    str, Path(alias="cap", description=f"Number or name, {' or '.join(_KNOWN)}.", examples=[NAME], max_length=64)
]


class VmCapability(Document):
    """A capability of a VM as it is."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    capability: int = Field(description="Its number.")
    name: str = Field(description="Its name.")
    available: int = Field(description="What KVM_CHECK_EXTENSION says: pages of one call, whatever the host has, or 0.")
    enabled: bool = Field(description="Whether it is on.")
    result: dict[str, Hex64] = Field(description="What enabling it stores for the caller: nothing.")


class VmCapabilityRequest(Document):
    """What a capability is to be."""

    model_config = ConfigDict(json_schema_extra=examples({"enabled": True}))

    enabled: bool = Field(description="True; what is enabled stays so.")


def _known(cap: str) -> None:
    if cap not in _KNOWN:
        raise NotFound(f"must be a capability of a VM: {CAP_X86_SPP} ({NAME})", field="cap", value=cap)


def switch_spp(machine: VirtualMachine, wanted: bool, field: str) -> None:
    """Enable SPP, or leave it as it is. ``field`` is where the request says so. Raises Conflict: it stays enabled."""
    if wanted:
        machine.enable_spp()
    elif machine.spp_active:
        raise Conflict("must be true: SPP cannot be switched off again", field=field, value=False)


def _shown(machine: VirtualMachine) -> dict[str, Any]:
    return {
        "capability": CAP_X86_SPP,
        "name": NAME,
        "available": check_vm_extension(machine, CAP_X86_SPP),
        "enabled": machine.spp_active,
        "result": {},
    }


@routes.get(
    "/{cap}",
    operation_id="getVmCapability",
    summary="Read a capability of a VM",
    responses=documented(
        tagged_reply(VmCapability, "The capability."),
        "not-found",
        "invalid-value",
    ),
)
async def get_vm_capability(request: Request, vm: VmId, cap: CapabilityName) -> Response:
    entry = find(request, vm)
    _known(cap)
    return tagged(request, _shown(entry.machine))


@routes.put(
    "/{cap}",
    operation_id="putVmCapability",
    summary="Enable a capability of a VM",
    description=(
        "KVM_ENABLE_CAP, or on `kvm-2019` KVM_INIT_SPP, which came before the capability. Idempotent, and for good. "
        "`/v1/vms/{vm}/spp` is the same switch."
    ),
    responses=documented(
        changed_reply(VmCapability, "The capability now."),
        *GUARDED_CHANGE,
        "conflict",
        "unsupported",
        "out-of-memory",
    ),
)
async def put_vm_capability(request: Request, vm: VmId, cap: CapabilityName, body: VmCapabilityRequest) -> Response:
    entry = find(request, vm)
    _known(cap)
    return await changed(request, entry, _shown, lambda machine: switch_spp(machine, body.enabled, "enabled"))
