"""Hypercalls of one vCPU: registers or fields in; the result, and what was flushed on which VP, out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.arch import hypercall as hv
from engine.hyperv.caller import Caller
from engine.hyperv.encode import CallFields, VpSet, code_of
from engine.machine.hypercalls import HypercallReport, HypercallRequest, VpEffect
from service.api.common import (
    BINARY,
    CHANGE,
    VmId,
    changing,
    documented,
    find,
    json_response,
    router,
    settings_of,
)
from service.api.nested.nested_state import VcpuId
from service.api.processor.vcpus import TlbEntry, tlb_entry
from service.http.json_bodies import parse
from service.http.negotiation import JSON, OCTETS, content_type
from service.http.wire_types import Document, Hex64, examples
from service.problems import InvalidDocument

routes = router("hyperv", "/v1/vms/{vm}/vcpus/{n}", reads="read", writes="write")

_XMM = r"^([0-9a-fA-F]{32})$"
_BYTES = r"^([0-9a-fA-F]{2})*$"
_MOST_INPUT = 0x1000
XmmBytes = Annotated[str, Field(pattern=_XMM)]

_SPACE = {"call": {"name": "HvCallFlushVirtualAddressSpace", "flags": 2, "processor_mask": 2}, "input_gpa": "0x5000"}
_RAW = {
    "registers": {"rcx": "0x2", "rdx": "0x5000"},
    "input": "000000000000000002000000000000000200000000000000",
}


class HypercallRegisters(Document):
    """Registers at VMCALL or VMMCALL; those that are not given are 0."""

    rax: Hex64 = Field(0, description="RAX.")
    rbx: Hex64 = Field(0, description="RBX.")
    rcx: Hex64 = Field(0, description="The input value in 64-bit mode.")
    rdx: Hex64 = Field(0, description="GPA of the block, or the first word of a fast call, in 64-bit mode.")
    rsi: Hex64 = Field(0, description="RSI.")
    rdi: Hex64 = Field(0, description="RDI.")
    r8: Hex64 = Field(0, description="The second word of a fast call in 64-bit mode.")
    xmm: list[XmmBytes] = Field(
        default_factory=list, max_length=6, description="XMM0 to XMM5: 16 bytes each in memory order."
    )

    def caller(self) -> Caller:
        numbers = [int.from_bytes(bytes.fromhex(text), "little") for text in self.xmm]
        words = self.model_dump(exclude={"xmm"})
        return Caller(**words, xmm=tuple(numbers + [0] * (hv.XMM_REGISTERS - len(numbers))))


class VpSetFields(Document):
    """HV_VP_SET. The banks go as they are given: whether they match is for the hypervisor to say."""

    format: Hex64 = Field(0, description="0 sparse, 1 all.")
    valid_banks: Hex64 = Field(0, description="Which banks there are: bit 0 for VP indices 0 to 63.")
    banks: list[Hex64] = Field(default_factory=list, max_length=512, description="The banks, 64 VP indices each.")


class CallDocument(Document):
    """A flush call by its fields."""

    code: Annotated[int, Field(ge=0, le=0xFFFF)] | None = Field(None, description="Call code; or give `name`.")
    name: str | None = Field(
        None, max_length=64, description="As the TLFS has it, HvCallFlushVirtualAddressSpaceEx for instance."
    )
    fast: bool = Field(False, description="Input in registers instead of a page.")
    nested: bool = Field(False, description="Bit 31 of the input value.")
    variable_header: int | None = Field(None, ge=0, le=0x3FF, description="In words; null: as many as there are banks.")
    rep_count: int | None = Field(None, ge=0, le=0xFFF, description="Null: as many as there are ranges.")
    rep_start: int = Field(0, ge=0, le=0xFFF, description="First repetition to do.")
    address_space: Hex64 = Field(0, description="Page tables whose translations go: CR3.")
    flags: Hex64 = Field(0, description="1 all processors, 2 all address spaces, 4 non-global only, 8 large ranges.")
    processor_mask: Hex64 = Field(0, description="VP indices 0 to 63, a bit each; calls without a set.")
    vp_set: VpSetFields = Field(default_factory=VpSetFields, description="VPs of the Ex calls.")
    ranges: list[Hex64] = Field(
        default_factory=list,
        max_length=512,
        description="Of the list calls: a page each, and in the low bits how many follow it.",
    )

    def fields(self) -> CallFields:
        if (self.code is None) == (self.name is None):
            raise InvalidDocument("either code or name says which call it is", field="call.code", value=self.code)
        given = self.vp_set
        return CallFields(
            code=code_of(self.name) if self.name is not None else self.code or 0,
            fast=self.fast,
            nested=self.nested,
            variable_header=self.variable_header,
            rep_count=self.rep_count,
            rep_start=self.rep_start,
            address_space=self.address_space,
            flags=self.flags,
            processor_mask=self.processor_mask,
            vp_set=VpSet(given.format, given.valid_banks, tuple(given.banks)),
            ranges=tuple(self.ranges),
        )


class Hypercall(Document):
    """A hypercall: by its `registers`, or by its fields in `call`."""

    model_config = ConfigDict(json_schema_extra=examples(_SPACE, _RAW))

    registers: HypercallRegisters | None = Field(None, description="The registers at the instruction; or give `call`.")
    call: CallDocument | None = Field(None, description="The call by its fields; or give `registers`.")
    input: str | None = Field(
        None,
        pattern=_BYTES,
        max_length=2 * _MOST_INPUT,
        description="Bytes that are stored at the block's GPA first; with `call`, instead of those it describes.",
    )
    input_gpa: Hex64 | None = Field(None, description="Where the block of a `call` that is not fast is put.")
    cpl: int | None = Field(None, ge=0, le=3, description="Null: as the vCPU is.")
    long_mode: bool | None = Field(None, description="64-bit code. Null: as the vCPU is.")
    protected: bool | None = Field(None, description="CR0.PE. Null: as the vCPU is.")

    def request(self) -> HypercallRequest:
        if (self.registers is None) == (self.call is None):
            raise InvalidDocument("either registers or call says what is called", field="registers", value=None)
        if self.registers is not None and self.input_gpa is not None:
            raise InvalidDocument(
                "must be left out: registers say where the block is", field="input_gpa", value=self.input_gpa
            )
        return HypercallRequest(
            registers=Caller() if self.registers is None else self.registers.caller(),
            input=None if self.input is None else bytes.fromhex(self.input),
            fields=None if self.call is None else self.call.fields(),
            input_gpa=self.input_gpa,
            cpl=self.cpl,
            long_mode=self.long_mode,
            protected=self.protected,
        )


class ControlFields(Document):
    """The input value, decoded."""

    value: Hex64 = Field(description="The whole of it.")
    code: Hex64 = Field(description="Call code: bits 15:0.")
    name: str | None = Field(description="Null for a call that flushes nothing.")
    fast: bool = Field(description="Bit 16: input in registers.")
    variable_header: int = Field(description="Bits 26:17: size of the variable header in words of 8 bytes.")
    nested: bool = Field(description="Bit 31: for the hypervisor below.")
    rep_count: int = Field(description="Bits 43:32: repetitions.")
    rep_start: int = Field(description="Bits 59:48: the first to do.")


class ResultFields(Document):
    """The result value, decoded."""

    value: Hex64 = Field(description="The whole of it.")
    status: Hex64 = Field(description="Bits 15:0.")
    status_name: str = Field(description="The status as the TLFS has it.")
    reps_completed: int = Field(description="Bits 43:32: repetitions done.")


class ExitFields(Document):
    """A VM exit. With SVM `qualification` is EXITINFO1 and `information` EXITINFO2."""

    reason: Hex64 = Field(description="Basic exit reason, or EXITCODE.")
    qualification: Hex64 = Field(description="Exit qualification, or EXITINFO1.")
    information: Hex64 = Field(description="Instruction information, or EXITINFO2.")
    instruction_length: int = Field(description="In bytes.")


class VpFlush(Document):
    """What a flush did to the translations of one VP."""

    vcpu: int = Field(description="KVM vCPU id.")
    vp_index: int = Field(description="Hyper-V VP index.")
    targeted: bool = Field(description="Whether the call was for it.")
    queued: bool = Field(description="It waits until the VP runs.")
    tlb_flush: int = Field(description="What KVM's statistic of that name grew by.")
    required: list[TlbEntry] = Field(description="What the specification says must go.")
    dropped: list[TlbEntry] = Field(description="What went.")
    over_flushed: list[TlbEntry] = Field(description="Dropped without being required.")
    left: list[TlbEntry] = Field(description="Required and still there: queued, or not seen by a KVM that reads less.")


class HypercallOutcome(Document):
    """A hypercall, executed; members that do not belong to the outcome are null or empty."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "outcome": "completed",
                "l0": "kvm",
                "level": 1,
                "served_by": 0,
                "row": None,
                "control": {
                    "value": "0x2",
                    "code": "0x2",
                    "name": "HvCallFlushVirtualAddressSpace",
                    "fast": False,
                    "variable_header": 0,
                    "nested": False,
                    "rep_count": 0,
                    "rep_start": 0,
                },
                "reason": None,
                "result": {"value": "0x0", "status": "0x0", "status_name": "SUCCESS", "reps_completed": 0},
                "registers": {"rax": "0x0"},
                "rip": "0x1003",
                "rip_advance": 3,
                "exception": None,
                "exit": None,
                "intercepted_gpa": None,
                "waits_for": [],
                "targeted": [1],
                "flushed": [1],
                "vps": [],
            }
        )
    )

    outcome: Literal["completed", "exception", "intercepted", "suspended", "reflected", "native"] = Field(
        description=(
            "`suspended`: a TLB lock holds the caller at the instruction; make the call again. `reflected`: L1 got an "
            "exit. `native`: KVM took the call for one of its own."
        )
    )
    l0: Literal["kvm", "hyperv"] = Field(description="The lowest hypervisor.")
    level: int = Field(description="Of the caller: 1, or 2 for the guest of a guest of `l0`.")
    served_by: int | None = Field(description="Level of the hypervisor that answered: 0, or 1 after an exit to it.")
    row: str | None = Field(description="Row of the decision table in docs/tlb-flush.md, for a caller in L2.")
    control: ControlFields = Field(description="The input value.")
    reason: str | None = Field(
        description="Why no Hyper-V answered, and what would make it: of `native` calls; not part of the contract."
    )
    result: ResultFields | None = Field(description="The result value; null where the call has none.")
    registers: dict[str, Hex64] = Field(description="Those that changed.")
    rip: Hex64 = Field(description="The caller's afterwards.")
    rip_advance: int = Field(description="Bytes by which RIP moves on.")
    exception: Literal["#UD"] | None = Field(description="What the instruction raises.")
    exit: ExitFields | None = Field(description="What L1 sees.")
    intercepted_gpa: Hex64 | None = Field(description="Page of the input that is no RAM.")
    waits_for: list[int] = Field(description="vCPUs that hold a TLB lock.")
    targeted: list[int] = Field(description="VP indices that the flush was sent to.")
    flushed: list[int] = Field(description="VP indices of those that have done it.")
    vps: list[VpFlush] = Field(description="What became of each VP.")


