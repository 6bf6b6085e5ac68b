"""The OpenAPI document of the application."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from service.api.events import introspection
from service.api.hyperv.hypercalls import Hypercall
from service.api.hyperv.hyperv import VpAssistFields
from service.api.nested.nested_fields import NestedStateFields
from service.api.protection.subpages import SubpagePatch, SubpageWindowRequest
from service.api.system.ioctls import IoctlRequest
from service.api.traces.traces import TraceBody
from service.contract.links import add_links
from service.contract.shared import share
from service.http.negotiation import JSON
from service.http.route import GuardedWebSocketRoute, StrictRoute
from service.http.wire_types import Document
from service.problems import FieldError, Problem, add_responses

TITLE = "Subpage"
SUMMARY = "Protects virtual-machine memory at 128-byte granularity, without the hardware."
DESCRIPTION = """\
Create a VM, protect named objects, post a recorded trace of guest writes, and read which of them would have exited,
why, and how many exits whole-page protection would have cost instead.

* 64-bit numbers are `0x…` strings in replies, and strings or integers in requests; counts are plain integers.
* Every error is an `application/problem+json` body (RFC 9457) with a stable `type`, the offending `field` and `value`,
  and the `rule` it breaks. Unknown members and unknown query parameters are refused.
* Calls need `Authorization: Bearer` and a token whose scope includes their `x-permission` (`read`, `write` or `admin`,
  each including those before it), unless the service is reached over loopback only and has no tokens. VMs belong to the
  tenant of the token that created them and do not exist for any other.
* Mutable resources have an entity tag; `If-Match` is honoured (412), and demanded of VMs created with
  `require_match` (428).
* `POST` honours `Idempotency-Key`: kept for a day, so that a call whose answer was lost can be sent again.
* A replay becomes a job with `Prefer: respond-async`, or when it takes longer than `Prefer: wait=N` seconds.
* Bodies may be coded (`Content-Encoding: gzip` or `zstd`); limits hold for what they decode to. Large textual
  replies are coded where `Accept-Encoding` allows it, which `Vary` says.
* `HEAD` does what `GET` does, and leaves out the body.
* Pages of other origins than those in `cors_origins` may not change anything (403): `Origin` and `Sec-Fetch-Site` say
  whose page it is. Programs send neither.
