"""The Prefer header (RFC 7240): what a client would like, and the service may do."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.http.wire_types import decimal

# RFC 9110 section 5.6.2.
_TOKEN = frozenset(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~")
_LONGEST_WAIT = 999_999_999


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
        for item in _split(header, ","):
            # None of ours has parameters: those after a semicolon are nothing to the service.
            preference = next(_split(item, ";"), "")
            name, equals, value = (part.strip() for part in preference.partition("="))
            word = _plain(value) if equals else ""
            if name and _TOKEN.issuperset(name) and word is not None:
                known.setdefault(name.lower(), word)
    seconds = decimal(known.get("wait", ""), most=_LONGEST_WAIT)
    return Preferences("respond-async" in known, None if seconds is None else float(seconds))


def _split(text: str, mark: str) -> Iterator[str]:
    """The parts of ``text`` between ``mark``; one in quotes does not count unless the quotes have no end.

    Each character is seen twice at most.
    """
    begin, at, quoted = 0, 0, False
    while at < len(text):
        character = text[at]
        if quoted and character == "\\":
            at += 1
        elif character == '"':
            quoted = not quoted
        elif character == mark and not quoted:
            yield text[begin:at]
            begin = at + 1
        at += 1
    yield from text[begin:].split(mark) if quoted else (text[begin:],)


def _plain(word: str) -> str | None:
    """A value without its quotes; None for what is neither a token nor a quoted string."""
    if not word.startswith('"'):
        return word if _TOKEN.issuperset(word) else None
    plain, at = [], 1
    while at < len(word) and word[at] != '"':
        at += word[at] == "\\"
        plain.append(word[at : at + 1])
        at += 1
    return "".join(plain) if at == len(word) - 1 else None


def applied(*, respond_async: bool = False, wait: float | None = None) -> dict[str, str]:
    """The Preference-Applied header of a reply; none where nothing was applied."""
    told = ["respond-async"] if respond_async else []
    if wait is not None:
        told.append(f"wait={wait:g}" if wait < 1e6 else f"wait={int(wait)}")
    return {"Preference-Applied": ", ".join(told)} if told else {}
