"""Errors on the wire: one table of problem types (RFC 9457), and the way from each exception to one of them.

Every refusal of the service, the framework's own included, is an ``application/problem+json`` body whose ``type`` is
the relative URI ``/problems/<code>``. That URI can be fetched and answers with the entry of the table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from numbers import Integral
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from engine import errors

MEDIA_TYPE = "application/problem+json"

# Members whose integers are addresses, shown the way the API writes them.
_HEX_FIELDS = frozenset({"gpa", "gva", "gfn", "address", "qualification"})
_LONGEST_VALUE = 200
# What Python writes for numbers that JSON does not have.
_NO_JSON = re.compile(r"NaN|Infinity")


@dataclass(frozen=True, slots=True)
class ProblemType:
    """One row of the table. ``retry_after`` (seconds) is sent as a header where waiting can help."""

    code: str
    status: int
    title: str
    about: str
    retry_after: int | None = None

    @property
    def uri(self) -> str:
        return f"/problems/{self.code}"


_ROWS = (
    ProblemType("malformed-body", 400, "Malformed body", "The body is not well-formed JSON in UTF-8, or badly coded."),
    ProblemType("malformed-request", 400, "Malformed request", "What arrived is no request of HTTP/1.1."),
    ProblemType(
        "unauthenticated", 401, "Unauthenticated", "A valid token is needed: Authorization: Bearer and a token."
    ),
    ProblemType(
        "forbidden", 403, "Forbidden", "The token's scope does not include the call, or the host is not local."
    ),
    ProblemType("not-found", 404, "Not found", "The path or the thing that it names does not exist."),
    ProblemType("method-not-allowed", 405, "Method not allowed", "The path exists, the method does not; see Allow."),
    ProblemType("not-acceptable", 406, "Not acceptable", "None of the media types in Accept can be produced."),
    ProblemType("request-timeout", 408, "Request too slow", "The head or the body took too long; nothing was changed."),
    ProblemType("conflict", 409, "Conflict", "The machine is in a state in which the call is not defined."),
    ProblemType("spp-not-enabled", 409, "SPP not enabled", "Sub-page protection was used before it was enabled."),
    ProblemType("unsupported", 409, "Not offered by this host", "The host described at creation lacks the feature."),
    ProblemType("out-of-memory", 409, "Host out of memory", "An allocation of the host failed, as it was told to."),
    ProblemType("vm-busy", 409, "VM busy", "Another mutation of the machine did not end in time.", retry_after=1),
    ProblemType(
        "idempotency-in-progress",
        409,
        "Request under way",
        "The first request with this key still runs.",
        retry_after=1,
    ),
    ProblemType(
        "idempotency-answer-lost",
        409,
        "Answer lost",
        "The request was carried out, and the service was killed before its answer was kept; it is not done again.",
    ),
    ProblemType("precondition-failed", 412, "Precondition failed", "If-Match names another state than the current."),
    ProblemType("body-too-large", 413, "Body too large", "The body exceeds the limit given in the problem."),
    ProblemType("unsupported-media-type", 415, "Unsupported media type", "The body's Content-Type is not accepted."),
    ProblemType("invalid-value", 422, "Invalid value", "A well-formed input breaks a rule; nothing was changed."),
    ProblemType("invalid-trace", 422, "Invalid trace", "A trace body or one of its records; nothing was applied."),
    ProblemType(
        "nested-state-refused",
        422,
        "Nested state refused",
        "KVM_SET_NESTED_STATE fails: `check` decided, `errno` and `returned` are what the kernel answers. Checks up "
        "to V8 leave the old state; after those it is gone, and what had been taken over by then stays.",
    ),
    ProblemType("not-yet-supported", 422, "Not yet supported", "The name is reserved and does not work yet."),
    ProblemType("idempotency-mismatch", 422, "Key of another request", "The Idempotency-Key was used for another one."),
    ProblemType("precondition-required", 428, "Precondition required", "This machine demands If-Match."),
    ProblemType("limit-exceeded", 429, "Limit exceeded", "A configured limit would be passed.", retry_after=5),
    ProblemType(
        "rate-limited", 429, "Rate limited", "The token made too many requests; see Retry-After.", retry_after=1
    ),
    ProblemType("head-too-large", 431, "Head too large", "The URL and the header fields are too long together."),
    ProblemType("internal-error", 500, "Internal error", "A defect of the service; the details are in its log."),
    ProblemType("not-ready", 503, "Not ready", "The service is starting or draining.", retry_after=1),
    ProblemType(
        "interrupted", 503, "Interrupted", "The service ended before the job did; the machine is as before the job."
    ),
    ProblemType(
        "cluster-unavailable", 503, "Cluster unavailable", "Work is handed to a cluster, which cannot do it now."
    ),
    ProblemType(
        "store-unavailable", 503, "Store unavailable", "The store failed or belongs to another.", retry_after=2
    ),
)
PROBLEMS: Mapping[str, ProblemType] = {row.code: row for row in _ROWS}

# The engine's tree; a class that is not listed is answered like its nearest listed base.
ENGINE_PROBLEMS: Mapping[type[errors.EngineError], str] = {
    errors.EngineError: "conflict",
    errors.InvalidValue: "invalid-value",
    errors.TraceError: "invalid-trace",
    errors.NotFound: "not-found",
    errors.Conflict: "conflict",
    errors.NotEnabled: "spp-not-enabled",
    errors.Unsupported: "unsupported",
    errors.Busy: "vm-busy",
    errors.LimitExceeded: "limit-exceeded",
    errors.OutOfMemory: "out-of-memory",
}

_FRAMEWORK_PROBLEMS = {
    400: "malformed-body",
    404: "not-found",
    405: "method-not-allowed",
    406: "not-acceptable",
    413: "body-too-large",
    415: "unsupported-media-type",
    422: "invalid-value",
}


class FieldError(BaseModel):
    """One of several faults of a request."""

    model_config = ConfigDict(extra="forbid")

    field: str | None = Field(None, description="Dotted name of the input.")
    value: Any = Field(None, description="What was given.")
    rule: str = Field(description="What would have been accepted.")


class Problem(BaseModel):
    """RFC 9457 problem details. Members that do not apply are left out."""

    model_config = ConfigDict(extra="forbid")

    type: str = Field(description="Stable relative URI of the problem type.", examples=["/problems/invalid-value"])
    title: str = Field(description="Name of the problem type.")
    status: int = Field(description="Status of the reply.")
    detail: str = Field(description="What is wrong with this request, for people; not part of the contract.")
    instance: str = Field(description="Path of the request.")
    code: str = Field(description="Stable slug; at least as specific as `type`.", examples=["invalid-value"])
    field: str | None = Field(None, description="Dotted name of the offending input.")
    value: Any = Field(None, description="The offending value.")
    rule: str | None = Field(None, description="What would have been accepted.")
    index: int | None = Field(None, description="Absolute index of the offending trace record.")
    errno: str | None = Field(None, description="Linux name of the error that the kernel gives.", examples=["EINVAL"])
    returned: int | None = Field(None, description="What ioctl(2) would return.")
    check: str | None = Field(None, description="Id of the check that decided, as in docs/nested-state.md.")
    state_kept: bool | None = Field(None, description="Whether the state is the one before the call.")
    resume_at: int | None = Field(
        None,
        description=(
            "With `on_violation=ask`: what came before this record is committed and stays; `start` goes on there."
        ),
    )
    limit: str | None = Field(None, description="Setting whose limit would be passed.", examples=["max_vms"])
    limit_of: Literal["service", "tenant", "machine"] | None = Field(
        None, description="Who has come to it: the whole service, the caller's tenant, or the machine."
    )
    errors: list[FieldError] | None = Field(None, description="Every fault, when there are several.")


class ServiceError(HTTPException):
    """A refusal that is the service's own, not the engine's.

    It derives from the framework's exception so that the framework hands it on untouched from wherever a body is read.
    """

    code = "malformed-body"

    def __init__(
        self,
        rule: str,
        *,
        field: str | None = None,
        value: Any = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        faults: Sequence[FieldError] = (),
    ) -> None:
        self.code = code or self.code
        super().__init__(PROBLEMS[self.code].status, rule, headers)
        self.rule = rule
        self.field = field
        self.value = value
        self.faults = faults


class Unauthenticated(ServiceError):
    """The route needs a token, and none that is valid was given."""

    code = "unauthenticated"


class Forbidden(ServiceError):
    """The caller is known and may not do this."""

    code = "forbidden"


class RateLimited(ServiceError):
    """The token has made too many requests."""

    code = "rate-limited"


class NotAcceptable(ServiceError):
    """None of the offered media types is acceptable to the client."""

    code = "not-acceptable"


class UnsupportedMediaType(ServiceError):
    """The body is of a type that the call does not read."""

    code = "unsupported-media-type"


class PreconditionFailed(ServiceError):
    """If-Match was given and does not hold."""

    code = "precondition-failed"


class PreconditionRequired(ServiceError):
    """The machine was created with ``require_match`` and If-Match is missing."""

    code = "precondition-required"


class BodyTooLarge(ServiceError):
    """The body passes the limit of the call."""

    code = "body-too-large"


class BodyTooSlow(ServiceError):
    """The body arrives more slowly than the call waits for."""

    code = "request-timeout"

    def __init__(self, rule: str) -> None:
        # What is left of the body is of no use to anybody.
        super().__init__(rule, field="body", headers={"Connection": "close"})


class InvalidDocument(ServiceError):
    """The request breaks its schema."""

    code = "invalid-value"


class NestedStateRefused(ServiceError):
    """The kernel would not take a nested state; ``members`` are those of the problem that say how it refuses."""

    code = "nested-state-refused"

    def __init__(self, rule: str, **members: Any) -> None:
        super().__init__(rule, field="state")
        self.members = members


class IdempotencyInProgress(ServiceError):
    """The first request with this Idempotency-Key has not been answered yet."""

    code = "idempotency-in-progress"


class IdempotencyAnswerLost(ServiceError):
    """The first request with this Idempotency-Key was carried out, and nobody knows what it was answered."""

    code = "idempotency-answer-lost"


class IdempotencyMismatch(ServiceError):
    """The Idempotency-Key was used for a request that differs from this one."""

    code = "idempotency-mismatch"


class Interrupted(ServiceError):
    """A job was under way, or waited, when the service ended."""

    code = "interrupted"


class NotReady(ServiceError):
    """The service is starting or draining."""

    code = "not-ready"


class ClusterUnavailable(ServiceError):
    """The cluster that work is handed to does not answer, or cannot do it."""

    code = "cluster-unavailable"


class StoreUnavailable(ServiceError):
    """The store could not be written or read. ``certain``: nothing of the change is stored, now or later."""

    code = "store-unavailable"

    def __init__(self, rule: str, *, certain: bool = True) -> None:
        super().__init__(rule)
        self.certain = certain


def showable(value: Any, field: str | None = None) -> Any:
    """``value`` as a short JSON value: long texts and documents are cut, addresses and masks are hexadecimal."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, Integral):
        value = int(value)  # numpy's integers, too
        name = (field or "").rpartition(".")[2].partition("[")[0]
        return f"{value:#x}" if value >= 0 and (name in _HEX_FIELDS or value >= 1 << 32) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple, dict)):
        text = json.dumps(value, default=str)
        return (
            json.loads(text)
            if len(text) <= _LONGEST_VALUE and not _NO_JSON.search(text)
            else text[:_LONGEST_VALUE] + "…"
        )
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def trace_not_kept(trace: str) -> errors.NotFound:
    """There is no such trace, or its result was dropped."""
    return errors.NotFound(
        "must be the id of a trace of this VM whose result is still kept", field="trace", value=trace
    )


