"""What policies cost on a footprint: what a replay of each would count, without one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EngineError, LimitExceeded
from engine.footprint.costs import Cost as EngineCost
from engine.footprint.costs import outcome, runs_of
from engine.footprint.places import Origin
from engine.footprint.question import Check, Question
from engine.footprint.summaries import costs_over_time
from engine.kvm.protections import MAX_PAGES
from engine.kvm.protections import Protection as EngineProtection
from engine.kvm.slots import SlotSpec
from engine.state.profiles import ProfileName
from service.api.common import documented, encode, router, settings_of
from service.api.footprints.asking import QUESTION, ask
from service.api.footprints.footprints import FootprintId
from service.api.protection.policies import EXAMPLE, ProtectionRequest
from service.http.route import permission
from service.http.wire_types import Document, Hex64, examples
from service.problems import InvalidDocument, ServiceError
from service.runtime.footprint_documents import NO_SLOTS, asked, costed
from service.runtime.footprints import Asked

routes = router("footprints", "/v1/footprints/{footprint}/costs", reads="read", writes="write")

_MOST_POLICIES = 1 << 17
_MOST_BUCKETS = 10_000
# Memory of a run of sub-pages, or of an object, while it is asked.
RUN = 160
# Of pages of mixed places, times policies and objects: minutes.
_MOST_MIXED = 1 << 28
OF_POLICY = re.compile(r"name|(objects|pages)\b")
SLOT = {"gpa": "0x0", "size": "0x40000000", "read_only": False, "host_page_size": 4096}
_OBJECT = {"subpages": 3, "violations": 12, "collateral": 12, "first_index": 4711, "first_trace": "boot"}
COST = {
    "violations": 12,
    "page_granular_violations": 902,
    "by_object": {"modprobe_path": _OBJECT},
    "mmio": 3021,
    "unenforced_writes": 0,
    "first_index": 4711,
    "first_trace": "boot",
    "subpages": 3,
    "pages": 1,
}
_POLICY_COST = {"name": "kernel", **COST, "timeline": None}


class AssumedSlot(Document):
    """Memory of the guest that is asked about."""

    model_config = ConfigDict(json_schema_extra=examples(SLOT))

    gpa: Hex64 = Field(description="Guest-physical address of the first byte; a multiple of 4096.")
    size: Hex64 = Field(description="Size in bytes; a multiple of 4096, not zero.")
    read_only: bool = Field(False, description="Writes are MMIO exits.")
    host_page_size: int = Field(4096, description="Page size of the host memory behind it.")


class Guest(Document):
    """The guest that policies are asked for."""

    memory_slots: list[AssumedSlot] | None = Field(
        None, max_length=512, description="Null: every place is writable memory."
    )
    profile: ProfileName = Field("kvm-2019", description="Which KVM.")

    def question(self) -> Question:
        """Raises InvalidValue."""
        slots = self.memory_slots
        found = Question(None if slots is None else tuple(_spec(*item) for item in enumerate(slots)), self.profile)
        found.validate()
        return found


class CostsRequest(Guest):
    """Policies, and the guest that they are asked for."""

    model_config = ConfigDict(json_schema_extra=examples({"policies": [EXAMPLE], "memory_slots": [SLOT]}))

    policies: list[ProtectionRequest] = Field(
        min_length=1, max_length=_MOST_POLICIES, description="As protections are; at most `max_policies` of them."
    )
    timeline: bool = Field(
        False, description="Also by bucket, of one policy: the footprint was made with `by=time:N` or `by=records:N`."
    )


class ObjectCost(Document):
    """What one object of a policy costs."""

    subpages: int = Field(description="How many sub-pages it covers.")
    violations: int = Field(description="Accesses refused that touch one of its protected sub-pages.")
    collateral: int | None = Field(
        description="Those among them that touch none of its own bytes; null where it takes bytes to tell."
    )
    first_index: int | None = Field(description="The first such access; null if there is none or it is not known.")
    first_trace: str | None = Field(description="The trace that it is in: its label, or its digest.")


class BucketCost(Document):
    """What one policy costs in a bucket of time, or of records."""

    bucket: int = Field(description="Its number: the time, or the index of the record, by the size of a bucket.")
    violations: int = Field(description="Accesses that sub-page protection refuses.")
    page_granular_violations: int = Field(description="Writes that plain EPT write protection would have refused.")


class Cost(Document):
    """What a policy costs: what a replay with `on_violation=skip` counts."""

    violations: int = Field(description="Accesses that sub-page protection refuses.")
    page_granular_violations: int = Field(description="Writes that plain EPT write protection would have refused.")
    by_object: dict[str, ObjectCost] = Field(description="By the name of the object.")
    mmio: int = Field(description="Accesses outside of every memory slot, and writes to read-only ones.")
    unenforced_writes: int = Field(description="Writes that go through though the policy refuses them.")
    first_index: int | None = Field(description="The first violation; null if there is none or it is not known.")
    first_trace: str | None = Field(description="The trace that it is in: its label, or its digest.")
    subpages: int = Field(description="Distinct sub-pages that the policy covers.")
    pages: int = Field(description="Distinct pages with one of them.")


class PolicyCost(Cost):
    """What one policy costs: what a replay with `on_violation=skip` counts."""

    model_config = ConfigDict(json_schema_extra=examples(_POLICY_COST))

    name: str = Field(description="Of the policy.")
    timeline: list[BucketCost] | None = Field(
        None, description="By bucket, those in which it costs nothing left out; null where it was not asked for."
    )


class PolicyCosts(Document):
    """What policies cost, in the order in which they were given."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"profile": "kvm-2019", "memory_slots": [SLOT], "assumed": None, "costs": [_POLICY_COST]},
            {"profile": "kvm-2019", "memory_slots": None, "assumed": NO_SLOTS, "costs": [_POLICY_COST]},
        )
    )

    profile: str = Field(description="Which KVM.")
    memory_slots: list[AssumedSlot] | None = Field(description="The memory that was asked about.")
    assumed: str | None = Field(description="What was taken for granted where nothing was said.")
    costs: list[PolicyCost] = Field(description="One for each policy.")


