"""One guest access, executed and told in full."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.trace.single import AccessRequest
from service.api.common import VmId, documented, find, json_response, metrics_of, router
from service.api.exits import EXAMPLE_EXIT, ExitRecord, exit_rows
from service.http.words import Access, Document, Hex64, examples
from service.problems import InvalidDocument

routes = router("accesses", "/v1/vms/{vm}/accesses", reads="read", writes="write")

_REPLY = {
    "allowed": False,
    "landed": False,
    "resolution": "violation",
    "exits": [EXAMPLE_EXIT],
    "run": {
        "exit_reason": 28,
        "name": "KVM_EXIT_SPP",
        "spp": {"addr": "0x2a5c6a0", "insn_len": None},
        "hw_exit_reason": None,
        "rip_advanced": True,
    },
    "data": None,
}


class SingleAccess(Document):
    """An access of the guest."""

    model_config = ConfigDict(
        json_schema_extra=examples({"gpa": "0x2a5c6a0", "size": 8, "access": "write", "data": "2f62696e2f736800"})
    )

    gpa: Hex64 | None = Field(None, description="Guest-physical address of the first byte; required for now.")
    gva: Hex64 | None = Field(None, description="Guest-linear address, copied into exit records.")
    size: int = Field(8, ge=1, le=0xFFFF, description="Bytes accessed.")
    access: Access = Field(1, description="`read` (0), `write` (1) or `execute` (2).")
    vcpu: int = Field(0, ge=0, le=0xFFFF, description="KVM vCPU id.")
    data: str | None = Field(
        None, pattern=r"^([0-9a-fA-F]{2})*$", description="Bytes to write, hexadecimal in memory order; `size` of them."
    )
    on_violation: Literal["skip", "stop", "allow", "grant", "ask"] = Field(
        "skip", description="What becomes of a write that is refused; `ask` is reserved."
    )


class SppRun(Document):
    """The `spp` member of struct kvm_run."""

    addr: Hex64
    insn_len: int | None = Field(description="Null: not known for an access without an instruction.")


class Run(Document):
    """What KVM_RUN hands to user space."""

    exit_reason: int
    name: str
    spp: SppRun | None
    hw_exit_reason: int | None
    rip_advanced: bool = Field(description="Whether the guest is past the instruction when user space sees the exit.")


class AccessOutcome(Document):
    """How an access ended."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    allowed: bool = Field(description="The processor let it through, at once or after a grant.")
    landed: bool = Field(description="It took effect: allowed, or refused with `on_violation=allow`.")
    resolution: str = Field(description="`completed`, `violation`, `mmio` or `internal-error`.")
    exits: list[ExitRecord] = Field(description="Every exit on the way, those that KVM handles itself included.")
    run: Run | None = Field(description="Null when user space sees nothing of it.")
    data: str | None = Field(description="The bytes that a read found, hexadecimal in memory order.")


@routes.post(
    "",
    operation_id="executeAccess",
    summary="Execute one access",
    responses=documented(
        {200: {"model": AccessOutcome, "description": "Executed, whether or not it was allowed."}},
        "malformed-body",
        "not-found",
        "vm-busy",
        "body-too-large",
        "unsupported-media-type",
        "invalid-value",
        "not-yet-supported",
        "limit-exceeded",
    ),
)
async def execute_access(request: Request, vm: VmId, body: SingleAccess) -> Response:
    entry = find(request, vm)
    if body.on_violation == "ask":
        raise InvalidDocument("is not yet supported", field="on_violation", value="ask", code="not-yet-supported")
    if body.gpa is None:
        if body.gva is None:
            raise InvalidDocument("is required", field="gpa")
        rule = "is not yet supported without gpa: the guest's page tables are not walked"
        raise InvalidDocument(rule, field="gva", value=body.gva, code="not-yet-supported")
    wanted = AccessRequest(
        gpa=body.gpa,
        size=body.size,
        access=body.access,
        vcpu=body.vcpu,
        gva=body.gva,
        data=bytes.fromhex(body.data) if body.data is not None else None,
        on_violation=body.on_violation,
    )
    async with entry.mutation() as machine:
        outcome = machine.access(wanted)
    metrics_of(request).accessed(outcome.exits)
    run = outcome.run
    shown = None
    if run is not None:
        shown = {
            "exit_reason": run.exit_reason,
            "name": run.name,
            "spp": {"addr": hex(run.spp_addr), "insn_len": None} if run.spp_addr is not None else None,
            "hw_exit_reason": run.hw_exit_reason,
            "rip_advanced": run.rip_advanced,
        }
    return json_response(
        {
            "allowed": outcome.allowed,
            "landed": outcome.lands,
            "resolution": outcome.resolution,
            "exits": exit_rows(outcome.exits),
            "run": shown,
            "data": outcome.data.hex() if outcome.data is not None else None,
        }
    )
