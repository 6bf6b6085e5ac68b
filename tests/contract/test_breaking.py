"""What counts as a break: one row for each kind of change, and the committed contract against the one before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.contract import breaking
from tests.contract.breaking import Comparison
from tests.contract.client import contract
from tests.contract.narrowing import KNOWN, Narrowing

Change = Callable[[dict[str, Any]], Any]

REPLY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "kind": {"type": "string", "enum": ["a", "b"]},
        "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "parts": {"type": "array", "items": {"$ref": "#/components/schemas/Part"}},
    },
    "required": ["id", "kind", "size", "parts"],
    "additionalProperties": False,
}
REQUEST: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["a", "b"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 8},
        "name": {"type": "string", "maxLength": 5, "pattern": "^a"},
        "word": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "parts": {"type": "array", "items": {"$ref": "#/components/schemas/Part"}, "maxItems": 4},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
    },
    "required": ["kind"],
    "additionalProperties": False,
}
DOCUMENT: dict[str, Any] = {
    "paths": {
        "/things/{id}": {
            "put": {
                "operationId": "putThing",
                "parameters": [
                    {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}},
                    {"name": "limit", "in": "query", "required": False, "schema": {"type": "integer", "minimum": 1}},
                ],
                "requestBody": {
                    "required": False,
                    "content": {"application/json": {"schema": REQUEST}, "application/octet-stream": {}},
                },
                "responses": {
                    "200": {
                        "headers": {"ETag": {"schema": {"type": "string"}}},
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}},
                    },
                    "404": {"content": {"application/problem+json": {"schema": {"type": "object"}}}},
                },
            }
        }
    },
    "components": {
        "schemas": {
            "Thing": REPLY,
            "Part": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
            "Tree": {"type": "object", "properties": {"child": {"$ref": "#/components/schemas/Tree"}}},
        }
    },
}
OP = "PUT /things/{id}"
BODY = f"{OP}: application/json"
ANSWER = f"{OP}: 200 application/json"


def op(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"]["/things/{id}"]["put"]
    return found


def sent(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = op(document)["requestBody"]["content"]["application/json"]["schema"]
    return found


def told(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["components"]["schemas"]["Thing"]
    return found


def part(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["components"]["schemas"]["Part"]
    return found


PARAMETER = {"name": "all", "in": "query", "schema": {"type": "boolean"}}

# What is changed, and the breaks that it makes.
ROWS: list[tuple[str, Change, list[str]]] = [
    ("nothing", lambda d: None, []),
    ("path gone", lambda d: d["paths"].clear(), [f"{OP}: is gone"]),
    ("operation gone", lambda d: d["paths"]["/things/{id}"].clear(), [f"{OP}: is gone"]),
    ("operation renamed", lambda d: op(d).update(operationId="set"), [f"{OP}: has another operationId"]),
    ("operation added", lambda d: d["paths"]["/things/{id}"].update(get=op(d)), []),
    ("parameter gone", lambda d: op(d)["parameters"].pop(), [f"{OP}: query parameter limit is gone"]),
    ("parameter added", lambda d: op(d)["parameters"].append(PARAMETER), []),
    (
        "required parameter added",
        lambda d: op(d)["parameters"].append({**PARAMETER, "required": True}),
        [f"{OP}: query parameter all is required now"],
    ),
    (
        "parameter required",
        lambda d: op(d)["parameters"][1].update(required=True),
        [f"{OP}: query parameter limit is required now"],
    ),
    (
        "parameter narrowed",
        lambda d: op(d)["parameters"][1]["schema"].update(minimum=2),
        [f"{OP}: query parameter limit: minimum 1 against 2"],
    ),
    ("parameter widened", lambda d: op(d)["parameters"][1]["schema"].pop("minimum"), []),
    ("body gone", lambda d: op(d).pop("requestBody"), [f"{OP}: takes no body any more"]),
    ("body required", lambda d: op(d)["requestBody"].update(required=True), [f"{OP}: the body is required now"]),
    (
        "media type gone",
        lambda d: op(d)["requestBody"]["content"].pop("application/octet-stream"),
        [f"{OP}: takes no application/octet-stream any more"],
    ),
    ("member added", lambda d: sent(d)["properties"].update(new={"type": "string"}), []),
    ("member required", lambda d: sent(d)["required"].append("size"), [f"{BODY}.size: is required now"]),
    ("member optional", lambda d: sent(d)["required"].clear(), []),
    ("member gone", lambda d: sent(d)["properties"].pop("size"), [f"{BODY}.size: is refused now"]),
    ("others allowed", lambda d: sent(d).update(additionalProperties=True), []),
    ("value gone", lambda d: sent(d)["properties"]["kind"]["enum"].pop(), [f"{BODY}.kind: ['b'] besides ['a']"]),
    ("value added", lambda d: sent(d)["properties"]["kind"]["enum"].append("c"), []),
    (
        "values listed",
        lambda d: sent(d)["properties"]["name"].update(enum=["a"]),
        [f"{BODY}.name: any value instead of ['a']"],
    ),
    (
        "one value left",
        lambda d: sent(d)["properties"].update(kind={"type": "string", "const": "a"}),
        [f"{BODY}.kind: ['b'] besides ['a']"],
    ),
    (
        "type changed",
        lambda d: sent(d)["properties"]["size"].update(type="string"),
        [f"{BODY}.size: integer instead of string"],
    ),
    ("type widened", lambda d: sent(d)["properties"]["size"].update(type="number"), []),
    ("one type more", lambda d: sent(d)["properties"]["size"].update(type=["integer", "null"]), []),
    ("upper bound", lambda d: sent(d)["properties"]["size"].update(maximum=7), [f"{BODY}.size: maximum 8 against 7"]),
    ("upper bound raised", lambda d: sent(d)["properties"]["size"].update(maximum=9), []),
    (
        "longest text",
        lambda d: sent(d)["properties"]["name"].update(maxLength=4),
        [f"{BODY}.name: maxLength 5 against 4"],
    ),
    ("pattern", lambda d: sent(d)["properties"]["name"].update(pattern="^b"), [f"{BODY}.name: pattern ^a against ^b"]),
    ("pattern gone", lambda d: sent(d)["properties"]["name"].pop("pattern"), []),
    (
        "branch gone",
        lambda d: sent(d)["properties"]["word"]["anyOf"].pop(),
        [f"{BODY}.word: integer instead of string"],
    ),
    ("branch added", lambda d: sent(d)["properties"]["word"]["anyOf"].append({"type": "null"}), []),
    ("union of one", lambda d: sent(d)["properties"].update(size={"anyOf": [{"type": "integer"}]}), []),
    (
        "values of a map",
        lambda d: sent(d)["properties"]["counts"].update(additionalProperties={"type": "string"}),
        [f"{BODY}.counts.*: integer instead of string"],
    ),
    (
        "a keyword that nobody knows",
        lambda d: sent(d)["properties"]["size"].update(dependentSchemas={}),
        [f"{BODY}.size: changed, with dependentSchemas, which this comparison does not know"],
    ),
    ("described", lambda d: sent(d)["properties"]["size"].update(description="How many.", examples=[1], title="S"), []),
    (
        "in a part",
        lambda d: part(d)["required"].append("m"),
        [f"{BODY}.parts[].m: is required now"],
    ),
    ("part may lack a member", lambda d: part(d)["required"].clear(), [f"{ANSWER}.parts[].n: may be missing"]),
    ("reply gone", lambda d: op(d)["responses"].pop("200"), [f"{OP}: answers no 200 any more"]),
    ("refusal gone", lambda d: op(d)["responses"].pop("404"), []),
    ("refusal added", lambda d: op(d)["responses"].update({"409": {}}), []),
    (
        "header gone",
        lambda d: op(d)["responses"]["200"]["headers"].clear(),
        [f"{OP}: 200 has no header ETag any more"],
    ),
    (
        "reply of another type",
        lambda d: op(d)["responses"]["200"].update(content={"text/plain": {}}),
        [f"{OP}: 200 is no application/json any more"],
    ),
    ("told more", lambda d: told(d)["properties"].update(new={"type": "string"}), []),
    (
        "told less",
        lambda d: (told(d)["properties"].pop("id"), told(d)["required"].remove("id")),
        [f"{ANSWER}.id: is not told any more", f"{ANSWER}.id: may be missing"],
    ),
    ("told sometimes", lambda d: told(d)["required"].remove("id"), [f"{ANSWER}.id: may be missing"]),
    (
        "told otherwise",
        lambda d: told(d)["properties"]["id"].update(type="integer"),
        [f"{ANSWER}.id: integer instead of string"],
    ),
    (
        "null",
        lambda d: told(d)["properties"]["id"].update(type=["string", "null"]),
        [f"{ANSWER}.id: null instead of string"],
    ),
    ("never null", lambda d: told(d)["properties"].update(size={"type": "integer"}), []),
    ("a further value", lambda d: told(d)["properties"]["kind"]["enum"].append("c"), []),
    (
        "any value",
        lambda d: told(d)["properties"]["kind"].pop("enum"),
        [f"{ANSWER}.kind: any value instead of ['a', 'b']"],
    ),
]


@pytest.mark.parametrize(("change", "breaks"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_row(change: Change, breaks: list[str]) -> None:
    after = copy.deepcopy(DOCUMENT)
    change(after)
    assert sorted(Comparison(DOCUMENT, after).breaks()) == sorted(breaks)


def test_places_of_a_list_are_compared_one_by_one() -> None:
    narrowing = Narrowing({}, {}, reply=False)
    number, text = {"type": "integer"}, {"type": "string"}
    pair = {"type": "array", "prefixItems": [number, text]}
    assert list(narrowing.faults(pair, {**pair, "prefixItems": [number, {}]})) == []
    assert list(narrowing.faults(pair, {**pair, "prefixItems": [text, text]}, "at")) == [
        "at[0]: integer instead of string"
    ]
    assert list(narrowing.faults({"type": "array", "items": text}, pair, "at")) == ["at[0]: string instead of integer"]
    assert len(list(narrowing.faults({"type": "array"}, pair))) == 2


def test_a_schema_may_hold_itself() -> None:
    before, after = copy.deepcopy(DOCUMENT), copy.deepcopy(DOCUMENT)
    for document in (before, after):
        told(document)["properties"]["id"] = {"$ref": "#/components/schemas/Tree"}
    after["components"]["schemas"]["Tree"]["properties"]["n"] = {"type": "integer"}
    assert list(Comparison(before, after).breaks()) == []
    assert list(Comparison(after, before).breaks()) == [f"{ANSWER}.id.n: is not told any more"]


def keywords(schema: Any) -> set[str]:
    """Those of a schema and of all schemas in it."""
    if not isinstance(schema, dict):
        return set()
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", []), *schema.get("oneOf", [])]
    inner += [schema.get("items"), schema.get("additionalProperties"), *schema.get("prefixItems", ())]
    return set(schema).union(*map(keywords, inner))


def test_every_keyword_of_the_contract_is_known() -> None:
    """Whatever changes in it, the comparison can tell."""
    assert set().union(*map(keywords, contract().document["components"]["schemas"].values())) <= KNOWN


def test_nothing_is_broken() -> None:
    """Against the last contract in the history, but for what openapi/accepted-breaks.txt accepts."""
    revision = breaking.before()
    document = breaking.committed(revision) if revision else None
    if document is None:
        pytest.skip("the history here has no other contract: not a clone, or too shallow a one")
    assert breaking.found(document) == []
