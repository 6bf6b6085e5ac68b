"""One guest access, executed and told in full."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.arch.access import CIRCUMSTANCE_SHIFT, default_access
from engine.trace.option_names import ASK, OnViolation
from engine.trace.single import AccessRequest, AccessResult
from service.api.common import (
    CHANGE,
    VmId,
    asker_of,
    changing,
    documented,
    find,
    json_response,
    metrics_of,
    router,
)
from service.api.traces.exits import EXAMPLE_EXIT, ExitRecord, exit_rows
from service.http.idempotency import hooks_of
from service.http.wire_types import (
    CIRCUMSTANCES,
    Access,
    Circumstances,
    Document,
    Hex64,
    Kind,
    Linear,
    Source,
    examples,
)
from service.problems import InvalidDocument
from service.runtime import asking
from service.runtime.bodies import while_connected
from service.runtime.changes import refused
from service.runtime.entry import Entry
from service.runtime.offload import maybe_in_thread

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
        "errno": None,
    },
    "data": None,
    "gpa": "0x2a5c6a0",
    "exception": None,
    "error_code": None,
    "fault_address": None,
    "stale": False,
    "unenforced": False,
}
_FAULT = _REPLY | {
    "resolution": "exception",
    "exits": [],
    "run": None,
    "gpa": None,
    "exception": "#PF",
    "error_code": 2,
    "fault_address": "0x7f0000001000",
}


class SingleAccess(Document):
    """An access of the guest."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"gpa": "0x2a5c6a0", "size": 8, "access": "write", "data": "2f62696e2f736800"},
            {"gva": "0x7f0000001000", "access": "write"},
            {"gpa": "0x2a5c6a0", "kind": "paging-update"},
        )
    )

    gpa: Hex64 | None = Field(
        None, description="Guest-physical address of the first byte. Without it the guest's own tables translate `gva`."
    )
    gva: Hex64 | None = Field(
        None, description="Guest-linear address of the first byte. Beside a `gpa` it is only copied into exit records."
    )
    size: int = Field(8, ge=1, le=0xFFFF, description="Bytes accessed.")
    access: Access | None = Field(
        None, description="`read` (0), `write` (1) or `execute` (2); unless given, what the kind does, else `write`."
    )
    kind: Kind = Field(
        0,
        description=(
            "What the access is for. `paging-read` and `paging-update` are the processor's own accesses to guest "
            "paging structures: they need a `gpa`."
        ),
    )
    linear: Linear = Field(
        1,
        description=(
            "What is true of the linear address: `valid` (1), and of its page: `user` (2), `writable` (4), "
            "`execute-disable` (8); names with commas between them, or the sum. For an access by `gpa` only: otherwise "
            "the guest's tables say."
        ),
    )
    circumstances: Circumstances = Field(0, description=CIRCUMSTANCES)
    vcpu: int = Field(0, ge=0, le=0xFFFF, description="KVM vCPU id.")
    source: Source = Field(
        0,
        description=(
            "Whose access it is: the guest's (0), one that KVM emulates for it (1), or the host's own (2). `kvm-2019` "
            "emulates without asking sub-page permissions; the host never asks."
        ),
    )
    insn_len: int = Field(0, ge=0, le=15, description="Bytes of the instruction, 0 if not known; an exit reports it.")
    data: str | None = Field(
        None, pattern=r"^([0-9a-fA-F]{2})*$", description="Bytes to write, hexadecimal in memory order; `size` of them."
    )
    on_violation: OnViolation = Field(
        "skip", description="What becomes of a write that is refused; `ask`: what an attached introspection tool says."
    )


class SppRun(Document):
    """The `spp` member of struct kvm_run."""

    addr: Hex64 = Field(description="Guest-physical address.")
    insn_len: int | None = Field(
        description="Length of the instruction, 0 where it is not known; null in `kvm-2019`, which does not report it."
    )


class Run(Document):
    """What KVM_RUN hands to user space."""

    exit_reason: int = Field(description="`exit_reason` of struct kvm_run.")
    name: str = Field(description="Name of KVM's constant.")
    spp: SppRun | None = Field(description="Of KVM_EXIT_SPP.")
    hw_exit_reason: int | None = Field(description="Exit reason of the processor, where KVM tells it.")
    rip_advanced: bool = Field(description="Whether the guest is past the instruction when user space sees the exit.")
    errno: str | None = Field(description="Where KVM_RUN itself fails; the rest is then what it was before.")


