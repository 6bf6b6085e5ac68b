"""Is there a value that one JSON Schema allows and another one does not?

Asked forwards of requests: what was allowed must stay allowed. Asked backwards of replies: what they say now must be
something that they might have said, but for members that are new and for values that a list of them has gained, both of
which are for clients to expect; and members that were always there must be there still.

Descriptions, examples, titles and defaults say nothing about what is allowed. The comparison knows the keywords that
the contract uses (``KNOWN``); any other one in a schema that has changed counts as a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any] | bool

# Keywords that say nothing about what is allowed.
SILENT = frozenset(
    {"title", "description", "examples", "example", "default", "deprecated", "format", "discriminator", "writeOnly"}
)
# (keyword, the one that is stricter of two values)
LOWER_BOUNDS = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
UPPER_BOUNDS = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
# Any change of these counts.
FIXED = ("pattern", "multipleOf", "uniqueItems", "contentEncoding", "contentMediaType")
SHAPES = ("type", "enum", "const", "anyOf", "oneOf", "items", "properties", "required", "additionalProperties", "$ref")
TUPLES = ("prefixItems",)
# Keywords that bind values of some types only.
_NUMBERS, _TEXT, _LIST, _OBJECT = ("integer", "number"), ("string",), ("array",), ("object",)
OF_TYPES = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"), _NUMBERS),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "contentEncoding", "contentMediaType"), _TEXT),
    **dict.fromkeys(("minItems", "maxItems", "uniqueItems", "items", "prefixItems"), _LIST),
    **dict.fromkeys(("minProperties", "maxProperties", "properties", "required", "additionalProperties"), _OBJECT),
}
KNOWN = SILENT.union(LOWER_BOUNDS, UPPER_BOUNDS, FIXED, SHAPES, TUPLES)

ANYTHING: Schema = {}
ALL_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
Seen = frozenset[tuple[str, str]]


class Narrowing:
    """Schemas of the document ``old`` against schemas of the document ``new``.

    With ``reply`` the documents are the other way round: ``old`` is what the service says now.
    """

    def __init__(self, old: dict[str, Any], new: dict[str, Any], *, reply: bool) -> None:
        self._old, self._new, self._reply = old, new, reply

    def faults(self, old: Schema, new: Schema, at: str = "", seen: Seen = frozenset()) -> Iterator[str]:
        """Why ``new`` refuses something that ``old`` allows; nothing when it does not."""
        if old == new and not _refers(old):
            return
        pair = (json.dumps(old, sort_keys=True), json.dumps(new, sort_keys=True))
        if pair in seen or new is True or new == ANYTHING or old is False:
            return
        seen |= {pair}
        old, new = _resolved(self._old, old), _resolved(self._new, new)
        if isinstance(old, bool) or isinstance(new, bool):
            yield f"{at}: is refused now"
            return
        unknown = sorted({*old, *new} - KNOWN)
        if unknown and _plain(old) != _plain(new):
            yield f"{at}: changed, with {', '.join(unknown)}, which this comparison does not know"
            return
        branches, others = _branches(old), _branches(new)
        if len(branches) > 1 or len(others) > 1:
            for branch in branches:
                tried = [list(self.faults(branch, other, at, seen)) for other in others]
                if all(tried):
                    # What is nearest to it: of its type, if one is.
                    of_type = [
                        faults for faults, other in zip(tried, others, strict=True) if _types(branch) & _types(other)
                    ]
                    yield min(of_type or tried, key=len)[0]
            return
        yield from self._scalars(old, new, at)
        if "items" in new:
            yield from self.faults(old.get("items", ANYTHING), new["items"], f"{at}[]", seen)
        for position in range(max(len(_prefix(old)), len(_prefix(new)))):
            yield from self.faults(_item(old, position), _item(new, position), f"{at}[{position}]", seen)
        yield from self._members(old, new, at, seen)

    def _scalars(self, old: dict[str, Any], new: dict[str, Any], at: str) -> Iterator[str]:
        lost = _types(old) - _types(new)
        if "number" in _types(new):
            lost -= {"integer"}
        if lost:
            yield f"{at}: {', '.join(sorted(lost))} instead of {', '.join(sorted(_types(new)))}"
            return
        values, allowed = _values(old), _values(new)
        if allowed is not None and values is None:
            yield f"{at}: any value instead of {allowed}"
        elif allowed is not None and values is not None and not self._reply:
            gone = [value for value in values if value not in allowed]
            if gone:
                yield f"{at}: {gone} besides {allowed}"
        for keyword in LOWER_BOUNDS:
            if keyword in new and (keyword not in old or old[keyword] < new[keyword]):
                yield f"{at}: {keyword} {old.get(keyword)} against {new[keyword]}"
        for keyword in UPPER_BOUNDS:
            if keyword in new and (keyword not in old or old[keyword] > new[keyword]):
                yield f"{at}: {keyword} {old.get(keyword)} against {new[keyword]}"
        for keyword in FIXED:
            if keyword in new and old.get(keyword) != new[keyword] and values is None:
                yield f"{at}: {keyword} {old.get(keyword)} against {new[keyword]}"

    def _members(self, old: dict[str, Any], new: dict[str, Any], at: str, seen: Seen) -> Iterator[str]:
        if "object" not in _types(old) & _types(new):
            return
        for name in new.get("required", []):
            if name not in old.get("required", []):
                yield f"{at}.{name}: may be missing" if self._reply else f"{at}.{name}: is required now"
        had, has = old.get("properties", {}), new.get("properties", {})
        rest, others = old.get("additionalProperties", True), new.get("additionalProperties", True)
        for name, member in had.items():
            if name in has or not self._reply:
                yield from self.faults(member, has.get(name, others), f"{at}.{name}", seen)
        if not self._reply:
            yield from self.faults(rest, others, f"{at}.*", seen)
            return
        for name in has.keys() - had.keys():
            yield f"{at}.{name}: is not told any more"
        if isinstance(rest, dict):
            yield from self.faults(rest, others, f"{at}.*", seen)


def _refers(schema: Any) -> bool:
    if isinstance(schema, dict):
        return "$ref" in schema or any(map(_refers, schema.values()))
    return isinstance(schema, list) and any(map(_refers, schema))


def _resolved(document: dict[str, Any], schema: Schema) -> Schema:
    while isinstance(schema, dict) and "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    return {keyword: value for keyword, value in schema.items() if keyword not in SILENT}


def _branches(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What a value may be, one schema for each: those of a union, or the types of a list of them."""
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return [{key: schema[key] for key in schema if _is_of(key, kind)} | {"type": kind} for kind in kinds]
    return schema.get("anyOf") or schema.get("oneOf") or [schema]


def _is_of(keyword: str, kind: str) -> bool:
    """Whether ``keyword`` says something of values of type ``kind``."""
    return kind in OF_TYPES.get(keyword, (kind,))


def _prefix(schema: dict[str, Any]) -> list[Schema]:
    found: list[Schema] = schema.get("prefixItems", [])
    return found


def _item(schema: dict[str, Any], position: int) -> Schema:
    """What is at a place of a list."""
    prefix = _prefix(schema)
    found: Schema = prefix[position] if position < len(prefix) else schema.get("items", ANYTHING)
    return found


def _types(schema: dict[str, Any]) -> frozenset[str]:
    kind = schema.get("type")
    if kind is None:
        return ALL_TYPES
    return frozenset({kind} if isinstance(kind, str) else kind)


def _values(schema: dict[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")