_NATIVE = (
    "KVM took the call for one of its own: the caller's CPUID lacks the Hyper-V interface (leaf 0x40000001 with EAX "
    "0x31237648, PUT …/cpuid), or the guest has not said who it is (MSR 0x40000000 is 0, PUT …/msrs)"
)


def _control(control: hv.Control) -> dict[str, Any]:
    call = hv.CALLS.get(control.code)
    return {
        "value": hex(control.value),
        "code": hex(control.code),
        "name": None if call is None else call.name,
        "fast": control.fast,
        "variable_header": control.variable,
        "nested": control.nested,
        "rep_count": control.reps,
        "rep_start": control.start,
    }


def _result(value: int | None) -> dict[str, Any] | None:
    if value is None:
        return None
    status = hv.status_of(value)
    return {
        "value": hex(value),
        "status": hex(status),
        "status_name": status.name,
        "reps_completed": hv.reps_of(value),
    }


def _vp(effect: VpEffect) -> dict[str, Any]:
    lists = ("required", "dropped", "over_flushed", "left")
    return {
        "vcpu": effect.vcpu,
        "vp_index": effect.vp_index,
        "targeted": effect.targeted,
        "queued": effect.queued,
        "tlb_flush": effect.tlb_flush,
        **{name: [tlb_entry(item) for item in getattr(effect, name)] for name in lists},
    }


