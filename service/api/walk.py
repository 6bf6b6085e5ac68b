"""Explain an access: every table entry the processor would read, and the reason for the outcome."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.arch.access import CIRCUMSTANCE_SHIFT
from service.api.common import VmId, documented, find, json_response, router
from service.http.words import CIRCUMSTANCES, Access, Circumstances, Document, Hex32, Hex64, Kind, Linear, examples

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
_REPLY = {
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


class WalkEntry(Document):
    """One table entry that was read."""

    structure: str = Field(description="Which kind of entry: `PML5E` to `PTE`, `SPPL4E` to `SPPL1E`.")
    level: int = Field(description="1 is the leaf.")
    table: Hex64 = Field(description="Address of the table.")
    index: int = Field(description="Position of the entry in the table.")
    raw: Hex64 = Field(description="The entry.")
    absent: bool = Field(description="No table memory is at that address; the entry reads as all ones.")
    fields: dict[str, Hex64] = Field(description="The entry by its fields; `reserved`: the bits set that must be 0.")


class Walk(Document):
    """What an access would do now. Of an access over two pages, the page that exits, or else the last."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    gpa: Hex64
    size: int
    access: Access = Field(description="0 read, 1 write, 2 execute.")
    kind: Kind = Field(description="0 data, 1 read-modify-write, 2 paging read, 3 paging A/D update, 4 shadow stack.")
    outcome: str = Field(description="`allowed`, or the exit that would follow.")
    sentence: str = Field(description="The reason in words; not part of the contract.")
    reason: int | None = Field(description="Basic exit reason; null when no exit follows.")
    qualification: Hex64 | None
    exit_gpa: Hex64 | None = Field(description="Guest-physical address that the exit would report.")
    subpages: Hex32 = Field(description="Sub-pages touched.")
    denied: Hex32 = Field(description="Those among them that refuse the access.")
    ept: list[WalkEntry]
    sppt: list[WalkEntry]


@routes.get(
    "",
    operation_id="explainAccess",
    summary="Explain an access",
    description="Changes nothing: no flag is set, no entry filled.",
    responses=documented({200: {"model": Walk, "description": "The explanation."}}, "not-found", "invalid-value"),
)
async def explain_access(
    request: Request,
    vm: VmId,
    gpa: Annotated[Hex64, Query(description="Guest-physical address of the first byte.", examples=["0x2a5c6a0"])],
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
) -> Response:
    told = find(request, vm).machine.walk(gpa, access, size, vcpu, kind, linear, circumstances << CIRCUMSTANCE_SHIFT)
    return json_response(Walk.model_validate(told, from_attributes=True, strict=False))
