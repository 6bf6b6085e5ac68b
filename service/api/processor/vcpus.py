"""One vCPU's processor: its VMCS, VM entry, INVEPT and INVVPID, its translation cache."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import ConfigDict, Field, create_model
from starlette.requests import Request
from starlette.responses import Response

from engine.arch.vmcs_fields import FIELDS, VmcsField
from engine.machine import VirtualMachine
from service.api.common import (
    CHANGE,
    VmId,
    changed,
    changed_reply,
    changing,
    documented,
    encode,
    find,
    json_response,
    router,
    tagged,
    tagged_reply,
)
from service.http.negotiation import JSON
from service.http.wire_types import Document, Hex64, Word, examples
from service.runtime.offload import maybe_in_thread

routes = router("vcpus", "/v1/vms/{vm}/vcpus/{n}", reads="read", writes="write")

VcpuId = Annotated[int, Path(alias="n", ge=0, description="KVM vCPU id.", examples=[0])]
# Entries of a translation cache; more are rendered off the event loop.
_INLINE_ENTRIES = 200

Place = Literal["root", "outside", "non-root", "wrong-mode"]
_DescriptorHigh = Annotated[int, Word(48)]
_Vpid = Annotated[int, Word(16)]

_VMCS = {
    **dict.fromkeys(FIELDS, "0x0"),
    "eptp": "0x20000000205e",
    "sppt_pointer": "0x200000004000",
    "primary_controls": "0x80000000",
    "secondary_controls": "0x8000a2",
    "pml_index": "0x1ff",
    "vpid": "0x1",
    "cr0": "0x80050033",
    "cr4": "0x6f0",
    "efer": "0xd01",
}


class _VmcsBase(Document):
    """The fields that decide about memory accesses. VMCS fields, then guest registers."""

    model_config = ConfigDict(json_schema_extra=examples(_VMCS))


class _VmcsUpdateBase(Document):
    """Fields to be replaced; the others stay."""

    model_config = ConfigDict(json_schema_extra=examples({"eptp": "0x20000000205e", "pml_index": 511}))


def _required(field: VmcsField) -> Any:
    return Annotated[int, Word(field.bits), Field(description=field.about)]


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def _optional(field: VmcsField) -> Any:
    return (
        Annotated[int, Word(field.bits)],
        Field(0, description=field.about, json_schema_extra=_without_default),
    )


_vmcs_members: dict[str, Any] = {name: (_required(field), ...) for name, field in FIELDS.items()}
_update_members: dict[str, Any] = {name: _optional(field) for name, field in FIELDS.items()}
Vmcs = create_model("Vmcs", __base__=_VmcsBase, __doc__=_VmcsBase.__doc__, **_vmcs_members)
VmcsUpdate = create_model("VmcsUpdate", __base__=_VmcsUpdateBase, __doc__=_VmcsUpdateBase.__doc__, **_update_members)


class InveptRequest(Document):
    """INVEPT: its register operand, the half of its descriptor that counts, and where it is executed."""

    model_config = ConfigDict(json_schema_extra=examples({"type": 1, "eptp": "0x20000000205e"}))

    type: Hex64 = Field(description="1 single-context, 2 all-context; the processor refuses others.")
    eptp: Hex64 = Field(0, description="EPT pointer in the descriptor; only type 1 looks at it.")
    place: Place = Field(
        "root",
        description="VMX root operation, outside VMX, non-root operation, or a mode that lacks the instruction.",
    )
    cpl: int = Field(0, ge=0, le=3, description="Privilege level of whoever executes it.")


class InvvpidRequest(Document):
    """INVVPID: its register operand, its descriptor, and where it is executed."""

    model_config = ConfigDict(
        json_schema_extra=examples({"type": 0, "vpid": 1, "linear_address": "0xffff888000002000"})
    )

    type: Hex64 = Field(
        description=(
            "0 individual-address, 1 single-context, 2 all-context, 3 single-context retaining globals; the processor "
            "refuses others."
        )
    )
    vpid: _Vpid = Field(0, description="Descriptor bits 15:0.")
    reserved: _DescriptorHigh = Field(0, description="Descriptor bits 63:16, which the processor wants to be 0.")
    linear_address: Hex64 = Field(0, description="Descriptor bits 127:64; only type 0 looks at them.")
    place: Place = Field("root", description="As for INVEPT.")
    cpl: int = Field(0, ge=0, le=3, description="Privilege level of whoever executes it.")


class EntryOutcome(Document):
    """How VM entry ended."""

    model_config = ConfigDict(json_schema_extra=examples({"result": "VMfail", "vm_instruction_error": 7}))

    result: Literal["VMsucceed", "VMfail"] = Field(description="How the instruction ended.")
    vm_instruction_error: int | None = Field(description="7: invalid control fields. Null after VMsucceed.")


class InstructionOutcome(Document):
    """How an instruction ended; members that do not belong to the result are null."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"result": "VMfail", "vm_instruction_error": 28, "exception": None, "exit_reason": None}
        )
    )

    result: Literal["VMsucceed", "VMfail", "exception", "vm-exit"] = Field(description="How it ended.")
    vm_instruction_error: int | None = Field(description="28: invalid operand.")
    exception: Literal["#UD", "#GP(0)"] | None = Field(description="What it raised.")
    exit_reason: int | None = Field(description="50 INVEPT, 53 INVVPID: it was executed in non-root operation.")