* Lists come in pages: `next` is the URL of the following one. Cursors are opaque.
"""
TAGS: list[dict[str, Any]] = [
    {"name": "vms", "description": "Virtual machines: guests under an exact model of KVM."},
    {"name": "memory slots", "description": "Which guest-physical pages are RAM."},
    {"name": "guest memory", "description": "The bytes in it."},
    {"name": "host memory", "description": "What the host does to the memory behind it."},
    {"name": "spp", "description": "Enabling sub-page write permission."},
    {"name": "subpages", "description": "Write permission of every 128 bytes: one bit each, 32 for a page."},
    {"name": "page access", "description": "Read, write and execute of whole pages, paired with the write bitmap."},
    {"name": "protections", "description": "Named objects that may not be written."},
    {"name": "traces", "description": "Replay of recorded guest accesses, and the exits that they cause."},
    {"name": "footprints", "description": "Traces reduced to their places, and what any policy costs there."},
    {"name": "events", "description": "What happened to a VM, in order: read in pages or followed as it happens."},
    {
        "name": "introspection",
        "description": "A WebSocket over which tools are asked about refused accesses: see `x-websockets`.",
    },
    {"name": "jobs", "description": "Work that was accepted and goes on without its client."},
    {"name": "accesses", "description": "One access, executed or explained."},
    {"name": "dirty tracking", "description": "What was written since it was last taken note of."},
    {"name": "tables", "description": "Raw entries of EPT and SPPT, stored as they are and walked as they are."},
    {
        "name": "vcpus",
        "description": "The processor's controls: VMCS, VM entry, INVEPT, INVVPID, translation cache, CPUID, MSRs.",
    },
    {"name": "ioctls", "description": "The binary KVM ABI: the bytes of an ioctl, and what ioctl(2) returned."},
    {
        "name": "nested state",
        "description": "What KVM keeps for a guest that runs guests: KVM_GET/SET_NESTED_STATE, the enlightened VMCS.",
    },
    {
        "name": "hyperv",
        "description": "Flush hypercalls, and who serves them: queues, TLB locks, assist pages, partitions.",
    },
    {"name": "counters", "description": "Totals of a VM."},
    {"name": "symbols", "description": "Names of the guest's addresses."},
    {"name": "service", "description": "The service itself: capabilities, health, version, problem types."},
]

_SECURITY_SCHEMES = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "description": "Made by `subpage token create`. A service that listens on loopback may run without tokens.",
    }
}

# Models of bodies that routes read by themselves, and of problems, which no route returns.
_FURTHER_MODELS: list[tuple[type[BaseModel], JsonSchemaMode]] = [
    (IoctlRequest, "validation"),
    (Hypercall, "validation"),
    (VpAssistFields, "validation"),
    (SubpageWindowRequest, "validation"),
    (SubpagePatch, "validation"),
    (TraceBody, "validation"),
    (NestedStateFields, "validation"),
    *((model, "validation") for model in introspection.TAKEN),
    *((model, "serialization") for model in introspection.SENT),
    (FieldError, "serialization"),
    (Problem, "serialization"),
]


# What an Idempotency-Key is.
_KEY = {"minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}

_REFERENCE = "#/components/schemas/{model}"


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 description of ``app``."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
        license_info=app.license_info,
        servers=[{"url": "/"}],
    )
    schemas: dict[str, Any] = document["components"]["schemas"]
    _, further = models_json_schema(_FURTHER_MODELS, ref_template=_REFERENCE)
    for name, schema in further["$defs"].items():
        schemas.setdefault(name, schema)
    # The framework drops every null on the way, and with it members of the examples.
    for model in _descendants(Document):
        shown = model.model_config.get("json_schema_extra")
        if model.__name__ in schemas and isinstance(shown, dict) and "examples" in shown:
            schemas[model.__name__]["examples"] = shown["examples"]
    _describe_sockets(document, app)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    routes = {route.operation_id: route for route in app.routes if isinstance(route, StrictRoute)}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _guard(operation, routes[operation["operationId"]])
            if path.startswith("/v1/"):
                # Not the routes' own: refused before them, or after them by the commit.
                add_responses(operation["responses"], "not-ready", "store-unavailable")
            _finish(operation)
    add_links(document)
    document["components"]["schemas"] = _used(document, schemas)
    document["components"]["securitySchemes"] = _SECURITY_SCHEMES
    parts = {part: _plain(_renamed(document[part])) for part in ("paths", "components", "x-websockets")}
    named = parts["components"]["schemas"]
    parts["components"]["schemas"] = {_called(name): named[name] for name in sorted(named, reverse=True)}
    document |= parts
    share(document)
    return document


def _plain(part: Any) -> Any:
    """``part`` without what the framework adds: titles made of names, floats for bounds, which lose bits of them."""
    if isinstance(part, dict):
        return {
            name: member if name in ("example", "examples") else _plain(member)
            for name, member in part.items()
            if name != "title" or not isinstance(member, str)
        }
    if isinstance(part, list):
        return [_plain(member) for member in part]
    if isinstance(part, float) and part.is_integer():
        return (1 << 64) - 1 if part == 1 << 64 else int(part)
    return part


def _used(document: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas that something refers to, by name."""
    used: dict[str, Any] = {}
    wanted = _references(document["paths"]) | _references(document["x-websockets"])
    while wanted:
        name = wanted.pop()
        if name not in used:
            used[name] = schemas[name]
            wanted |= _references(used[name])
    return dict(sorted(used.items()))


def _called(name: str) -> str:
    """What a schema is called where a model is one thing as it is taken and another as it is told."""
    plain, _, direction = name.partition("-")
    if direction == "Output":
        return plain.removesuffix("Request")
    return f"{plain}Request" if direction == "Input" and not plain.endswith("Request") else plain


