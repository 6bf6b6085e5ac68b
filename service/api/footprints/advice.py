"""What to do about a policy on a footprint: neighbours, moves, and what is too dear; each at what it then costs."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EngineError, LimitExceeded
from engine.footprint.advice import advise
from engine.footprint.costs import runs_of
from engine.footprint.question import WIDTH, Check, Question
from engine.kvm.protections import MAX_PAGES, validate
from service.api.common import documented, encode, router
from service.api.footprints.asking import QUESTION, ask
from service.api.footprints.costs import COST, OF_POLICY, RUN, SLOT, AssumedSlot, Cost, Guest, policy_of
from service.api.footprints.footprints import FootprintId
from service.api.protection.policies import ProtectionRequest
from service.http.route import permission
from service.http.wire_types import Document, Hex64, examples
from service.runtime.footprint_documents import advice_document, budget_of
from service.runtime.footprints import Asked

routes = router("footprints", "/v1/footprints/{footprint}/advice", reads="read", writes="write")

# Each may have edits, and each edit tells what all of them cost then: memory of one object in one edit, and of a page
# that the policy is about.
_MOST_OBJECTS = 256
_TOLD, _PAGE = 500, 200
_MOST_EXITS = 1e12

_POLICY = {"name": "kernel", "objects": [{"name": "modprobe_path", "gpa": "0x2a5c6a0", "size": 256}]}
_OBJECT = {"subpages": 3, "violations": 0, "collateral": 0, "first_index": None, "first_trace": None}
_NOTHING = {**COST, "violations": 0, "by_object": {"modprobe_path": _OBJECT}, "first_index": None, "first_trace": None}
_EDIT = {"object": "modprobe_path", "action": "move", "to": "0x3ffff000", "saves": 12, "cost": _NOTHING}
_ADVICE = {
    "profile": "kvm-2019",
    "memory_slots": [SLOT],
    "assumed": None,
    "cost": COST,
    "neighbours": {"modprobe_path": [{"gpa": "0x2a5c680", "size": 8, "violations": 12}]},
    "advice": [_EDIT],
    "all_moved": None,
    "within_budget": {"exits": 20.0, "dropped": [], "cost": COST},
}


class AdviceRequest(Guest):
    """A policy, the guest that it is asked for, and at most one of the two budgets."""

    model_config = ConfigDict(
        json_schema_extra=examples({"policy": _POLICY, "memory_slots": [SLOT], "per_million": 1.25})
    )

    policy: ProtectionRequest = Field(description=f"As protections are; at most {_MOST_OBJECTS} objects.")
    per_second: float | None = Field(
        None,
        ge=0,
        le=_MOST_EXITS,
        allow_inf_nan=False,
        description="Exits a second that the policy may cost; the traces must have times.",
    )
    per_million: float | None = Field(
        None,
        ge=0,
        le=_MOST_EXITS,
        allow_inf_nan=False,
        description="Exits that the policy may cost in a million writes.",
    )


class NeighbourCost(Document):
    """Bytes beside an object, in its sub-pages."""

    gpa: Hex64 = Field(description="The first of them.")
    size: int = Field(description="How many.")
    violations: int = Field(description="Accesses to them that are refused.")


class Edit(Document):
    """A change of one object, and what it is worth."""

    object: str = Field(description="Its name.")
    action: str = Field(
        description="`move`: to sub-pages of its own, and accesses to its bytes with it. `narrow`: protect it by "
        "sub-pages, not by whole pages."
    )
    to: Hex64 | None = Field(description="Its address after `move`; nothing accesses the pages there.")
    saves: int = Field(description="Violations fewer.")
    cost: Cost = Field(description="Of the whole policy with this edit alone.")


class WithinBudget(Document):
    """What to leave out of a policy for the sake of a budget."""

    exits: float = Field(description="The budget, for all accesses of the footprint.")
    dropped: list[str] = Field(description="Objects that are not worth it, the dearest first.")
    cost: Cost = Field(description="Without them; above the budget where nothing more can be left out.")


class PolicyAdvice(Document):
    """What to do about a policy. Every cost is what the edited policy costs on the edited footprint."""

    model_config = ConfigDict(json_schema_extra=examples(_ADVICE))

    profile: str = Field(description="Which KVM.")
    memory_slots: list[AssumedSlot] | None = Field(description="The memory that was asked about.")
    assumed: str | None = Field(description="What was taken for granted where nothing was said.")
    cost: Cost = Field(description="Of the policy as it is.")
    neighbours: dict[str, list[NeighbourCost]] = Field(
        description="By the name of an object that pays for some, the dearest 8 first."
    )
    advice: list[Edit] = Field(description="Edits that save something, the best first.")
    all_moved: Cost | None = Field(description="With all moves together; null where there are fewer than two.")
    within_budget: WithinBudget | None = Field(description="Null without a budget.")


@routes.post(
    "",
    operation_id="advisePolicy",
    summary="Ask what to do about a policy",
    description=(
        "Which neighbours each object pays for, what moving it away from them would save, and with a budget which "
        "objects are not worth it, as `subpage footprint advise` says. The footprint is of `level=bytes`. Changes "
        "nothing."
    ),
    responses=documented(
        {200: {"model": PolicyAdvice, "description": "The edits, and what they are worth."}},
        *QUESTION,
    ),
)
@permission("read")
async def advise_policy(request: Request, footprint: FootprintId, body: AdviceRequest) -> Response:
    count = len(body.policy.objects)
    if count > _MOST_OBJECTS:
        rule = f"must be at most {_MOST_OBJECTS} objects: ask about a part of them at a time"
        raise LimitExceeded(rule, field="policy.objects", value=count)
    question = body.question()
    content = await ask(request, footprint, lambda known, check: _answer(known, question, body, check))
    return Response(content, media_type="application/json")


def _answer(known: Asked, question: Question, body: AdviceRequest, check: Check) -> bytes:
    """The reply, in a thread."""
    policy = policy_of("policy", body.policy)
    budget = budget_of(known.footprint, body.per_second, body.per_million)
    try:
        validate(policy, WIDTH)
        runs = runs_of([policy])
        if runs > MAX_PAGES:
            rule = f"must cover at most {MAX_PAGES} runs of sub-pages: ask about a part of them at a time"
            raise LimitExceeded(rule, field="pages", value=runs)
        check(runs * RUN + policy.extent * _PAGE + 2 * len(policy.objects) ** 2 * _TOLD)
        found = advise(known.footprint, policy, question, budget, check, known.costs(question, check))
    except EngineError as error:
        if error.field is not None and OF_POLICY.match(error.field):
            error.field = f"policy.{error.field}"
        raise
    return encode(advice_document(known.footprint, question, found))