class AccessOutcome(Document):
    """How an access ended."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY, _FAULT))

    allowed: bool = Field(description="The processor let it through, at once or after a grant.")
    landed: bool = Field(description="It took effect: allowed, or refused with `on_violation=allow`.")
    resolution: str = Field(
        description="`completed`, `violation`, `mmio`, `internal-error`, `exception` or `run-failed`."
    )
    exits: list[ExitRecord] = Field(description="Every exit on the way, those that KVM handles itself included.")
    run: Run | None = Field(description="Null when user space sees nothing of it.")
    data: str | None = Field(description="The bytes that a read found, hexadecimal in memory order.")
    gpa: Hex64 | None = Field(
        description=(
            "Guest-physical address of the first byte, or that which the last exit or #VE was about; null where the "
            "guest's own tables gave none."
        )
    )
    exception: str | None = Field(
        description=(
            "What the guest takes instead: `#PF` or `#GP` by its own tables, `#VE` for an EPT violation that the VMCS "
            "turns into one."
        )
    )
    error_code: int | None = Field(description="Of a `#PF` or `#GP`.")
    fault_address: Hex64 | None = Field(description="Linear address of the exception; of a `#PF`, what CR2 holds.")
    unenforced: bool = Field(
        description="The write went through though a bitmap refuses it: `kvm-2019` maps large pages over them."
    )
    stale: bool = Field(
        description="A cached translation decided against what the tables say; only with `translation_cache: model`."
    )


def _note(entry: Entry, outcome: AccessResult) -> None:
    """Tell the event log of an access that was refused."""
    position = refused(outcome.exits)
    if position is not None:
        entry.events.note("violation", exit_rows(outcome.exits[position : position + 1])[0])


@routes.post(
    "",
    operation_id="executeAccess",
    summary="Execute one access",
    description=(
        "By `gpa` the access goes to that guest-physical address. By `gva` alone it goes through the guest's own page "
        "tables in guest memory, in the paging mode that the vCPU's VMCS has; every guest entry is read, and its "
        "accessed and dirty flags are set, through EPT, and the walk may end in an exception instead."
    ),
    responses=documented(
        {200: {"model": AccessOutcome, "description": "Executed, whether or not it was allowed."}},
        *CHANGE,
    ),
)
async def execute_access(request: Request, vm: VmId, body: SingleAccess) -> Response:
    entry = find(request, vm)
    if body.gpa is None and body.gva is None:
        raise InvalidDocument("or gva is required", field="gpa")
    wanted = AccessRequest(
        gpa=body.gpa,
        size=body.size,
        access=default_access(body.kind) if body.access is None else body.access,
        vcpu=body.vcpu,
        gva=body.gva,
        data=bytes.fromhex(body.data) if body.data is not None else None,
        on_violation=body.on_violation,
        kind=body.kind,
        linear=body.linear,
        source=body.source,
        insn_len=body.insn_len,
        circumstances=body.circumstances << CIRCUMSTANCE_SHIFT,
    )
    if body.on_violation == ASK:
        asker = asker_of(request, entry, traced=False)
        outcome = await while_connected(request, asking.access(entry, wanted, asker, hooks_of(request), _note))
    else:
        # The guest's page tables may be in a file, and that on a disk.
        async with changing(request, entry, joins=not entry.machine.memory_slots.known.files) as machine:
            outcome = await maybe_in_thread(not machine.memory_slots.known.files, machine.access, wanted)
            _note(entry, outcome)
    metrics_of(request).accessed(outcome.exits)
    run = outcome.run
    shown = None
    if run is not None:
        shown = {
            "exit_reason": run.exit_reason,
            "name": run.name,
            "spp": {"addr": hex(run.spp_addr), "insn_len": run.insn_len} if run.spp_addr is not None else None,
            "hw_exit_reason": run.hw_exit_reason,
            "rip_advanced": run.rip_advanced,
            "errno": run.errno,
        }
    return json_response(
        {
            "allowed": outcome.allowed,
            "landed": outcome.lands,
            "resolution": outcome.resolution,
            "exits": exit_rows(outcome.exits),
            "run": shown,
            "data": outcome.data.hex() if outcome.data is not None else None,
            "gpa": hex(outcome.gpa) if outcome.gpa is not None else None,
            "exception": outcome.exception,
            "error_code": outcome.error_code,
            "fault_address": hex(outcome.fault_address) if outcome.fault_address is not None else None,
            "stale": outcome.stale,
            "unenforced": outcome.unenforced,
        }
    )
