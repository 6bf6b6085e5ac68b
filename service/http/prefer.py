"""The Prefer header (RFC 7240): what a client would like, and the service may do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = r'(?:[!#$%&\'*+.^_`|~0-9A-Za-z-]+|"(?:[^"\\]|\\.)*")'
# A preference up to its parameters, which none of ours has; the comma before the next one.
_PREFERENCE = re.compile(
    rf'\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*({_WORD})?)?((?:\s*;(?:[^,"]|"(?:[^"\\]|\\.)*")*)?)\s*(?:,|$)'
)


@dataclass(frozen=True, slots=True)
class Preferences:
    """``wait`` is in seconds, None where it was not asked for."""

    respond_async: bool = False
    wait: float | None = None

    @property
    def any(self) -> bool:
        return self.respond_async or self.wait is not None


def preferences(headers: Sequence[str]) -> Preferences:
    """Those of a request's Prefer headers that the service knows.

    Of a preference given several times the first counts (section 2); what is not understood, a ``wait`` that is no
    number of seconds included, is as if it were not there.
    """
    known: dict[str, str] = {}
    for header in headers:
        for name, value in _items(header):
            known.setdefault(name, value)
    wait = known.get("wait", "")
    seconds = float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 10 else None
    return Preferences("respond-async" in known, seconds)


def _items(header: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(header):
        match = _PREFERENCE.match(header, position)
        if match is None:
            following = header.find(",", position)
            if following < 0:
                break
            position = following + 1
            continue
        found.append((match[1].lower(), _plain(match[2] or "")))
        position = match.end()
    return found


def _plain(word: str) -> str:
    """A value without its quotes."""
    return re.sub(r"\\(.)", r"\1", word[1:-1]) if word.startswith('"') else word


def applied(*, respond_async: bool = False, wait: float | None = None) -> dict[str, str]:
    """The Preference-Applied header of a reply; none where nothing was applied."""
    told = ["respond-async"] if respond_async else []
    if wait is not None:
        told.append(f"wait={wait:g}" if wait < 1e6 else f"wait={int(wait)}")
    return {"Preference-Applied": ", ".join(told)} if told else {}
