"""Whatever a client may send has a bound: every list, map and string of the contract's bodies.

The head of a request, with its URL and the parameters in it, is bounded as a whole (``head-too-large``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.contract.client import contract

CONTRACT = contract().document

# Bodies of traces are read record by record, within bounds of their own (max_body_bytes, and those of its readers).
_STREAMED = {"TraceBody.accesses"}


def requests() -> Iterator[tuple[str, Any]]:
    """The schemas of what clients send, each under a name to find it by."""
    for path, item in CONTRACT["paths"].items():
        for method, operation in item.items():
            if method not in {"get", "put", "post", "patch", "delete"}:
                continue
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                if media == "application/json":
                    yield f"{method} {path}", content["schema"]


def unbounded(where: str, schema: Any, seen: set[str]) -> Iterator[str]:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name not in seen:
            seen.add(name)
            yield from unbounded(name, CONTRACT["components"]["schemas"][name], seen)
        return
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
        yield from unbounded(where, choice, seen)
    match schema.get("type"):
        case "array":
            if "maxItems" not in schema and where not in _STREAMED:
                yield f"{where}: a list without maxItems"
            yield from unbounded(f"{where}[]", schema.get("items", {}), seen)
        case "object":
            if schema.get("additionalProperties", True) is not False and "maxProperties" not in schema:
                yield f"{where}: a map without maxProperties"
            for name, member in schema.get("properties", {}).items():
                yield from unbounded(f"{where}.{name}", member, seen)
            if isinstance(schema.get("additionalProperties"), dict):
                yield from unbounded(f"{where}.*", schema["additionalProperties"], seen)
        case "string":
            if not schema.keys() & {"maxLength", "enum", "const", "pattern", "format"}:
                yield f"{where}: a string without maxLength"


def test_every_list_and_map_of_a_request_has_a_bound() -> None:
    seen: set[str] = set()
    found = [fault for where, schema in requests() for fault in unbounded(where, schema, seen)]
    assert len(seen) > 40
    assert found == []
