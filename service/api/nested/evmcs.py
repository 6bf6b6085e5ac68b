"""The enlightened VMCS of one vCPU, and capabilities that KVM has per vCPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import Conflict, NotFound
from engine.ioctls import check_vm_extension
from engine.machine import VirtualMachine
from engine.machine.hyperv import CAP_ENFORCE_CPUID
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
from service.api.nested.nested_fields import EvmcsPage
from service.api.nested.nested_state import VcpuId
from service.http.wire_types import Document, Hex32, Hex64, examples

routes = router("nested state", "/v1/vms/{vm}/vcpus/{n}", reads="read", writes="write")

CAP_HYPERV_ENLIGHTENED_VMCS = 163
CAP_HYPERV_DIRECT_TLBFLUSH = 175

_CHANGE = (
    *GUARDED_CHANGE,
    "conflict",
    "unsupported",
)


class EnableRequest(Document):
    """What is to be enabled stays so: false is a conflict afterwards."""

    model_config = ConfigDict(json_schema_extra=examples({"enabled": True}))

    enabled: bool = Field(description="True; what is enabled stays so.")


class EvmcsVersions(Document):
    """Versions 1 to 1 are 0x0101; both are 0 where KVM has no VMX to offer."""

    lowest: int = Field(description="Oldest version.")
    highest: int = Field(description="Newest version.")
    word: Hex32 = Field(description="As KVM_ENABLE_CAP stores it: the lowest in the low byte.")


class Evmcs(Document):
    """The enlightened VMCS of a vCPU. Its bytes are in guest memory and nowhere else."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "enabled": True,
                "visible": True,
                "versions": {"lowest": 1, "highest": 1, "word": "0x101"},
                "wanted": "0x3000",
                "attached": "0x3000",
                "pending": False,
                "clean_fields": "0xffff",
                "lost_controls": {"pin": "0x40"},
                "fields": None,
            }
        )
    )

    enabled: bool = Field(description="Whether KVM_CAP_HYPERV_ENLIGHTENED_VMCS is on.")
    visible: bool = Field(description="It takes effect: enabled and, in `kvm-latest`, Hyper-V is in the guest's CPUID.")
    versions: EvmcsVersions = Field(description="What KVM_ENABLE_CAP answers.")
    wanted: Hex64 | None = Field(description="GPA that the VP assist page asks for; null if it asks for none.")
    attached: Hex64 | None = Field(description="GPA of the one in use.")
    pending: bool = Field(description="A restored one waits for the next run.")
    clean_fields: Hex32 | None = Field(description="hv_clean_fields of the one in use.")
    lost_controls: dict[str, Hex32] = Field(
        description=(
            "May-be-1 bits that it takes from the vCPU: for good in `kvm-2019`, from the guest's view and the VM-entry "
            "checks in `kvm-latest`."
        )
    )
    fields: EvmcsPage | None = Field(description="The one in use by field, where this kernel believes them to be.")


class VcpuCapability(Document):
    """A capability that KVM has per vCPU."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "capability": 163,
                "name": "hyperv-enlightened-vmcs",
                "available": 1,
                "enabled": True,
                "result": {"versions": "0x101"},
            }
        )
    )

    capability: int = Field(description="Its number.")
    name: str = Field(description="Its name.")
    available: int = Field(description="What KVM_CHECK_EXTENSION says.")
    enabled: bool = Field(description="Whether it is on.")
    result: dict[str, Hex64] = Field(description="What enabling it stores for the caller; empty while it is not.")


@dataclass(frozen=True)
class PerVcpu:
    """One row: what KVM_CHECK_EXTENSION says, whether it is on, what it stored, and how it is switched on."""

    number: int
    name: str
    available: Callable[[VirtualMachine], int]
    enabled: Callable[[VirtualMachine, int], bool]
    stored: Callable[[VirtualMachine, int], dict[str, str]]
    enable: Callable[[VirtualMachine, int], Any]
    disable: Callable[[VirtualMachine, int], Any] | None = None


CAPABILITIES: tuple[PerVcpu, ...] = (
    PerVcpu(
        CAP_HYPERV_ENLIGHTENED_VMCS,
        "hyperv-enlightened-vmcs",
        lambda machine: check_vm_extension(machine, CAP_HYPERV_ENLIGHTENED_VMCS),
        lambda machine, n: machine.nested.vcpu(n).evmcs_enabled,
        lambda machine, n: {"versions": hex(machine.nested.evmcs(n).versions)},
        lambda machine, n: machine.nested.enable_evmcs(n),
    ),
    PerVcpu(
        CAP_HYPERV_DIRECT_TLBFLUSH,
        "hyperv-direct-tlbflush",
        lambda machine: int(machine.hyperv.direct_flush_available()),
        lambda machine, n: machine.hyperv.direct_flush_enabled(n),
        lambda machine, n: machine.hyperv.direct_flush_fields(n),
        lambda machine, n: machine.hyperv.enable_direct_flush(n),
    ),
    PerVcpu(
        CAP_ENFORCE_CPUID,
        "hyperv-enforce-cpuid",
        lambda machine: int(machine.hyperv.enforcement_available()),
        lambda machine, n: machine.hyperv.enforces_cpuid(n),
        lambda machine, n: {},
        lambda machine, n: machine.hyperv.enforce_cpuid(n, True),
        lambda machine, n: machine.hyperv.enforce_cpuid(n, False),
    ),
)


def _names(row: PerVcpu) -> tuple[str, str, str]:
    """What a capability may be called: by name, by number, and as the kernel's headers have it."""
    return row.name, str(row.number), f"KVM_CAP_{row.name.replace('-', '_').upper()}"


