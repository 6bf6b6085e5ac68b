"""Pages of a KVM that runs on Hyper-V: by what it runs a vCPU, and what loading and leaving a CPU does to them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.machine import VirtualMachine
from service.api.common import CHANGE, VmId, changing, documented, encode, find, json_response, octets_reply, router
from service.api.hyperv.hyperv import VpAssistPage, assist_document
from service.api.nested.nested_state import VcpuId
from service.http import conditional
from service.http.negotiation import JSON, OCTETS, preferred
from service.http.wire_types import Document, Hex64, examples

routes = router("hyperv", "/v1/vms/{vm}/vcpus/{n}", reads="read", writes="write")

_FIELDS = {
    "hv_enlightenments_control": "0x1",
    "hv_vp_id": "0x7",
    "hv_vm_id": "0xffff888000000000",
    "partition_assist_page": "0x100a000",
    "hv_clean_fields": "0xffff",
}


class KvmVmcs(Document):
    """The enlightened VMCS, or on AMD the VMCB, by which KVM, a guest of Hyper-V, runs the vCPU."""

    model_config = ConfigDict(json_schema_extra=examples({"kind": "evmcs", "address": "0x1009000", "fields": _FIELDS}))

    kind: Literal["evmcs", "vmcb"] = Field(description="Which structure it is.")
    address: Hex64 = Field(description="In the host's memory; CurrentNestedVmcs of the CPU that it is loaded on.")
    fields: dict[str, Hex64] = Field(description="What Hyper-V looks at to serve flushes.")


class LoadRequest(Document):
    """Which vCPU comes to the CPU."""

    model_config = ConfigDict(json_schema_extra=examples({"vcpu": None}))

    vcpu: int | None = Field(None, ge=0, description="Null: the one whose CPU it is.")


@routes.get(
    "/kvm-vmcs",
    operation_id="getKvmVmcs",
    summary="Read the enlightened VMCS or VMCB that KVM uses on Hyper-V",
    description="With `host.hyperv` only. The guest has nothing to do with it: its own are in its memory.",
    responses=documented(
        octets_reply(KvmVmcs, "By field; as `application/octet-stream`, 1024 bytes, of a VMCB 4096."),
        "not-found",
        "not-acceptable",
        "invalid-value",
    ),
)
async def get_kvm_vmcs(request: Request, vm: VmId, n: VcpuId) -> Response:
    entry = find(request, vm)
    media = preferred(request, (JSON, OCTETS))
    used = entry.machine.hyperv.vmcs_of_kvm(n)
    told = {"ETag": conditional.entity_tag(f"kvm-vmcs:{media}".encode(), used.page), "Vary": "Accept"}
    if conditional.not_modified(request, told["ETag"]):
        return Response(status_code=304, headers=told)
    fields = {name: hex(value) for name, value in used.fields.items()}
    document = {"kind": used.kind, "address": hex(used.address), "fields": fields}
    return Response(used.page if media == OCTETS else encode(document), media_type=media, headers=told)


def _assist(machine: VirtualMachine, n: int) -> dict[str, Any]:
    return assist_document(machine.hyperv.vp_assist_page(n, of_kvm=True), "correct")


@routes.post(
    "/vp-assist-page:load",
    operation_id="loadOnCpu",
    summary="Load a vCPU on the CPU of this one, as KVM on Hyper-V does",
    description=(
        "The VP assist page of the CPU then names the enlightened VMCS of that vCPU, and DirectHypercall is set if it "
        "asks for direct flushes; it is not taken back if it does not. The next run of vCPU `n` loads it again. The "
        'machine is one with `"host": {"hyperv": {}}`.'
    ),
    responses=documented({200: {"model": VpAssistPage, "description": "KVM's page on that CPU now."}}, *CHANGE),
)
async def load_on_cpu(request: Request, vm: VmId, n: VcpuId, body: LoadRequest) -> Response:
    async with changing(request, find(request, vm), joins=True) as machine:
        machine.hyperv.load_on_cpu(n, n if body.vcpu is None else body.vcpu)
    return json_response(_assist(machine, n))


@routes.post(
    "/vp-assist-page:unload",
    operation_id="leaveCpu",
    summary="Let KVM leave the CPU of a vCPU, as when its module is removed",
    description=(
        "It takes DirectHypercall, EnlightenVmEntry and CurrentNestedVmcs back: on every CPU when the module goes, on "
        "one when virtualization is switched off there. With VMX the next run of the vCPU sets them again."
    ),
    responses=documented({200: {"model": VpAssistPage, "description": "KVM's page on that CPU now."}}, *CHANGE),
)
async def leave_cpu(request: Request, vm: VmId, n: VcpuId) -> Response:
    async with changing(request, find(request, vm), joins=True) as machine:
        machine.hyperv.leave_cpu(n)
    return json_response(_assist(machine, n))