def report_document(report: HypercallReport) -> dict[str, Any]:
    """A hypercall as a document."""
    done = report.outcome
    seen = done.exit
    return {
        "outcome": done.outcome,
        "l0": done.l0,
        "level": done.level,
        "served_by": done.served_by,
        "row": done.row,
        "control": _control(done.control),
        "reason": _NATIVE if done.outcome == "native" else None,
        "result": _result(done.result),
        "registers": {name: hex(value) for name, value in done.registers.items()},
        "rip": hex(report.rip_after),
        "rip_advance": done.rip_advance,
        "exception": "#UD" if done.outcome == "exception" else None,
        "exit": None
        if seen is None
        else {
            "reason": hex(seen.reason),
            "qualification": hex(seen.qualification),
            "information": hex(seen.information),
            "instruction_length": seen.instruction_length,
        },
        "intercepted_gpa": None if done.intercepted_gpa is None else hex(done.intercepted_gpa),
        "waits_for": list(done.waits_for),
        "targeted": list(done.targeted),
        "flushed": list(done.flushed),
        "vps": [_vp(effect) for effect in report.vps],
    }


def _event(vcpu: int, report: HypercallReport) -> dict[str, Any]:
    """What the event log says of a hypercall."""
    told = report_document(report)
    names = ("outcome", "l0", "level", "served_by", "row", "control", "result", "targeted", "flushed")
    return {"vcpu": vcpu, **{name: told[name] for name in names}}


