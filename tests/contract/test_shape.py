"""The committed contract as a person reads it: short, nothing said twice, everything described."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from service.contract.shared import PARAMETERS
from tests.contract.client import CONTRACT, contract

DOCUMENT = contract().committed
OPERATIONS = [operation for item in DOCUMENT["paths"].values() for operation in item.values()]
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def repeated(parts: Iterator[Any]) -> list[str]:
    """Those that stand there in full, and more than once."""
    seen = Counter(json.dumps(part, sort_keys=True) for part in parts if "$ref" not in part)
    return [text for text, times in seen.items() if times > 1]


def test_size() -> None:
    text = CONTRACT.read_text(encoding="utf-8")
    assert text.count("\n") <= 15_000 and len(text.encode()) <= 533_000
    assert max(map(len, text.splitlines())) < 2_500


def test_nothing_is_said_twice() -> None:
    replies = [reply for operation in OPERATIONS for reply in operation["responses"].values()]
    everywhere = [*replies, *DOCUMENT["components"]["responses"].values()]
    assert repeated(iter(replies)) == []
    assert repeated(item for operation in OPERATIONS for item in operation.get("parameters", ())) == []
    assert repeated(header for reply in everywhere for header in reply.get("headers", {}).values()) == []
    assert all("$ref" in reply for op in OPERATIONS for status, reply in op["responses"].items() if status >= "400")


def test_all_that_is_shared_is_used() -> None:
    text = CONTRACT.read_text(encoding="utf-8")
    shared = {kind: parts for kind, parts in DOCUMENT["components"].items() if kind != "securitySchemes"}
    assert [
        f"{kind}/{name}" for kind, parts in shared.items() for name in parts if f'/{kind}/{name}"' not in text
    ] == []
    assert set(PARAMETERS.values()) <= set(DOCUMENT["components"]["parameters"])


def titles(part: Any) -> Iterator[str]:
    """Titles of schemas: text, where a member of that name is a schema itself."""
    if isinstance(part, dict):
        if isinstance(part.get("title"), str):
            yield part["title"]
        for name, member in part.items():
            if name not in ("example", "examples"):
                yield from titles(member)
    elif isinstance(part, list):
        for member in part:
            yield from titles(member)


def test_no_title_is_made_of_a_name() -> None:
    assert list(titles(DOCUMENT["components"]["schemas"])) == list(titles(DOCUMENT["paths"])) == []


def test_every_property_is_described() -> None:
    members = ((name, schema.get("properties", {})) for name, schema in SCHEMAS.items())
    silent = [f"{name}.{member}" for name, of in members for member, told in of.items() if not told.get("description")]
    assert silent == []
    assert [name for name, schema in SCHEMAS.items() if not schema.get("description")] == []
