"""What one vCPU offers its guest and which mode it is in: CPUID, Hyper-V leaves, SMM, VMX instructions."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.arch.hyperv_cpuid import CpuidEntry
from engine.machine import VirtualMachine
from service.api.common import (
    CHANGE,
    GUARDED_CHANGE,
    VmId,
    changed,
    changed_reply,
    changing,
    documented,
    find,
    json_response,
    router,
    tagged,
    tagged_reply,
)
from service.api.nested.nested_state import VcpuId
from service.http.wire_types import Document, Hex32, Hex64, examples
from service.problems import InvalidDocument

routes = router("vcpus", "/v1/vms/{vm}/vcpus/{n}", reads="read", writes="write")

_LEAF = {
    "function": "0x40000001",
    "index": "0x0",
    "flags": "0x0",
    "eax": "0x31237648",
    "ebx": "0x0",
    "ecx": "0x0",
    "edx": "0x0",
}


class CpuidEntryRequest(Document):
    """One leaf, struct kvm_cpuid_entry2."""

    function: Hex32 = Field(description="Leaf: EAX at CPUID.")
    index: Hex32 = Field(0, description="Sub-leaf: ECX at CPUID.")
    flags: Hex32 = Field(0, description="Bit 0: the index matters.")
    eax: Hex32 = Field(0, description="What CPUID leaves in EAX.")
    ebx: Hex32 = Field(0, description="What CPUID leaves in EBX.")
    ecx: Hex32 = Field(0, description="What CPUID leaves in ECX.")
    edx: Hex32 = Field(0, description="What CPUID leaves in EDX.")


class CpuidEntryReply(CpuidEntryRequest):
    """One leaf as it is."""


class CpuidRequest(Document):
    """All leaves that the guest is to have."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"entries": [{"function": 1, "ecx": "0x20"}, {"function": "0x40000001", "eax": "0x31237648"}]}
        )
    )

    entries: list[CpuidEntryRequest] = Field(max_length=256, description="The leaves; others read as 0.")


class Cpuid(Document):
    """CPUID of a vCPU."""

    model_config = ConfigDict(json_schema_extra=examples({"entries": [], "supported": [_LEAF]}))

    entries: list[CpuidEntryReply] = Field(description="What the guest has; empty before it is set, as in KVM.")
    supported: list[CpuidEntryReply] = Field(description="What KVM_GET_SUPPORTED_CPUID lists on this host.")


class HypervCpuid(Document):
    """Hyper-V leaves."""

    model_config = ConfigDict(json_schema_extra=examples({"entries": [_LEAF]}))

    entries: list[CpuidEntryReply] = Field(description="By leaf.")


class SmmState(Document):
    """System-management mode."""

    model_config = ConfigDict(json_schema_extra=examples({"smm": False}))

    smm: bool = Field(description="Whether the vCPU is in it.")


class VmxRequest(Document):
    """A VMX instruction that L1 executes."""

    model_config = ConfigDict(json_schema_extra=examples({"instruction": "vmptrld", "address": "0x2000"}))

    instruction: Literal["vmxon", "vmxoff", "vmclear", "vmptrld", "vmptrst", "vmlaunch", "vmresume"] = Field(
        description="Which one."
    )
    address: Hex64 | None = Field(None, description="Guest-physical operand of vmxon, vmclear and vmptrld.")


