"""What Hyper-V keeps about the VPs of a VM: queued flushes, TLB locks, VP assist pages, nested partitions."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.arch.hyperv_pages import VP_ASSIST, read_assist
from engine.machine import VirtualMachine
from service.api.common import (
    BINARY,
    CHANGE,
    GUARDED_CHANGE,
    VmId,
    changed,
    changed_reply,
    changing,
    documented,
    encode,
    find,
    guard,
    json_response,
    octets_reply,
    router,
    tagged,
    tagged_reply,
)
from service.api.nested.nested_fields import parse_document
from service.api.nested.nested_state import VcpuId
from service.http import conditional
from service.http.negotiation import JSON, OCTETS, content_type, preferred
from service.http.wire_types import Document, Hex64, examples

routes = router("hyperv", "/v1/vms/{vm}", reads="read", writes="write")

_OFFERS = (JSON, OCTETS)
Written = Literal["correct", "before-fix", "first-fix"]
Owner = Literal["guest", "kvm"]


class TlbLock(Document):
    """A TLB lock: whoever flushes a VP that holds one waits at the instruction."""

    model_config = ConfigDict(json_schema_extra=examples({"locked": True}))

    locked: bool = Field(description="Whether the VP holds one.")


class VcpuActivity(Document):
    """Whether a vCPU executes its guest. One that is halted flushes before it runs again."""

    model_config = ConfigDict(json_schema_extra=examples({"activity": "halted"}))

    activity: Literal["running", "halted"] = Field(description="What it does.")


class FlushQueue(Document):
    """What a vCPU has still to flush. A queue has 16 places and is lost with the cache in a restart."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"own": ["0x7f0000001000"], "nested": [], "requested": True, "tlb_flush": 0, "hypercalls": 1}
        )
    )

    own: list[Hex64] = Field(description="Ranges as their calls had them; all ones is everything.")
    nested: list[Hex64] = Field(description="The same for the nested guest.")
    requested: bool = Field(description="It looks at the queue of its mode before it runs.")
    tlb_flush: int = Field(description="KVM's statistic: ranges and whole flushes done.")
    hypercalls: int = Field(description="KVM's statistic: hypercalls completed.")


class ServiceRequest(Document):
    """What a vCPU does before it runs."""

    model_config = ConfigDict(json_schema_extra=examples({"full": False}))

    full: bool = Field(False, description="An unrelated flush of the whole context comes first, and purges the queue.")


class VpAssistPage(Document):
    """Three fields of a VP assist page, and all of it by field."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "control": "0x1",
                "enlighten": "0x1",
                "evmcs": "0x9000",
                "fields": {"nested_features": "0x1", "enlighten_vmentry": 1, "current_nested_vmcs": "0x9000"},
            }
        )
    )

    control: Hex64 = Field(description="Nested enlightenments: bit 0 DirectHypercall.")
    enlighten: Hex64 = Field(description="EnlightenVmEntry.")
    evmcs: Hex64 = Field(description="CurrentNestedVmcs.")
    fields: dict[str, Any] = Field(description="The page in the right layout; byte ranges of zeros are left out.")


class VpAssistFields(Document):
    """Fields of a VP assist page, by the names that GET gives; the others become 0."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "maxProperties": 64,
            **examples({"nested_features": 1, "enlighten_vmentry": 1, "current_nested_vmcs": "0x9000"}),
        },
    )


class NestedVp(Document):
    """A nested VP as the lower hypervisor has recorded it, on the vCPU that ran it last."""

    vcpu: int = Field(description="KVM vCPU id.")
    vp_index: int = Field(description="Of that vCPU.")
    vm_id: Hex64 = Field(description="Id of its VM.")
    vp_id: Hex64 = Field(description="Its id in that VM.")
    partition_assist_page: Hex64 = Field(description="GPA of the page.")
    tlb_lock_count: int | None = Field(description="In that page; null where it cannot be read.")
    nested_flush: bool = Field(description="NestedFlushVirtualHypercall, as it is now.")
    direct_hypercall: bool = Field(description="DirectHypercall, as the lower hypervisor has copied it.")
    running: bool = Field(description="It runs now.")


