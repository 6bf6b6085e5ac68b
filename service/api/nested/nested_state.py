"""Nested state of a vCPU: KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE, and why a blob is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.nested import SetResult
from service.api.common import (
    BINARY,
    GUARDED_CHANGE,
    VmId,
    changed_reply,
    changing,
    documented,
    encode,
    find,
    guard,
    json_response,
    octets_reply,
    router,
)
from service.api.nested.nested_fields import EXAMPLE, NestedStateFields, blob_of, fields_of
from service.http import conditional
from service.http.negotiation import JSON, OCTETS, content_type, preferred
from service.http.route import permission
from service.http.wire_types import Document, examples
from service.problems import NestedStateRefused

routes = router("nested state", "/v1/vms/{vm}/vcpus/{n}", reads="read", writes="write")

VcpuId = Annotated[int, Path(alias="n", ge=0, description="KVM vCPU id.", examples=[0])]

_OFFERS = (JSON, OCTETS)
_CONTENT = {JSON: {"schema": {"$ref": "#/components/schemas/NestedStateFields"}}, OCTETS: BINARY}
# Checks that are made before the old state is given up.
_KEEPS = ("G", "V1", "V2a", "V2b", "V2c", "V3a", "V3b", "V4", "V5", "V5n", "V6", "V7", "V8")


class CheckOutcome(Document):
    """One check, in the order in which the kernel makes them."""

    check: str = Field(description="Its id, as in docs/nested-state.md.")
    says: str = Field(description="What it refuses, or where it let the call go on, what it needs; or what it does.")
    outcome: Literal["pass", "decides", "done", "not reached"] = Field(description="`done`: an effect, not a check.")
    detail: str | None = Field(description="What in it decided.")
    field: str | None = Field(
        description="What it looks at: the member of the JSON form, where it is one; null for a mere effect."
    )
    found: str | None = Field(description="What is there; null where the check was not reached.")
    required: str | None = Field(description="What it takes to pass, in words.")


_FACTS = {"field": "vmcs12.revision", "found": "0x0", "required": "revision 0x11e57ed0 in bits 30:0"}
_CHECK = {"check": "V17", "says": "vmcs12 has another revision", "outcome": "decides", "detail": None, **_FACTS}
_RESULT = {"returned": 0, "check": "V18", "detail": None, "says": "GUEST_MODE is clear: done"}


class NestedStateSet(Document):
    """A blob was taken."""

    model_config = ConfigDict(json_schema_extra=examples(_RESULT))

    returned: int = Field(description="What ioctl(2) returns: 0.")
    check: str = Field(description="Id of the step that ended the call.")
    detail: str | None = Field(description="What it found, where there is more to say.")
    says: str = Field(description="What that step says.")


class NestedStateExplanation(Document):
    """What KVM_SET_NESTED_STATE would do with a blob. Nothing was applied."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                **_RESULT,
                "returned": -1,
                "errno": "EINVAL",
                "state_kept": False,
                "check": "V17",
                "says": "vmcs12 has another revision",
                **_FACTS,
                "trail": [_CHECK],
                "parts": [],
                "given": EXAMPLE,
                "after": EXAMPLE,
            }
        )
    )

    returned: int = Field(description="What ioctl(2) would return; positive when only entering L2 fails.")
    errno: str | None = Field(description="Name of the error that KVM_SET_NESTED_STATE would give.")
    check: str = Field(description="Id of the check that decided, as in docs/nested-state.md.")
    detail: str | None = Field(description="What it found, where there is more to say.")
    says: str = Field(description="What that check says.")
    field: str | None = Field(description="What the deciding check looked at; null for a mere effect.")
    found: str | None = Field(description="What it found there.")
    required: str | None = Field(description="What it takes to pass, in words.")
    state_kept: bool = Field(description="Whether the old state would still be there.")
    trail: list[CheckOutcome] = Field(description="Every step of this kernel on this host.")
    parts: list[CheckOutcome] = Field(description="The checks inside V21 or of SVM, as far as they were reached.")
    given: NestedStateFields | None = Field(description="The blob by field; null without one.")
    after: NestedStateFields | None = Field(description="What GET would give afterwards; null where it has nothing.")


class RunPreparation(Document):
    """What happened before the guest would have moved."""

    model_config = ConfigDict(json_schema_extra=examples({"exit": None, "suberror": None}))

    exit: Literal["internal-error", "shutdown"] | None = Field(description="Null: the guest may move.")
    suberror: int | None = Field(description="1 with internal-error: the enlightened VMCS cannot be mapped.")


def _tag(blob: bytes, media: str) -> str:
    return conditional.entity_tag(f"nested:{media}".encode(), blob)


def _keeps(check: str) -> bool:
    return check.startswith(("G", "S")) or check in _KEEPS