class VmxOutcome(Document):
    """How it ended; members that do not belong to the result are null."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "result": "vmfail-valid",
                "vm_instruction_error": 7,
                "check": "ctl:pin",
                "exit_reason": None,
                "exit_qualification": None,
                "value": None,
            }
        )
    )

    result: Literal[
        "succeed",
        "entered",
        "#UD",
        "#GP",
        "vmfail-invalid",
        "vmfail-valid",
        "entry-failure",
        "retry",
        "internal-error",
        "shutdown",
    ] = Field(
        description=(
            "`entered`: L2 runs. `entry-failure`: a VM exit. `retry`: the kernel leaves RIP, the guest executes the "
            "instruction again. `internal-error`, `shutdown`: the run ends."
        )
    )
    vm_instruction_error: int | None = Field(description="VM-instruction error, of VMfailValid.")
    check: str | None = Field(description="The VM-entry check, or the rule, that decided.")
    exit_reason: Hex64 | None = Field(description="Of a VM entry that ended at once.")
    exit_qualification: Hex64 | None = Field(description="The same.")
    value: Hex64 | None = Field(description="What VMPTRST stores.")


def leaf_json(entry: CpuidEntry) -> dict[str, str]:
    """One leaf as a document."""
    return {name: hex(value) for name, value in asdict(entry).items()}


def _cpuid(machine: VirtualMachine, n: int) -> dict[str, Any]:
    return {
        "entries": [leaf_json(entry) for entry in machine.nested.cpuid(n)],
        "supported": [leaf_json(entry) for entry in machine.nested.supported_cpuid()],
    }


def _smm(machine: VirtualMachine, n: int) -> dict[str, bool]:
    return {"smm": machine.nested.vcpu(n).smm}


@routes.get(
    "/cpuid",
    operation_id="getCpuid",
    summary="Read the CPUID of a vCPU",
    responses=documented(
        tagged_reply(Cpuid, "Its leaves."),
        "not-found",
        "invalid-value",
    ),
)
async def get_cpuid(request: Request, vm: VmId, n: VcpuId) -> Response:
    return tagged(request, _cpuid(find(request, vm).machine, n))


@routes.put(
    "/cpuid",
    operation_id="putCpuid",
    summary="Replace the CPUID of a vCPU",
    description=(
        "KVM_SET_CPUID2. VMX needs leaf 1 with ECX bit 5, the width of addresses is that of leaf 0x80000008 (36 bits "
        "without it), Hyper-V is leaf 0x40000001 with EAX 0x31237648: the example has both. What the kernel refuses "
        "changes nothing here."
    ),
    responses=documented(changed_reply(Cpuid, "The leaves now."), *GUARDED_CHANGE),
)
async def put_cpuid(request: Request, vm: VmId, n: VcpuId, body: CpuidRequest) -> Response:
    leaves = [CpuidEntry(**leaf.model_dump()) for leaf in body.entries]
    return await changed(
        request, find(request, vm), partial(_cpuid, n=n), lambda machine: machine.nested.set_cpuid(n, leaves)
    )


@routes.get(
    "/hyperv-cpuid",
    operation_id="getHypervCpuid",
    summary="Read the Hyper-V leaves that KVM supports on a vCPU",
    description="KVM_GET_SUPPORTED_HV_CPUID: what user space may put into the CPUID, not what is in it.",
    responses=documented(
        tagged_reply(HypervCpuid, "In the order of the kernel."),
        "not-found",
        "invalid-value",
    ),
)
async def get_hyperv_cpuid(request: Request, vm: VmId, n: VcpuId) -> Response:
    entries = find(request, vm).machine.nested.hyperv_cpuid(n)
    return tagged(request, {"entries": [leaf_json(entry) for entry in entries]})


@routes.get(
    "/smm",
    operation_id="getSmm",
    summary="Whether a vCPU is in system-management mode",
    responses=documented(
        tagged_reply(SmmState, "The mode."),
        "not-found",
        "invalid-value",
    ),
)
async def get_smm(request: Request, vm: VmId, n: VcpuId) -> Response:
    return tagged(request, _smm(find(request, vm).machine, n))


@routes.put(
    "/smm",
    operation_id="putSmm",
    summary="Put a vCPU into system-management mode, or take it out",
    description=(
        "smi.smm of KVM_SET_VCPU_EVENTS. In SMM a vCPU finds the memory slots of address space 1, once there are some. "
        "In `kvm-latest` a change leaves nested mode."
    ),
    responses=documented(changed_reply(SmmState, "The mode now."), *GUARDED_CHANGE),
)
async def put_smm(request: Request, vm: VmId, n: VcpuId, body: SmmState) -> Response:
    return await changed(
        request, find(request, vm), partial(_smm, n=n), lambda machine: machine.nested.set_smm(n, body.smm)
    )


@routes.post(
    "/vmx",
    operation_id="executeVmx",
    summary="Execute a VMX instruction of L1",
    description=(
        "VMLAUNCH and VMRESUME attach the enlightened VMCS that the VP assist page names, make the VM-entry checks and "
        "enter L2. It is a conflict while the vCPU runs L2."
    ),
    responses=documented(
        {200: {"model": VmxOutcome, "description": "Executed, whether or not it succeeded."}},
        *CHANGE,
        "conflict",
        "unsupported",
    ),
)
async def execute_vmx(request: Request, vm: VmId, n: VcpuId, body: VmxRequest) -> Response:
    wanted = body.instruction in ("vmxon", "vmclear", "vmptrld")
    if wanted != (body.address is not None):
        rule = "is required" if wanted else "is an operand of vmxon, vmclear and vmptrld only"
        raise InvalidDocument(rule, field="address", value=body.address)
    async with changing(request, find(request, vm), joins=True) as machine:
        outcome = machine.nested.execute(n, body.instruction, body.address or 0)
    told: dict[str, Any] = asdict(outcome)
    for name in ("exit_reason", "exit_qualification", "value"):
        told[name] = hex(told[name]) if told[name] is not None else None
    return json_response(told)
