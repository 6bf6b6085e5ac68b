"""An HTTP client that holds every request and reply against the committed contract.

A reply must have a documented status, documented headers and a body that its schema allows. A request that was answered
with success must have been one that the contract allows, so that the document is neither too strict nor too lax.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.contract.references import followed

CONTRACT = Path(__file__).parents[2] / "openapi" / "openapi.json"
PROBLEM = "application/problem+json"
UNDOCUMENTED = ("/docs", "/openapi.json", "/static/", "/console/")

_ROOT = "urn:contract"


class ContractBroken(AssertionError):
    """The service and its contract disagree."""


class Contract:
    """The committed document, ready to be asked. ``document`` has its references followed, but for schemas."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.committed, self.document = document, followed(document)
        # By the identity of the schema, which the document keeps alive.
        self._validators: dict[int, Draft202012Validator] = {}
        resource = Resource.from_contents(document, default_specification=DRAFT202012)
        self._registry: Registry[Any] = Registry().with_resource(_ROOT, resource)
        self._paths = [
            (re.compile(re.sub(r"\{[^}]+\}", "[^/]+", template) + "$"), template) for template in document["paths"]
        ]
        # A path without parameters is a better match than one with.
        self._paths.sort(key=lambda item: item[1].count("{"))

    def operation(self, method: str, path: str) -> tuple[dict[str, Any] | None, bool]:
        """The operation of a request, and whether the path exists at all."""
        for pattern, template in self._paths:
            if pattern.match(path):
                operation = self.document["paths"][template].get(method.lower())
                if operation is not None:
                    return operation, True
        return None, any(pattern.match(path) for pattern, _ in self._paths)

    def _validator(self, schema: dict[str, Any]) -> Draft202012Validator:
        if id(schema) not in self._validators:
            # Fragments are looked up from the root of the document.
            rooted = json.loads(json.dumps(schema).replace('"#/', f'"{_ROOT}#/'))
            self._validators[id(schema)] = Draft202012Validator(rooted, registry=self._registry)
        return self._validators[id(schema)]

    def valid(self, value: Any, schema: dict[str, Any], what: str) -> None:
        """Raise ContractBroken unless ``schema`` allows ``value``."""
        fault = next(iter(self._validator(schema).iter_errors(value)), None)
        if fault is not None:
            raise ContractBroken(f"{what}: {fault.json_path}: {fault.message}")

    def check(self, request: httpx2.Request, response: httpx2.Response) -> None:
        """Hold one exchange against the document."""
        path = request.url.path
        if path == "/" or path.startswith(UNDOCUMENTED):
            return
        what = f"{request.method} {path} → {response.status_code}"
        # HEAD is GET without the body, and documented once for all.
        method = "GET" if request.method == "HEAD" else request.method
        operation, known = self.operation(method, path)
        if operation is None:
            if response.status_code != (405 if known else 404):
                raise ContractBroken(f"{what}: not in the contract")
            if request.method != "HEAD":
                self._check_problem(response, what)
            return
        self._check_reply(operation, response, what)
        if response.is_success:
            self._check_request(operation, request, what)

    def _check_reply(self, operation: dict[str, Any], response: httpx2.Response, what: str) -> None:
        documented = operation["responses"].get(str(response.status_code))
        if documented is None:
            raise ContractBroken(f"{what}: status not documented; {response.text[:300]}")
        headers = documented.get("headers", {})
        for name in ("etag", "location", "link", "vary", "retry-after"):
            if name == "vary" and response.headers.get("vary") == "Accept-Encoding":
                continue  # codings are of the transfer, and documented once for all
            if name in response.headers and name not in {known.lower() for known in headers}:
                raise ContractBroken(f"{what}: header {name} not documented")
        for name, header in headers.items():
            if header.get("required", True) and name not in ("Link", "Retry-After") and name not in response.headers:
                raise ContractBroken(f"{what}: documented header {name} is missing")
        content = documented.get("content", {})
        media = response.headers.get("content-type", "").partition(";")[0]
        if not content:
            if response.content:
                raise ContractBroken(f"{what}: a body where none is documented")
            return
        if media not in content:
            raise ContractBroken(f"{what}: media type {media!r} not documented")
        if response.request.method == "HEAD":
            return
        if media in ("application/json", PROBLEM):
            self.valid(_sampled(response.json()), content[media]["schema"], what)
        if media == PROBLEM:
            self._check_problem(response, what)

    def _check_problem(self, response: httpx2.Response, what: str) -> None:
        if response.headers.get("content-type") != PROBLEM:
            raise ContractBroken(f"{what}: not a problem but {response.headers.get('content-type')}")
        body = response.json()
        self.valid(body, self.document["components"]["schemas"]["Problem"], what)
        if body["status"] != response.status_code:
            raise ContractBroken(f"{what}: the problem says {body['status']}")

    def _check_request(self, operation: dict[str, Any], request: httpx2.Request, what: str) -> None:
        parameters = {item["name"]: item for item in operation.get("parameters", []) if item["in"] == "query"}
        given = request.url.params
        for name, value in given.multi_items():
            if name not in parameters:
                raise ContractBroken(f"{what}: query parameter {name} not documented")
            self.valid(
                _as_schema_type(value, parameters[name]["schema"]), parameters[name]["schema"], f"{what}: {name}"
            )
        for name, parameter in parameters.items():
            if parameter["required"] and name not in given:
                raise ContractBroken(f"{what}: accepted without the required {name}")
        body = operation.get("requestBody")
        if body is None:
            return
        media = request.headers.get("content-type", "").partition(";")[0].lower()
        if not media and not body.get("required", False):
            return
        if media not in body["content"]:
            raise ContractBroken(f"{what}: accepted a body of type {media!r}, which is not documented")
        # A body that was sent in pieces is gone by now, and a coded one says nothing without its decoder.
        plain = hasattr(request, "_content") and "content-encoding" not in request.headers
        if media == "application/json" and plain:
            self.valid(_sampled(json.loads(request.content)), body["content"][media]["schema"], f"{what}: request")


def _as_schema_type(value: str, schema: dict[str, Any]) -> Any:
    """A query parameter is text; where the schema wants an integer or a boolean, it is written as JSON has it."""
    kinds = {schema.get("type"), *(branch.get("type") for branch in schema.get("anyOf", []))}
    if "boolean" in kinds and value in ("true", "false"):
        return value == "true"
    return int(value) if "integer" in kinds and "string" not in kinds and value.isdigit() else value


def _sampled(value: Any) -> Any:
    """``value`` with its very long lists cut: one schema goes for all items, and checking takes its time."""
    if isinstance(value, dict):
        return {name: _sampled(member) for name, member in value.items()}
    return value[:500] if isinstance(value, list) else value


@cache
def contract() -> Contract:
    """The committed contract."""
    return Contract(json.loads(CONTRACT.read_text(encoding="utf-8")))


class ContractClient(httpx2.Client):
    """A client whose every exchange is checked. Streamed replies are checked when they were read."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        response = super().send(request, **options)
        if not options.get("stream"):
            contract().check(request, response)
        return response