_ENTRY = {
    "kind": "physical",
    "vpid": None,
    "pcid": None,
    "global": False,
    "ept_root": "0x200000002000",
    "nested": "0x0",
    "vm_id": None,
    "vp_id": None,
    "address_space": None,
    "address": "0x2a5c000",
    "gpa": "0x2a5c000",
    "page_bits": 12,
    "readable": True,
    "writable": False,
    "executable": True,
    "user_executable": False,
    "ept_level": 1,
    "leaf": "0x20000000000335b5",
    "spp_vector": "0x5555555551555555",
}


class TlbEntry(Document):
    """One cached translation."""

    model_config = ConfigDict(json_schema_extra=examples(_ENTRY))

    kind: Literal["physical", "combined", "linear"] = Field(
        description="From a GPA by EPT; from a linear address by guest paging and EPT; by guest paging alone."
    )
    vpid: Hex64 | None = Field(description="Null for a physical entry.")
    pcid: Hex64 | None = Field(description="Null for a physical entry.")
    is_global: bool = Field(alias="global", description="Good for every PCID.")
    ept_root: Hex64 | None = Field(description="Bits 51:12 of the EPT pointer; null for a linear entry.")
    nested: Hex64 = Field(description="The nested guest that it belongs to; 0 for none.")
    vm_id: Hex64 | None = Field(description="Its VM id, as its hypervisor told the lower one; null for none.")
    vp_id: Hex64 | None = Field(description="Its VP id.")
    address_space: Hex64 | None = Field(description="Page tables, CR3 without PCID; null for a physical entry.")
    address: Hex64 = Field(description="What is translated: a GPA for a physical entry, else a linear address.")
    gpa: Hex64 = Field(description="What guest paging makes of it.")
    page_bits: int = Field(description="Log2 of the size of the guest's page.")
    readable: bool = Field(description="Rights: the AND of all EPT entries used.")
    writable: bool = Field(description="False where sub-pages decide.")
    executable: bool = Field(description="In supervisor mode.")
    user_executable: bool = Field(description="In user mode.")
    ept_level: int = Field(description="Level of the EPT leaf; 0 without EPT.")
    leaf: Hex64 = Field(description="The EPT leaf as it was.")
    spp_vector: Hex64 | None = Field(description="The SPPL1E as it was; null if none was read.")


class Tlb(Document):
    """The translation cache of one vCPU, at most 4,096 entries, by kind and address."""

    model_config = ConfigDict(json_schema_extra=examples({"entries": [_ENTRY]}))

    entries: list[TlbEntry] = Field(description="Empty without `translation_cache: model`.")


# What every operation that changes something may end in.
_CHANGE = (
    *CHANGE,
    "unsupported",
)


_HEX_WORDS = (
    "vpid",
    "pcid",
    "ept_root",
    "nested",
    "vm_id",
    "vp_id",
    "address_space",
    "address",
    "gpa",
    "leaf",
    "spp_vector",
)