def _renamed(part: Any) -> Any:
    """``part`` with its references to schemas as ``_called`` has them."""
    if isinstance(part, list):
        return [_renamed(member) for member in part]
    if not isinstance(part, dict):
        return part
    if isinstance(part.get("$ref"), str):
        place, _, name = part["$ref"].rpartition("/")
        return part | {"$ref": f"{place}/{_called(name)}"}
    return {name: _renamed(member) for name, member in part.items()}


def _references(part: Any) -> set[str]:
    if isinstance(part, dict):
        found = {part["$ref"].rpartition("/")[2]} if isinstance(part.get("$ref"), str) else set()
        return found.union(*map(_references, part.values()))
    return set().union(*map(_references, part)) if isinstance(part, list) else set()


def _descendants(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in model.__subclasses__():
        yield child
        yield from _descendants(child)


def _describe_sockets(document: dict[str, Any], app: FastAPI) -> None:
    """WebSockets, which OpenAPI 3.1 does not know: under ``x-websockets``, with the schemas of their messages."""
    sockets: dict[str, Any] = {}
    for route in app.routes:
        if isinstance(route, GuardedWebSocketRoute):
            sockets[route.path] = {
                "summary": "Live introspection",
                "description": "JSON messages in text frames; the protocol is described in docs/introspection.md.",
                "subprotocol": introspection.SUBPROTOCOL,
                "x-permission": route.permission,
                "security": [{"token": []}],
                "receives": {"oneOf": [{"$ref": _REFERENCE.format(model=m.__name__)} for m in introspection.TAKEN]},
                "sends": {"oneOf": [{"$ref": _REFERENCE.format(model=m.__name__)} for m in introspection.SENT]},
            }
    document["x-websockets"] = sockets


def _guard(operation: dict[str, Any], route: StrictRoute) -> None:
    """What the gate of every route adds to what the route itself documents."""
    operation["x-permission"] = "admin" if route.permission == "metrics" else route.permission
    responses: dict[str, Any] = operation["responses"]
    # The framework documents its own 422 wherever there are parameters; ours says which problems there can be.
    if "HTTPValidationError" in str(responses.get("422", "")):
        del responses["422"]
    # A query parameter that the call does not know, where it knows none, too.
    add_responses(responses, "invalid-value")
    if route.offers:
        add_responses(responses, "not-acceptable")
    if "requestBody" in operation:
        add_responses(responses, "malformed-body", "request-timeout", "body-too-large", "unsupported-media-type")
    if "POST" in (route.methods or ()):
        add_responses(responses, "idempotency-in-progress", "idempotency-answer-lost", "idempotency-mismatch")
        add_responses(responses, "limit-exceeded")
        about = "Sent again with the same key and the same request, the call is answered again and not done again."
        operation.setdefault("parameters", []).append(_header("Idempotency-Key", about, **_KEY))
    if route.permission == "public":
        operation["security"] = []
        return
    operation["security"] = [{"token": []}]
    add_responses(responses, "unauthenticated", "forbidden", "rate-limited", "not-ready")


def _finish(operation: dict[str, Any]) -> None:
    responses: dict[str, Any] = operation["responses"]
    operation["responses"] = dict(sorted(responses.items()))
    for reply in responses.values():
        if JSON in reply.get("content", {}):
            # Generators of clients take the first that they know for the one that is answered.
            reply["content"] = {JSON: reply["content"].pop(JSON), **reply["content"]}
    parameters: list[dict[str, Any]] = operation.setdefault("parameters", [])
    if "304" in responses:
        parameters.append(_header("If-None-Match", "Entity tags that the client has: 304 if one of them is current."))
    if "412" in responses:
        parameters.append(_header("If-Match", "Entity tags: 412 unless one of them is current."))
    for parameter in parameters:
        if parameter["schema"].get("description") == parameter["description"]:
            del parameter["schema"]["description"]
    if not parameters:
        del operation["parameters"]


def _header(name: str, about: str, **schema: Any) -> dict[str, Any]:
    kind = {"type": "string", **schema}
    return {"name": name, "in": "header", "required": False, "description": about, "schema": kind}
