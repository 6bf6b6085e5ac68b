"""Explain an access: every table entry the processor would read, and the reason for the outcome."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.arch.access import CIRCUMSTANCE_SHIFT
from engine.machine.tables import TableEntry
from engine.machine.walks import Ending
from service.api.common import VmId, documented, find, json_response, router
from service.api.traces.exits import EXAMPLE_EXIT, ExitRecord, exit_rows
from service.http.wire_types import CIRCUMSTANCES, Access, Circumstances, Document, Hex32, Hex64, Kind, Linear, examples
from service.problems import InvalidDocument
from service.runtime.offload import maybe_in_thread

routes = router("accesses", "/v1/vms/{vm}/walk", reads="read")

EXAMPLE_SPPT_LEAF = {
    "structure": "SPPL1E",
    "level": 1,
    "table": "0x200000004000",
    "index": 92,
    "raw": "0x5555555551555555",
    "absent": False,
    "fields": {"writable_subpages": "0xffffdfff", "reserved": "0x0"},
}
EXAMPLE_EPT_LEAF = {
    "structure": "PTE",
    "level": 1,
    "table": "0x200000008000",
    "index": 92,
    "raw": "0x2000000002a5c335",
    "absent": False,
    "fields": {
        "read": "0x1",
        "write": "0x0",
        "execute": "0x1",
        "memory_type": "0x6",
        "ignore_pat": "0x0",
        "page": "0x0",
        "accessed": "0x1",
        "dirty": "0x1",
        "user_execute": "0x0",
        "verify_paging": "0x0",
        "paging_write": "0x0",
        "supervisor_shadow_stack": "0x0",
        "spp": "0x1",
        "suppress_ve": "0x0",
        "address": "0x2a5c000",
        "reserved": "0x0",
    },
}
_DENIED: dict[str, Any] = {
    "gpa": "0x2a5c6a0",
    "size": 8,
    "access": 1,
    "kind": 0,
    "outcome": "ept_violation",
    "sentence": "denied: sub-page 13 of SPPL1E at 0x2000000042e0 is 0",
    "reason": 48,
    "qualification": "0x1aa",
    "exit_gpa": "0x2a5c6a0",
    "subpages": "0x2000",
    "denied": "0x2000",
    "ept": [EXAMPLE_EPT_LEAF],
    "sppt": [EXAMPLE_SPPT_LEAF],
}
_UNTOUCHED = _DENIED | {
    "sentence": (
        "not mapped: PML4E at 0x200000002000 is not present (exit 48, EPT violation); KVM maps the page and arms it "
        "for its sub-pages, and the guest tries again"
    ),
    "qualification": "0x182",
    "denied": "0x0",
    "ept": [
        {
            "structure": "PML4E",
            "level": 4,
            "table": "0x200000002000",
            "index": 0,
            "raw": "0x0",
            "absent": False,
            "fields": {"read": "0x0", "write": "0x0", "execute": "0x0", "address": "0x0", "reserved": "0x0"},
        }
    ],
    "sppt": [],
}
_THEN = {
    "resolution": "violation",
    "sentence": _DENIED["sentence"],
    "denied": "0x2000",
    "exits": [
        EXAMPLE_EXIT
        | {"index": 0, "qualification": "0x182", "gva": None, "denied": "0x0", "resolution": "armed", "insn_len": 0},
        EXAMPLE_EXIT | {"index": 0, "gva": None, "insn_len": 0},
    ],
    "ept": _DENIED["ept"],
    "sppt": _DENIED["sppt"],
}
_REPLY = _UNTOUCHED | {"gva": None, "guest": [], "then": _THEN}

# Explaining copies the frames of the machine; that of more bytes than this is done in a thread.
_INLINE_BYTES = 4 << 20
# A walk by linear address goes through the guest's tables once a page.
_INLINE_SIZE = 4096


class WalkEntry(Document):
    """One table entry that was read."""

    structure: str = Field(description="Which kind of entry: `PML5E` to `PTE`, `SPPL4E` to `SPPL1E`.")
    level: int = Field(description="1 is the leaf.")
    table: Hex64 = Field(description="Address of the table.")
    index: int = Field(description="Position of the entry in the table.")
    raw: Hex64 = Field(description="The entry.")
    absent: bool = Field(description="No table memory is at that address; the entry reads as all ones.")
    fields: dict[str, Hex64] = Field(description="The entry by its fields; `reserved`: the bits set that must be 0.")


class WalkEnding(Document):
    """How the access ends once KVM has handled what it handles itself, and the guest has tried again."""

    resolution: str = Field(
        description=(
            "As of an executed access: `completed`, `violation`, `mmio`, `internal-error`, `exception` or "
            "`run-failed`; `limit-exceeded` where the machine may not have the table frames for it."
        )
    )
    sentence: str = Field(description="The reason in words; not part of the contract.")
    denied: Hex32 = Field(description="Sub-pages touched that refuse the access then.")
    exits: list[ExitRecord] = Field(description="Every exit on the way, in order, the last included.")
    ept: list[WalkEntry] = Field(description="The EPT entries read in the end.")
    sppt: list[WalkEntry] = Field(description="The SPPT entries read in the end.")

    @classmethod
    def of(cls, ending: Ending) -> WalkEnding:
        """The ending by its members; without exits and entries where the access could not be executed."""
        after = ending.after
        return cls.model_validate(
            {
                "resolution": ending.resolution,
                "sentence": ending.sentence,
                "denied": after.denied if after else 0,
                "exits": exit_rows(ending.exits) if ending.exits is not None else [],
                "ept": after.ept if after else [],
                "sppt": after.sppt if after else [],
            },
            from_attributes=True,
            strict=False,
        )


class Walk(Document):
    """What the processor finds now, and `then`, how the access ends.

    Of an access over two pages, the page that exits, or else the last.
    """

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    gpa: Hex64 = Field(description="Guest-physical address.")
    size: int = Field(description="In bytes.")
    access: Access = Field(description="0 read, 1 write, 2 execute.")
    kind: Kind = Field(description="0 data, 1 read-modify-write, 2 paging read, 3 paging A/D update, 4 shadow stack.")
    outcome: str = Field(
        description=(
            "What the processor finds now: `allowed`, or the exit that follows. A page that was not touched yet is an "
            "`ept_violation`, which KVM answers by mapping it: `then` has the ending."
        )
    )
    sentence: str = Field(description="The reason in words, and what KVM does about it; not part of the contract.")
    reason: int | None = Field(description="Basic exit reason; null when no exit follows.")
    qualification: Hex64 | None = Field(description="Exit qualification; null where nothing exits.")
    exit_gpa: Hex64 | None = Field(description="Guest-physical address that the exit would report.")
    subpages: Hex32 = Field(description="Sub-pages touched.")
    denied: Hex32 = Field(description="Those among them that refuse the access.")
    gva: Hex64 | None = Field(description="The linear address, if that was given.")
    guest: list[WalkEntry] = Field(
        description="With `gva`: the entries read of the guest's page tables, from the root; a register has table 0."
    )
    ept: list[WalkEntry] = Field(description="The entries read, from the root.")
    sppt: list[WalkEntry] = Field(description="The entries read, from the root.")
    then: WalkEnding = Field(description="How the access ends: the answer to whether it would be refused.")


@routes.get(
    "",
    operation_id="explainAccess",
    summary="Explain an access",
    description=(
        "Changes nothing: no flag is set, no entry filled. What the processor finds now stands first; an exit that KVM "
        "handles itself, as of a page that nothing has touched, is no refusal. `then` is how the access ends: it is "
        "executed on a copy of the machine, which is thrown away. By `gva`, the guest's page tables are walked "
        "before; a 422 names the entry where an address leads nowhere."
    ),
    responses=documented({200: {"model": Walk, "description": "The explanation."}}, "not-found", "invalid-value"),
)
async def explain_access(
    request: Request,
    vm: VmId,
    gpa: Annotated[
        Hex64 | None,
        Query(description="Guest-physical address of the first byte; required without `gva`.", examples=["0x2a5c6a0"]),
    ] = None,
    access: Annotated[
        Access | None,
        Query(
            description="`read`, `write` or `execute`; unless given, what the kind does, else `write`.",
            examples=["write"],
        ),
    ] = None,
    size: Annotated[int, Query(ge=1, le=0xFFFF, description="Bytes accessed.", examples=[8])] = 8,
    vcpu: Annotated[int, Query(ge=0, le=0xFFFF, description="KVM vCPU id.", examples=[0])] = 0,
    kind: Annotated[
        Kind,
        Query(
            description=(
                "What the access is for; `paging-read` and `paging-update` are the processor's own accesses to guest "
                "paging structures. A kind goes with what it does: `paging-read` reads, `read-modify-write` and "
                "`paging-update` write, `shadow-stack` does either, and only `data` executes."
            ),
            examples=["read-modify-write"],
        ),
    ] = 0,
    linear: Annotated[
        Linear,
        Query(
            description=(
                "The linear address: whether there is one (`valid`, 1), and whether its page is a `user` (2) page, "
                "`writable` (4), `execute-disable` (8). Names with commas between them, or the sum."
            ),
            examples=["valid,user"],
        ),
    ] = 1,
    circumstances: Annotated[Circumstances, Query(description=CIRCUMSTANCES, examples=["nmi-unblocking"])] = 0,
    gva: Annotated[
        Hex64 | None,
        Query(
            description=(
                "Linear address in place of `gpa`: the guest's page tables are walked first, as they are in its "
                "memory; permissions are not asked."
            ),
            examples=["0xffffffff82a5c6a0"],
        ),
    ] = None,
    cr3: Annotated[Hex64 | None, Query(description="With `gva`: the address space in place of the vCPU's CR3.")] = None,
) -> Response:
    machine = find(request, vm).machine
    if (gpa is None) == (gva is None):
        raise InvalidDocument("must be given, or gva, and not both", field="gpa", value=gpa)
    if gva is None and cr3 is not None:
        raise InvalidDocument("must be left out: it is for a walk by gva", field="cr3", value=cr3)
    small = machine.counters()["memory_bytes"] <= _INLINE_BYTES
    guest: tuple[TableEntry, ...] = ()
    if gva is not None:
        gpa, guest = await maybe_in_thread(size <= _INLINE_SIZE, machine.guest_walk, gva, size, vcpu, cr3)
    assert gpa is not None
    how = (gpa, access, size, vcpu, kind, linear, circumstances << CIRCUMSTANCE_SHIFT, gva)
    told = await maybe_in_thread(small, machine.walk, *how)
    beside = {"then": WalkEnding.of(told.then), "gva": gva, "guest": guest}
    now = {name: getattr(told, name) for name in Walk.model_fields if name not in beside}
    return json_response(Walk.model_validate({**now, **beside}, from_attributes=True, strict=False))
