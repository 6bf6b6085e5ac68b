"""What a change of the contract breaks for clients that were written against the one before.

    python -m tests.contract.breaking [REVISION]

compares openapi/openapi.json with the one that is committed at REVISION: by default with the last one that differs.
What is accepted all the same stands in openapi/accepted-breaks.txt. ``narrowing`` compares the schemas.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.contract.narrowing import ANYTHING, Narrowing
from tests.contract.references import followed

ROOT = Path(__file__).parents[2]
FILE = "openapi/openapi.json"
ACCEPTED = ROOT / "openapi" / "accepted-breaks.txt"


class Comparison:
    """Two documents, before and after; what is shared within them makes no difference."""

    def __init__(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        self._before, self._after = followed(before), followed(after)
        self._requests = Narrowing(before, after, reply=False)
        self._replies_back = Narrowing(after, before, reply=True)

    def breaks(self) -> Iterator[str]:
        """Every break, as a line that says where and what."""
        for path, item in self._before["paths"].items():
            for method, operation in item.items():
                where = f"{method.upper()} {path}"
                there = self._after["paths"].get(path, {}).get(method)
                if there is None:
                    yield f"{where}: is gone"
                    continue
                if operation["operationId"] != there["operationId"]:
                    yield f"{where}: has another operationId"
                yield from self._parameters(where, operation, there)
                yield from self._body(where, operation.get("requestBody"), there.get("requestBody"))
                yield from self._replies(where, operation["responses"], there["responses"])

    def _parameters(self, where: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
        old = {(item["in"], item["name"]): item for item in before.get("parameters", [])}
        new = {(item["in"], item["name"]): item for item in after.get("parameters", [])}
        for place, parameter in new.items():
            known = old.get(place)
            required = parameter.get("required", False)
            if required and (known is None or not known.get("required", False)):
                yield f"{where}: {place[0]} parameter {place[1]} is required now"
        for place, parameter in old.items():
            if place not in new:
                yield f"{where}: {place[0]} parameter {place[1]} is gone"
                continue
            for fault in self._requests.faults(parameter["schema"], new[place]["schema"]):
                yield f"{where}: {place[0]} parameter {place[1]}{fault}"

    def _body(self, where: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> Iterator[str]:
        if before is None:
            if after is not None and after.get("required", False):
                yield f"{where}: a body is required now"
            return
        if after is None:
            yield f"{where}: takes no body any more"
            return
        if after.get("required", False) and not before.get("required", False):
            yield f"{where}: the body is required now"
        for media, content in before["content"].items():
            if media not in after["content"]:
                yield f"{where}: takes no {media} any more"
                continue
            for fault in self._requests.faults(
                content.get("schema", ANYTHING), after["content"][media].get("schema", ANYTHING)
            ):
                yield f"{where}: {media}{fault}"

    def _replies(self, where: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
        for status, reply in before.items():
            there = after.get(status)
            if there is None:
                if status < "400":  # a refusal that does not happen any more harms nobody
                    yield f"{where}: answers no {status} any more"
                continue
            for name in reply.get("headers", {}):
                if name not in there.get("headers", {}):
                    yield f"{where}: {status} has no header {name} any more"
            for media, content in reply.get("content", {}).items():
                if media not in there.get("content", {}):
                    yield f"{where}: {status} is no {media} any more"
                    continue
                new = there["content"][media].get("schema", ANYTHING)
                for fault in self._replies_back.faults(new, content.get("schema", ANYTHING)):
                    yield f"{where}: {status} {media}{fault}"


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def before() -> str | None:
    """The revision of the last contract that differs from the one here; None where the history does not tell."""
    if _git("diff", "--quiet", "HEAD", "--", FILE) is None:
        return "HEAD"
    changed = _git("log", "--first-parent", "-1", "--format=%H", "--", FILE)
    return f"{changed.strip()}^" if changed and changed.strip() else None


def committed(revision: str) -> dict[str, Any] | None:
    """The contract at ``revision``; None where there is none, or the clone is too shallow to have it."""
    shown = _git("show", f"{revision}:{FILE}")
    document: dict[str, Any] | None = None if shown is None else json.loads(shown)
    return document


def accepted() -> list[re.Pattern[str]]:
    """What may break: a regular expression on each line, for the whole line of a break."""
    lines = ACCEPTED.read_text(encoding="utf-8").splitlines()
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def found(document: dict[str, Any]) -> list[str]:
    """What the contract here breaks of ``document``, without what is accepted."""
    here = json.loads((ROOT / FILE).read_text(encoding="utf-8"))
    allowed = accepted()
    breaks = Comparison(document, here).breaks()
    return sorted(line for line in breaks if not any(pattern.fullmatch(line) for pattern in allowed))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contract.breaking", description=__doc__)
    parser.add_argument("revision", nargs="?", help="what to compare with")
    revision = parser.parse_args().revision or before()
    document = committed(revision) if revision else None
    if document is None:
        sys.stdout.write("not compared: the history here has no other contract\n")
        return 0
    breaks = found(document)
    sys.stdout.writelines(f"{line}\n" for line in breaks)
    sys.stdout.write(f"against {revision}: {len(breaks)} breaks\n")
    return 1 if breaks else 0


if __name__ == "__main__":
    sys.exit(main())
