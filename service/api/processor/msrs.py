"""MSRs of one vCPU, and the capability MSRs of the processor under it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.api.common import (
    GUARDED_CHANGE,
    VmId,
    changing,
    documented,
    find,
    guard,
    held_tag,
    json_response,
    router,
)
from service.api.nested.nested_state import VcpuId
from service.http.wire_types import Document, Hex32, Hex64, examples

routes = router("vcpus", "/v1/vms/{vm}/vcpus/{n}/msrs", reads="read", writes="write")

_MSR = {"index": "0x48c", "name": "IA32_VMX_EPT_VPID_CAP", "value": "0xf01063341c1"}
_VCPU_MSR = {"index": "0x48d", "name": "IA32_VMX_TRUE_PINBASED_CTLS", "host": "0x7f00000016", "guest": "0x3f00000016"}


class Msr(Document):
    """A capability MSR."""

    model_config = ConfigDict(json_schema_extra=examples(_MSR))

    index: Hex64 = Field(description="Number of the MSR.")
    name: str = Field(description="Its name, without IA32_VMX.")
    value: Hex64 = Field(description="What RDMSR reads.")


class VcpuMsr(Document):
    """An MSR of the vCPU."""

    model_config = ConfigDict(json_schema_extra=examples(_VCPU_MSR))

    index: Hex64 = Field(description="Number of the MSR.")
    name: str | None = Field(description="Its name; null for one that has none here.")
    host: Hex64 | None = Field(description="What KVM_GET_MSRS reads; null where it fails.")
    guest: Hex64 | None = Field(description="What RDMSR reads in the guest; null where it ends in #GP.")


class MsrSets(Document):
    """Two sets of MSRs: what the processor can do, and what the vCPU shows to its guest."""

    model_config = ConfigDict(json_schema_extra=examples({"msrs": [_MSR], "vcpu": [_VCPU_MSR]}))

    msrs: list[Msr] = Field(
        description=(
            "The processor's own capability MSRs that decide about memory accesses. An AMD host has none: "
            "`index` must be given there."
        )
    )
    vcpu: list[VcpuMsr] = Field(description="The vCPU's: those that have a name, and those that were written.")


class MsrWrite(Document):
    """One write."""

    index: Hex32 = Field(description="Number of the MSR.")
    value: Hex64 = Field(description="What WRMSR writes.")


# The guest says who it is (HV_X64_MSR_GUEST_OS_ID), and where its VP assist page is.
_HYPERV = (
    {"index": "0x40000000", "value": "0x8100000000000000"},
    {"index": "0x40000073", "value": "0x6001"},
)


class MsrsRequest(Document):
    """MSRs to be written, in order."""

    model_config = ConfigDict(json_schema_extra=examples({"msrs": [{"index": "0x3a", "value": "0x5"}, *_HYPERV]}))

    msrs: list[MsrWrite] = Field(min_length=1, max_length=256, description="The writes, in order.")
    by: Literal["host", "guest"] = Field("host", description="KVM_SET_MSRS, or WRMSR in the guest.")


class MsrsWritten(Document):
    """How far it came."""

    model_config = ConfigDict(
        json_schema_extra=examples({"written": 1, "refused": {"index": "0x480", "value": "0x0"}, "result": "#GP"})
    )

    written: int = Field(description="Writes that were done. Those before a refused one stay.")
    refused: MsrWrite | None = Field(description="The first that the kernel refuses; those behind it were not tried.")
    result: Literal["ok", "#GP", "refused"] = Field(description="`#GP` for a guest, `refused` for the host.")


@routes.get(
    "",
    operation_id="getMsrs",
    summary="Read MSRs",
    description="`host.vmx_capabilities` sets what the processor has, and by MSR name what KVM shows to a guest.",
    responses=documented(
        {200: {"model": MsrSets, "description": "By index."}}, "not-found", "unsupported", "invalid-value"
    ),
)
async def get_msrs(
    request: Request,
    vm: VmId,
    n: VcpuId,
    index: Annotated[Hex32 | None, Query(description="Only this MSR of the vCPU.", examples=["0x3a"])] = None,
) -> Response:
    machine = find(request, vm).machine
    processor = machine.vcpus.msrs(n) if index is None or machine.config.host.vendor == "intel" else ()
    return json_response(
        {
            "msrs": [{"index": hex(msr.index), "name": msr.name, "value": hex(msr.value)} for msr in processor],
            "vcpu": [
                {"index": hex(msr.index), "name": msr.name, "host": _hex(msr.host), "guest": _hex(msr.guest)}
                for msr in machine.nested.msrs(n, () if index is None else (index,))
            ],
        }
    )


@routes.put(
    "",
    operation_id="putMsrs",
    summary="Write MSRs of a vCPU",
    description=(
        "In order, up to the first that is refused, as KVM_SET_MSRS does it. GUEST_OS_ID and HYPERCALL belong to all "
        "vCPUs. Writing 0 to IA32_FEATURE_CONTROL as the host leaves nested mode. If-Match is compared with the tag of "
        "the VM. The example wants what `PUT …/cpuid` shows: VMX and the Hyper-V interface."
    ),
    responses=documented(
        {200: {"model": MsrsWritten, "description": "Written, or refused by the kernel."}},
        *GUARDED_CHANGE,
    ),
)
async def put_msrs(request: Request, vm: VmId, n: VcpuId, body: MsrsRequest) -> Response:
    writes = [(item.index, item.value) for item in body.msrs]
    guest = body.by == "guest"
    entry = find(request, vm)
    async with changing(request, entry, joins=True) as machine:
        guard(request, entry, lambda: [held_tag(entry)])
        done = machine.nested.write_msrs(n, writes, guest=guest)
    refused: Any = None
    if done.refused is not None:
        refused = {"index": hex(done.refused[0]), "value": hex(done.refused[1])}
    result = "ok" if refused is None else "#GP" if guest else "refused"
    return json_response({"written": done.written, "refused": refused, "result": result})


def _hex(value: int | None) -> str | None:
    return None if value is None else hex(value)