class Partitions(Document):
    """Who is whose guest: nested VPs by the vCPU that ran them last; ids of 0 where none did."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "l0": "kvm",
                "vps": [
                    {
                        "vcpu": 0,
                        "vp_index": 0,
                        "vm_id": "0x1",
                        "vp_id": "0x1",
                        "partition_assist_page": "0xa000",
                        "tlb_lock_count": 0,
                        "nested_flush": True,
                        "direct_hypercall": True,
                        "running": True,
                    }
                ],
            }
        )
    )

    l0: Literal["kvm", "hyperv"] = Field(description="`hyperv`: the VM itself is nested, a guest of KVM on Hyper-V.")
    vps: list[NestedVp] = Field(description="By vCPU.")


def _queue(machine: VirtualMachine, n: int) -> dict[str, Any]:
    queue = machine.hyperv.flush_queue(n)
    return {
        "own": [hex(word) for word in queue.own],
        "nested": [hex(word) for word in queue.nested],
        "requested": queue.requested,
        "tlb_flush": queue.flushes,
        "hypercalls": queue.hypercalls,
    }


def _activity(machine: VirtualMachine, n: int) -> dict[str, Any]:
    return {"activity": machine.hyperv.activity(n)}


def _tlb_lock(machine: VirtualMachine, n: int) -> dict[str, Any]:
    return {"locked": machine.hyperv.tlb_locked(n)}


def assist_document(page: bytes, written: str) -> dict[str, Any]:
    seen = {name: hex(value) for name, value in read_assist(page, written).items()}
    return {**seen, "fields": VP_ASSIST.decode(page)}


def _assist_tag(page: bytes, media: str, written: str) -> str:
    return conditional.entity_tag(f"assist:{media}:{written}".encode(), page)


@routes.get(
    "/partitions",
    operation_id="getPartitions",
    summary="Read the nested partitions and their VPs",
    responses=documented(
        tagged_reply(Partitions, "By vCPU."),
        "not-found",
        "invalid-value",
    ),
)
async def get_partitions(request: Request, vm: VmId) -> Response:
    machine = find(request, vm).machine
    vps = [
        {
            "vcpu": vp.vcpu,
            "vp_index": vp.vp_index,
            "vm_id": hex(vp.vm_id),
            "vp_id": hex(vp.vp_id),
            "partition_assist_page": hex(vp.partition_assist_page),
            "tlb_lock_count": vp.tlb_lock_count,
            "nested_flush": vp.asks,
            "direct_hypercall": vp.direct,
            "running": vp.running,
        }
        for vp in machine.hyperv.partitions()
    ]
    return tagged(request, {"l0": "kvm" if machine.config.host.hyperv is None else "hyperv", "vps": vps})


@routes.get(
    "/vcpus/{n}/flush-queue",
    operation_id="getFlushQueue",
    summary="Read what a vCPU has still to flush",
    responses=documented(
        tagged_reply(FlushQueue, "Both queues."),
        "not-found",
        "invalid-value",
    ),
)
async def get_flush_queue(request: Request, vm: VmId, n: VcpuId) -> Response:
    return tagged(request, _queue(find(request, vm).machine, n))


@routes.post(
    "/vcpus/{n}/flush-queue:service",
    operation_id="serviceFlushQueue",
    summary="Let a vCPU flush what is queued",
    description="What it does before it enters its guest. Accesses and hypercalls of the vCPU do it by themselves.",
    responses=documented(
        {200: {"model": FlushQueue, "description": "Both queues as they are now."}},
        *CHANGE,
    ),
)
async def service_flush_queue(request: Request, vm: VmId, n: VcpuId, body: ServiceRequest) -> Response:
    async with changing(request, find(request, vm), joins=True) as machine:
        machine.hyperv.service(n, full=body.full)
    return json_response(_queue(machine, n))


@routes.get(
    "/vcpus/{n}/activity",
    operation_id="getActivity",
    summary="Whether a vCPU executes its guest",
    responses=documented(
        tagged_reply(VcpuActivity, "What it does."),
        "not-found",
        "invalid-value",
    ),
)
async def get_activity(request: Request, vm: VmId, n: VcpuId) -> Response:
    return tagged(request, _activity(find(request, vm).machine, n))


@routes.put(
    "/vcpus/{n}/activity",
    operation_id="putActivity",
    summary="Halt a vCPU, or let it run",
    description="A flush does not wake a halted vCPU: it is queued, and done before the vCPU runs.",
    responses=documented(changed_reply(VcpuActivity, "What it does now."), *GUARDED_CHANGE),
)
async def put_activity(request: Request, vm: VmId, n: VcpuId, body: VcpuActivity) -> Response:
    return await changed(
        request,
        find(request, vm),
        partial(_activity, n=n),
        lambda machine: machine.hyperv.set_activity(n, body.activity),
    )


@routes.get(
    "/vcpus/{n}/tlb-lock",
    operation_id="getTlbLock",
    summary="Whether the TLB of a vCPU is locked",
    responses=documented(
        tagged_reply(TlbLock, "The lock."),
        "not-found",
        "invalid-value",
    ),
)
async def get_tlb_lock(request: Request, vm: VmId, n: VcpuId) -> Response:
    return tagged(request, _tlb_lock(find(request, vm).machine, n))


@routes.put(
    "/vcpus/{n}/tlb-lock",
    operation_id="putTlbLock",
    summary="Lock the TLB of a vCPU, or release it",
    description="A call that was suspended by the lock is made again after its release.",
    responses=documented(changed_reply(TlbLock, "The lock now."), *GUARDED_CHANGE),
)
async def put_tlb_lock(request: Request, vm: VmId, n: VcpuId, body: TlbLock) -> Response:
    return await changed(
        request, find(request, vm), partial(_tlb_lock, n=n), lambda machine: machine.hyperv.set_tlb_lock(n, body.locked)
    )


@routes.get(
    "/vcpus/{n}/vp-assist-page",
    operation_id="getVpAssistPage",
    summary="Read a VP assist page",
    description=(
        "That of the guest, where its MSR 0x40000073 says; or that of KVM, where it runs on Hyper-V. `written` reads "
        "the three fields where the software of another time has them."
    ),
    responses=documented(
        octets_reply(VpAssistPage, "By field; as `application/octet-stream`, 624 bytes."),
        "not-found",
        "not-acceptable",
        "invalid-value",
    ),
)
async def get_vp_assist_page(
    request: Request,
    vm: VmId,
    n: VcpuId,
    of: Annotated[Owner, Query(description="Whose page.")] = "guest",
    written: Annotated[Written, Query(description="Layout in which the three fields are looked for.")] = "correct",
) -> Response:
    entry = find(request, vm)
    media = preferred(request, _OFFERS)
    page = entry.machine.hyperv.vp_assist_page(n, of_kvm=of == "kvm")
    told = {"ETag": _assist_tag(page, media, written), "Vary": "Accept"}
    if conditional.not_modified(request, told["ETag"]):
        return Response(status_code=304, headers=told)
    return Response(page if media == OCTETS else encode(assist_document(page, written)), media_type=media, headers=told)


@routes.put(
    "/vcpus/{n}/vp-assist-page",
    operation_id="putVpAssistPage",
    summary="Write the VP assist page of a guest",
    description=(
        "As its kernel would: into guest memory. JSON fields replace the whole page, bytes its beginning. The guest "
        "has said where it is: see the examples of `PUT …/cpuid` and `PUT …/msrs`."
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/VpAssistFields"}}, OCTETS: BINARY},
        }
    },
    responses=documented(changed_reply(VpAssistPage, "The page now."), *GUARDED_CHANGE),
)
async def put_vp_assist_page(request: Request, vm: VmId, n: VcpuId) -> Response:
    entry = find(request, vm)
    media = content_type(request, _OFFERS)
    content = await request.body()
    data = VP_ASSIST.encode(parse_document(content)) if media == JSON else content
    async with changing(request, entry, joins=True) as machine:
        page = machine.hyperv.vp_assist_page(n)
        guard(request, entry, lambda: [_assist_tag(page, known, "correct") for known in _OFFERS])
        machine.hyperv.set_vp_assist_page(n, data)
    page = machine.hyperv.vp_assist_page(n)
    return json_response(assist_document(page, "correct"), extra={"ETag": _assist_tag(page, JSON, "correct")})