@routes.post(
    "",
    operation_id="costPolicies",
    summary="Cost policies on a footprint",
    description=(
        "Of each policy exactly what a replay of the traces counts with `on_violation=skip`, on a VM with these memory "
        "slots, without nesting, and protected before its guest began. Changes nothing. Slots with a dirty log or of "
        "system-management mode are refused: what they do depends on what was before."
    ),
    responses=documented(
        {200: {"model": PolicyCosts, "description": "In the order of the policies."}},
        *QUESTION,
    ),
)
@permission("read")
async def cost_policies(request: Request, footprint: FootprintId, body: CostsRequest) -> Response:
    most = settings_of(request).max_policies
    if len(body.policies) > most:
        rule = f"must be at most {most} policies: ask for the others in another call"
        raise LimitExceeded(rule, field="max_policies", value=len(body.policies))
    if body.timeline and len(body.policies) > 1:
        raise InvalidDocument("must be false where there is more than one policy", field="timeline", value=True)
    question = body.question()
    content = await ask(
        request, footprint, lambda known, check: _answer(known, question, body.policies, body.timeline, check)
    )
    return Response(content, media_type="application/json")


def _spec(number: int, slot: AssumedSlot) -> SlotSpec:
    return SlotSpec(number, slot.gpa, slot.size, slot.read_only, slot.host_page_size)


def _answer(
    known: Asked, question: Question, given: Sequence[ProtectionRequest], timeline: bool, check: Check
) -> bytes:
    """The reply, in a thread."""
    policies = [policy_of(f"policies[{number}]", policy) for number, policy in enumerate(given)]
    pages = sum(item.npages for policy in policies for item in policy.ranges)
    if pages > MAX_PAGES:
        rule = f"must have at most {MAX_PAGES} pages in the lists `pages` of all policies together"
        raise LimitExceeded(rule, field="policies", value=pages)
    runs, objects = runs_of(policies), sum(len(policy.objects) for policy in policies)
    if runs > MAX_PAGES:
        rule = (
            f"must cover at most {MAX_PAGES} runs of sub-pages in the lists `pages` of all policies together: ask for "
            "the others in another call"
        )
        raise LimitExceeded(rule, field="policies", value=runs)
    check((runs + objects) * RUN)
    try:
        found = known.costs(question, check)
        if found.mixed * (objects + len(policies)) > _MOST_MIXED:
            rule = (
                f"must be fewer: {found.mixed} pages of places that reach over several sorts of memory are looked at "
                f"one by one for each policy and object, {_MOST_MIXED} times at most in one call"
            )
            raise LimitExceeded(rule, field="policies", value=len(policies))
        costs = found.of(policies, check)
    except EngineError as error:
        # Of several policies the engine says which; what is about all of them, or the question, is of none.
        if len(policies) == 1 and error.field is not None and OF_POLICY.match(error.field):
            error.field = f"policies[0].{error.field}"
        raise
    rows = [_row(known.footprint.origins, policy.name, cost) for policy, cost in zip(policies, costs, strict=True)]
    if timeline:
        rows[0]["timeline"] = _timeline(known, policies[0], question, check)
    return encode({**asked(question), "costs": rows})


def _timeline(known: Asked, policy: EngineProtection, question: Question, check: Check) -> list[dict[str, int]]:
    """Raises InvalidValue where there are no buckets, LimitExceeded where there are too many."""
    found = outcome(known.footprint, policy, question, check)
    return [bucket._asdict() for bucket in costs_over_time(known.footprint, found, _MOST_BUCKETS, check)]


def policy_of(where: str, policy: ProtectionRequest) -> EngineProtection:
    """As the engine takes it. Raises ServiceError, whose field is under ``where``."""
    try:
        return policy.protection()
    except ServiceError as error:
        error.field = f"{where}.{error.field}"
        raise


def _row(origins: Sequence[Origin], name: str, cost: EngineCost) -> dict[str, Any]:
    return {"name": name, **costed(origins, cost), "timeline": None}