def problem_body(
    problem: ProblemType,
    rule: str,
    instance: str,
    *,
    code: str | None = None,
    field: str | None = None,
    value: Any = None,
    index: int | None = None,
    faults: Sequence[FieldError] = (),
) -> dict[str, Any]:
    """The members of one problem, those that do not apply left out."""
    shown = showable(value, field)
    detail = f"{field}: {rule}" if field else rule
    if shown is not None and not isinstance(shown, (list, dict)):
        detail += f" (got {shown})"
    body: dict[str, Any] = {
        "type": problem.uri,
        "title": problem.title,
        "status": problem.status,
        "detail": detail,
        "instance": instance,
        "code": code or problem.code,
    }
    if field is not None:
        body["field"] = field
    if value is not None:
        body["value"] = shown
    body["rule"] = rule
    if index is not None:
        body["index"] = int(index)
    if len(faults) > 1:
        body["errors"] = [fault.model_dump(exclude_none=True) for fault in faults]
    return body


# Attribute of an exception that ended a replay of which a part is committed: the record it ended at.
RESUME_AT = "resume_at"


def describe(exc: Exception, instance: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Body and extra headers for any exception that means a refusal.

    Anything else is an internal error, and nothing of it is told to the client.
    """
    body, headers = _describe(exc, instance)
    resume_at = getattr(exc, RESUME_AT, None)
    return (body if resume_at is None else body | {RESUME_AT: resume_at}), headers


def said(error: errors.EngineError | ServiceError) -> str:
    """A refusal in one line, as a problem's detail has it."""
    problem, _ = describe(error, "")
    return f"record {problem['index']}: {problem['detail']}" if "index" in problem else str(problem["detail"])


def _describe(exc: Exception, instance: str) -> tuple[dict[str, Any], dict[str, str]]:
    if isinstance(exc, errors.EngineError):
        nearest = next(cls for cls in type(exc).__mro__ if cls in ENGINE_PROBLEMS)
        problem = PROBLEMS.get(exc.code) or PROBLEMS[ENGINE_PROBLEMS[nearest]]
        index = getattr(exc, "index", None)
        body = problem_body(problem, exc.rule, instance, code=exc.code, field=exc.field, value=exc.value, index=index)
        return body | {"errno": exc.errno, **getattr(exc, "members", {})}, _headers(problem)
    if isinstance(exc, ServiceError):
        problem = PROBLEMS[exc.code]
        body = problem_body(problem, exc.rule, instance, field=exc.field, value=exc.value, faults=exc.faults)
        if isinstance(exc, NestedStateRefused):
            body |= {name: value for name, value in exc.members.items() if value is not None}
        return body, _headers(problem) | dict(exc.headers or {})
    if isinstance(exc, HTTPException) and exc.status_code in _FRAMEWORK_PROBLEMS:
        problem = PROBLEMS[_FRAMEWORK_PROBLEMS[exc.status_code]]
        rule = problem.about if exc.detail == HTTPStatus(exc.status_code).phrase else str(exc.detail)
        return problem_body(problem, rule, instance), dict(exc.headers or {})
    problem = PROBLEMS["internal-error"]
    return problem_body(problem, problem.about, instance), {}


def _headers(problem: ProblemType) -> dict[str, str]:
    return {"Retry-After": str(problem.retry_after)} if problem.retry_after is not None else {}


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI ``responses`` of a route that may answer with these problems, grouped by status."""
    documented: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        problem = PROBLEMS[code]
        example = {**problem_body(problem, problem.about, "/v1/vms/vm_3f9c2a1be07d4c55"), **_EXAMPLES.get(code, {})}
        content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
        entry = documented.setdefault(problem.status, {"description": "", "content": {MEDIA_TYPE: content}})
        entry["description"] = f"{entry['description']}; {problem.title}".lstrip("; ")
        entry["content"][MEDIA_TYPE]["examples"][code] = {"summary": problem.title, "value": example}
        if problem.retry_after is not None:
            schema = {"type": "integer", "minimum": 0}
            entry["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": schema}}
        if problem.status == HTTPStatus.UNAUTHORIZED:
            schema = {"type": "string"}
            entry["headers"] = {"WWW-Authenticate": {"description": "How to authenticate.", "schema": schema}}
    return documented


def add_responses(documented: dict[str, Any], *codes: str) -> None:
    """Add problems to the OpenAPI ``responses`` of an operation, which may document their statuses already."""
    for code in codes:
        for status, entry in responses(code).items():
            known = documented.setdefault(str(status), entry)
            examples = known["content"][MEDIA_TYPE]["examples"]
            if code not in examples:
                examples.update(entry["content"][MEDIA_TYPE]["examples"])
                known["description"] = f"{known['description']}; {PROBLEMS[code].title}"
            if "headers" in entry:
                known.setdefault("headers", {}).update(entry["headers"])


_ANOTHER_REVISION = "vmcs12 has another revision: vmcs12.revision is 0x0, needs revision 0x11e57ed0 in bits 30:0"
_EXAMPLES: Mapping[str, dict[str, Any]] = {
    "invalid-value": {
        "detail": "gpa: must be a multiple of 4096 (got 0x1001)",
        "field": "gpa",
        "value": "0x1001",
        "rule": "must be a multiple of 4096",
    },
    "nested-state-refused": {
        "detail": f"state: {_ANOTHER_REVISION}",
        "field": "state",
        "rule": _ANOTHER_REVISION,
        "errno": "EINVAL",
        "returned": -1,
        "check": "V17",
        "state_kept": False,
    },
    "invalid-trace": {
        "detail": "size: must be at least 1 (got 0)",
        "field": "size",
        "value": 0,
        "rule": "must be at least 1",
        "index": 4711,
    },
}
