"""Explain an access: every table entry the processor would read, and the reason for the outcome."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.api.common import VmId, documented, find, json_response, router
from service.http.words import Access, Document, Hex32, Hex64, examples

routes = router("accesses", "/v1/vms/{vm}/walk")

_LEAF = {
    "structure": "SPPT L1",
    "level": 1,
    "table": "0x200000004000",
    "index": 92,
    "raw": "0x5555555551555555",
    "absent": False,
    "fields": {"writable_subpages": "0xffffdfff", "reserved": "0x0"},
}
_EPT_LEAF = {
    "structure": "EPT PT",
    "level": 1,
    "table": "0x200000008000",
    "index": 92,
    "raw": "0x2000000002a5c335",
    "absent": False,
    "fields": {"read": "0x1", "write": "0x0", "execute": "0x1", "spp": "0x1", "address": "0x2a5c000"},
}
_REPLY = {
    "gpa": "0x2a5c6a0",
    "size": 8,
    "access": 1,
    "outcome": "ept_violation",
    "sentence": "denied: sub-page 13 of SPPT L1 at 0x2000000042e0 is 0",
    "reason": 48,
    "qualification": "0x1aa",
    "exit_gpa": "0x2a5c6a0",
    "subpages": "0x2000",
    "denied": "0x2000",
    "ept": [_EPT_LEAF],
    "sppt": [_LEAF],
}


class WalkEntry(Document):
    """One table entry that was read."""

    structure: str = Field(description="Which table.")
    level: int = Field(description="1 is the leaf.")
    table: Hex64 = Field(description="Address of the table.")
    index: int = Field(description="Position of the entry in the table.")
    raw: Hex64 = Field(description="The entry.")
    absent: bool = Field(description="No table memory is at that address; the entry reads as zero.")
    fields: dict[str, Hex64] = Field(description="The entry, split into its fields.")


class Walk(Document):
    """What an access would do now. Of an access over two pages, the page that exits, or else the last."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    gpa: Hex64
    size: int
    access: Access = Field(description="0 read, 1 write, 2 execute.")
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
    access: Annotated[Access, Query(description="`read`, `write` or `execute`.", examples=["write"])] = 1,
    size: Annotated[int, Query(ge=1, le=0xFFFF, description="Bytes accessed.", examples=[8])] = 8,
    vcpu: Annotated[int, Query(ge=0, le=0xFFFF, description="KVM vCPU id.", examples=[0])] = 0,
) -> Response:
    told = find(request, vm).machine.walk(gpa, access, size, vcpu)
    return json_response(Walk.model_validate(told, from_attributes=True, strict=False))