def tlb_entry(item: Any) -> dict[str, Any]:
    """One cached translation as a document."""
    entry = {"global" if name == "is_global" else name: value for name, value in asdict(item).items()}
    for name in _HEX_WORDS:
        entry[name] = hex(entry[name]) if entry[name] is not None else None
    return entry


def _vmcs(machine: VirtualMachine, n: int) -> dict[str, str]:
    return {name: hex(value) for name, value in machine.vcpus.vmcs(n).items()}


@routes.get(
    "/vmcs",
    operation_id="getVmcs",
    summary="Read the VMCS of a vCPU",
    responses=documented(
        tagged_reply(Vmcs, "Every field."),
        "not-found",
        "unsupported",
        "invalid-value",
    ),
)
async def get_vmcs(request: Request, vm: VmId, n: VcpuId) -> Response:
    return tagged(request, _vmcs(find(request, vm).machine, n))


@routes.put(
    "/vmcs",
    operation_id="putVmcs",
    summary="Replace fields of a VMCS",
    description=(
        "Fields that are not given stay. Any value that fits is stored, as VMWRITE does, but CR4.LA57 where the vCPU "
        "has a CPUID without it; VM entry is what checks it. Nothing is flushed."
    ),
    responses=documented(
        changed_reply(Vmcs, "Every field as it is now."),
        *_CHANGE,
        "precondition-failed",
        "precondition-required",
    ),
)
async def put_vmcs(request: Request, vm: VmId, n: VcpuId, body: VmcsUpdate) -> Response:
    entry = find(request, vm)
    fields: dict[str, int] = body.model_dump(exclude_unset=True)
    return await changed(request, entry, partial(_vmcs, n=n), lambda machine: machine.vcpus.set_vmcs(n, fields))


@routes.post(
    "/vm-entry",
    operation_id="enterVm",
    summary="Try VM entry",
    description=(
        "Checks the controls that decide about memory accesses; without VPIDs it flushes linear addresses. A guest "
        "enters its own guest with `vmx`."
    ),
    responses=documented(
        {200: {"model": EntryOutcome, "description": "Tried, whether or not it succeeded."}},
        "not-found",
        "vm-busy",
        "unsupported",
        "invalid-value",
        "limit-exceeded",
    ),
)
async def enter_vm(request: Request, vm: VmId, n: VcpuId) -> Response:
    async with changing(request, find(request, vm), joins=True) as machine:
        outcome = machine.vcpus.vm_entry(n)
    return json_response({"result": outcome.result, "vm_instruction_error": outcome.vm_instruction_error})


@routes.post(
    "/invept",
    operation_id="executeInvept",
    summary="Execute INVEPT",
    responses=documented(
        {200: {"model": InstructionOutcome, "description": "Executed, whether or not it succeeded."}}, *_CHANGE
    ),
)
async def execute_invept(request: Request, vm: VmId, n: VcpuId, body: InveptRequest) -> Response:
    async with changing(request, find(request, vm), joins=True) as machine:
        outcome = machine.vcpus.invept(n, body.type, body.eptp, place=body.place, cpl=body.cpl)
    return json_response(asdict(outcome))


@routes.post(
    "/invvpid",
    operation_id="executeInvvpid",
    summary="Execute INVVPID",
    responses=documented(
        {200: {"model": InstructionOutcome, "description": "Executed, whether or not it succeeded."}}, *_CHANGE
    ),
)
async def execute_invvpid(request: Request, vm: VmId, n: VcpuId, body: InvvpidRequest) -> Response:
    async with changing(request, find(request, vm), joins=True) as machine:
        outcome = machine.vcpus.invvpid(
            n, body.type, body.reserved << 16 | body.vpid, body.linear_address, place=body.place, cpl=body.cpl
        )
    return json_response(asdict(outcome))


@routes.get(
    "/tlb",
    operation_id="getTlb",
    summary="Read the translation cache of a vCPU",
    responses=documented({200: {"model": Tlb, "description": "Every entry."}}, "not-found", "invalid-value"),
)
async def get_tlb(request: Request, vm: VmId, n: VcpuId) -> Response:
    items = find(request, vm).machine.vcpus.tlb(n)
    small = len(items) <= _INLINE_ENTRIES
    content = await maybe_in_thread(small, lambda: encode({"entries": [tlb_entry(item) for item in items]}))
    return Response(content, media_type=JSON)