async def _blob(request: Request) -> bytes:
    media = content_type(request, _OFFERS)
    content = await request.body()
    return blob_of(content) if media == JSON else content


def _told(result: SetResult) -> dict[str, Any]:
    return {"returned": result.returns, "check": result.check, "detail": result.detail, "says": result.says}


@routes.get(
    "/nested-state",
    operation_id="getNestedState",
    summary="Read the nested state of a vCPU",
    description="KVM_GET_NESTED_STATE with room enough: 128, 4224 or 8320 bytes, or the same by field.",
    responses=documented(
        octets_reply(NestedStateFields, "The blob by field; as `application/octet-stream`, its bytes."),
        "not-found",
        "not-acceptable",
        "unsupported",
        "invalid-value",
    ),
)
async def get_nested_state(request: Request, vm: VmId, n: VcpuId) -> Response:
    machine = find(request, vm).machine
    media = preferred(request, _OFFERS)
    blob = machine.nested.state(n)
    told = {"ETag": _tag(blob, media), "Vary": "Accept"}
    if conditional.not_modified(request, told["ETag"]):
        return Response(status_code=304, headers=told)
    return Response(blob if media == OCTETS else encode(fields_of(blob)), media_type=media, headers=told)


@routes.put(
    "/nested-state",
    operation_id="putNestedState",
    summary="Load a nested state into a vCPU",
    description=(
        "KVM_SET_NESTED_STATE. Where the kernel refuses the blob, so does this call, and names the deciding check. The "
        "kernel is not atomic: once it has left nested mode (V9) the old state is gone, and what had been taken over "
        "when a later check failed stays. So it is here; `state_kept` tells. The example wants VMX in the guest's "
        "CPUID: see that of `PUT …/cpuid`."
    ),
    openapi_extra={"requestBody": {"required": True, "content": _CONTENT}},
    responses=documented(
        changed_reply(NestedStateSet, "Taken."),
        *GUARDED_CHANGE,
        "unsupported",
        "nested-state-refused",
    ),
)
async def put_nested_state(request: Request, vm: VmId, n: VcpuId) -> Response:
    entry = find(request, vm)
    blob = await _blob(request)
    media = content_type(request, _OFFERS)
    async with changing(request, entry, joins=True) as machine:
        guard(request, entry, lambda: [_tag(machine.nested.state(n), known) for known in _OFFERS])
        result = machine.nested.set_state(n, blob, explain=True)
        if not result.returns or not _keeps(result.check):
            entry.events.note("nested", {"vcpu": n, "errno": result.errno})
    if result.returns:
        facts = f": {result.field} is {result.found}, needs {result.required}" if result.field else ""
        raise NestedStateRefused(
            f"{result.says}{facts}",
            errno=result.errno,
            returned=result.returns,
            check=result.label,
            state_kept=_keeps(result.check),
        )
    told = {"ETag": _tag(machine.nested.state(n), media)}
    return json_response(_told(result), extra=told)


@routes.post(
    "/nested-state:explain",
    operation_id="explainNestedState",
    summary="Which check decides over a nested state",
    description="KVM_SET_NESTED_STATE tried on a copy, step by step. An empty body of bytes is a NULL pointer.",
    openapi_extra={"requestBody": {"required": True, "content": _CONTENT}},
    responses=documented(
        {200: {"model": NestedStateExplanation, "description": "Tried."}},
        "malformed-body",
        "not-found",
        "body-too-large",
        "unsupported-media-type",
        "invalid-value",
    ),
)
@permission("read")
async def explain_nested_state(request: Request, vm: VmId, n: VcpuId) -> Response:
    machine = find(request, vm).machine
    blob = await _blob(request)
    result, after = machine.nested.explain_state(n, blob or None)
    return json_response(
        {
            **_told(result),
            "field": result.field,
            "found": result.found,
            "required": result.required,
            "errno": result.errno,
            "state_kept": bool(result.returns) and _keeps(result.check),
            "trail": [report.to_json() for report in result.trail],
            "parts": [report.to_json() for report in result.parts],
            "given": fields_of(blob) if blob else None,
            "after": fields_of(after),
        }
    )


@routes.post(
    "/nested-state:prepare-run",
    operation_id="prepareNestedRun",
    summary="Do what KVM_RUN does before the guest moves",
    description="A restored enlightened VMCS is attached and brought up to date; no guest code is run.",
    responses=documented(
        {200: {"model": RunPreparation, "description": "Prepared, or ended."}}, "not-found", "vm-busy", "limit-exceeded"
    ),
)
async def prepare_run(request: Request, vm: VmId, n: VcpuId) -> Response:
    async with changing(request, find(request, vm), joins=True) as machine:
        outcome = machine.nested.prepare_run(n)
    return json_response({"exit": outcome.exit, "suberror": outcome.suberror})