def _register_query(about: str) -> Any:
    return Query(description=f"{about} With a body of bytes only.", examples=["0x2"])


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": {"$ref": "#/components/schemas/Hypercall"}},
            OCTETS: BINARY,
        },
    }
}


@routes.post(
    "/hypercalls",
    operation_id="executeHypercall",
    summary="Execute a hypercall",
    description=(
        "VMCALL or VMMCALL on a vCPU, by its registers or by its fields. As `application/octet-stream` the body is the "
        "input block, stored at the GPA in `rdx` first, and `rcx` is the input value of a 64-bit caller. A call that "
        "the hypervisor refuses is answered with its status, not with a problem. Hyper-V answers a guest whose CPUID "
        "has its interface and that has said who it is: see the examples of `PUT …/cpuid` and `PUT …/msrs`."
    ),
    openapi_extra=_BODY,
    responses=documented(
        {200: {"model": HypercallOutcome, "description": "Executed, whatever came of it."}},
        *CHANGE,
    ),
)
async def execute_hypercall(
    request: Request,
    vm: VmId,
    n: VcpuId,
    rcx: Annotated[Hex64 | None, _register_query("The input value.")] = None,
    rdx: Annotated[Hex64 | None, _register_query("GPA of the input block.")] = None,
) -> Response:
    entry = find(request, vm)
    content = await request.body()
    if content_type(request, (JSON, OCTETS)) == OCTETS:
        wanted = _of_bytes(content, rcx, rdx)
    else:
        for name, value in (("rcx", rcx), ("rdx", rdx)):
            if value is not None:
                raise InvalidDocument("must be a member of registers when the body is JSON", field=name, value=value)
        wanted = (await parse(Hypercall, content, settings_of(request))).request()
    async with changing(request, entry, joins=True) as machine:
        report = machine.hyperv.hypercall(n, wanted)
        entry.events.note("flush", _event(n, report))
    return json_response(report_document(report))


def _of_bytes(content: bytes, rcx: int | None, rdx: int | None) -> HypercallRequest:
    if len(content) > _MOST_INPUT:
        raise InvalidDocument(f"a block has at most {_MOST_INPUT} bytes", field="body", value=len(content))
    if rcx is None or rdx is None:
        raise InvalidDocument("rcx and rdx say what is called and where its block is", field="rcx", value=rcx)
    return HypercallRequest(registers=Caller(rcx=rcx, rdx=rdx), input=content, long_mode=True)