_BY_NAME: Mapping[str, PerVcpu] = {name: row for row in CAPABILITIES for name in _names(row)}

CapabilityName = Annotated[
    str,
    Path(
        alias="cap",
        description="Number or name, as 163, `hyperv-enlightened-vmcs` or KVM_CAP_HYPERV_ENLIGHTENED_VMCS.",
        examples=["163"],
    ),
]


def _capability(cap: str) -> PerVcpu:
    row = _BY_NAME.get(cap)
    if row is None:
        known = ", ".join(f"{row.number} ({row.name})" for row in CAPABILITIES)
        raise NotFound(f"must be a capability of a vCPU: {known}", field="cap", value=cap)
    return row


def _shown(row: PerVcpu, machine: VirtualMachine, n: int) -> dict[str, Any]:
    enabled = row.enabled(machine, n)
    return {
        "capability": row.number,
        "name": row.name,
        "available": row.available(machine),
        "enabled": enabled,
        "result": row.stored(machine, n) if enabled else {},
    }


def _evmcs(machine: VirtualMachine, n: int) -> dict[str, Any]:
    state = machine.nested.evmcs(n)

    def word(value: int | None) -> str | None:
        return None if value is None else hex(value)

    return {
        "enabled": state.enabled,
        "visible": state.visible,
        "versions": {
            "lowest": state.versions & 0xFF,
            "highest": state.versions >> 8,
            "word": hex(state.versions),
        },
        "wanted": word(state.wanted),
        "attached": word(state.attached),
        "pending": state.pending,
        "clean_fields": word(state.clean_fields),
        "lost_controls": {name: hex(mask) for name, mask in state.lost.items()},
        "fields": state.fields,
    }


def _enable(row: PerVcpu, machine: VirtualMachine, n: int, wanted: bool) -> None:
    if wanted:
        row.enable(machine, n)
    elif row.enabled(machine, n):
        if row.disable is None:
            raise Conflict("must be true: it cannot be switched off again", field="enabled", value=False)
        row.disable(machine, n)


@routes.get(
    "/evmcs",
    operation_id="getEvmcs",
    summary="Read the enlightened VMCS of a vCPU",
    responses=documented(
        tagged_reply(Evmcs, "The state."),
        "not-found",
        "invalid-value",
    ),
)
async def get_evmcs(request: Request, vm: VmId, n: VcpuId) -> Response:
    return tagged(request, _evmcs(find(request, vm).machine, n))


@routes.put(
    "/evmcs",
    operation_id="putEvmcs",
    summary="Enable the enlightened VMCS on a vCPU",
    description=(
        "KVM_ENABLE_CAP(163). Idempotent, and for good. VMX and Hyper-V need not be in the CPUID. Where the kernel has "
        "no hook for it the problem's `errno` is ENOTTY, ENODEV or EINVAL, as the kernel's."
    ),
    responses=documented(changed_reply(Evmcs, "The state now."), *_CHANGE),
)
async def put_evmcs(request: Request, vm: VmId, n: VcpuId, body: EnableRequest) -> Response:
    row = _capability(str(CAP_HYPERV_ENLIGHTENED_VMCS))
    return await changed(
        request, find(request, vm), partial(_evmcs, n=n), lambda machine: _enable(row, machine, n, body.enabled)
    )


@routes.get(
    "/capabilities/{cap}",
    operation_id="getVcpuCapability",
    summary="Read a capability of a vCPU",
    responses=documented(
        tagged_reply(VcpuCapability, "The capability."),
        "not-found",
        "invalid-value",
    ),
)
async def get_vcpu_capability(request: Request, vm: VmId, n: VcpuId, cap: CapabilityName) -> Response:
    machine = find(request, vm).machine
    return tagged(request, _shown(_capability(cap), machine, n))


@routes.put(
    "/capabilities/{cap}",
    operation_id="putVcpuCapability",
    summary="Enable a capability of a vCPU",
    description=(
        "KVM_ENABLE_CAP on a vCPU. Idempotent, and for good but for `hyperv-enforce-cpuid`. Where KVM refuses the "
        "problem's `errno` is its own: ENOTTY, ENODEV, EINVAL or ENOMEM. A guest whose flushes Hyper-V serves must not "
        "see KVM in its CPUID: Hyper-V takes a KVM hypercall for its own; `result.hides_kvm` tells."
    ),
    responses=documented(changed_reply(VcpuCapability, "The capability now."), *_CHANGE),
)
async def put_vcpu_capability(
    request: Request, vm: VmId, n: VcpuId, cap: CapabilityName, body: EnableRequest
) -> Response:
    entry = find(request, vm)
    row = _capability(cap)
    return await changed(
        request, entry, partial(_shown, row, n=n), lambda machine: _enable(row, machine, n, body.enabled)
    )
