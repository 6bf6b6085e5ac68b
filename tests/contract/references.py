"""The contract with its references followed: every operation says in full what it takes and answers.

Schemas stay where they are. What is told of them is told again of bodies and parameters that have nothing of their own:
examples, and what kind of number a parameter is.
"""

from __future__ import annotations

from typing import Any


def referred(document: dict[str, Any], part: Any) -> Any:
    """``part``, or what it refers to, with what stands beside the reference."""
    while isinstance(part, dict) and "$ref" in part:
        there: Any = document
        for step in part["$ref"].removeprefix("#/").split("/"):
            there = there[step]
        part = there | {name: member for name, member in part.items() if name != "$ref"}
    return part


def followed(document: dict[str, Any]) -> dict[str, Any]:
    """``document``, as if nothing were shared but schemas."""
    paths = {
        path: {method: _operation(document, operation) for method, operation in item.items()}
        for path, item in document["paths"].items()
    }
    return document | {"paths": paths}


def _operation(document: dict[str, Any], operation: dict[str, Any]) -> dict[str, Any]:
    told = dict(operation)
    if "parameters" in told:
        parameters = [referred(document, parameter) for parameter in told["parameters"]]
        told["parameters"] = [item | {"schema": referred(document, item["schema"])} for item in parameters]
    if "requestBody" in told:
        told["requestBody"] = _with_content(document, referred(document, told["requestBody"]))
    told["responses"] = {status: _reply(document, reply) for status, reply in told["responses"].items()}
    return told


def _reply(document: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    told = _with_content(document, referred(document, reply))
    if "headers" in told:
        told["headers"] = {name: referred(document, header) for name, header in told["headers"].items()}
    return told


def _with_content(document: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    if "content" not in body:
        return dict(body)
    content = {}
    for media, told in body["content"].items():
        shown = told.get("schema", {}).get("$ref") and referred(document, told["schema"]).get("examples")
        if "examples" in told:
            examples = {name: referred(document, example) for name, example in told["examples"].items()}
            content[media] = told | {"examples": examples}
        else:
            content[media] = told | ({"example": shown[0]} if shown and "example" not in told else {})
    return body | {"content": content}
