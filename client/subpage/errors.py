"""What goes wrong, in one tree. The text of each is a sentence that can be shown to people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Error(Exception):
    """Everything that the client raises on purpose."""


class Unreachable(Error):
    """There was no answer: no service, no such host, a connection that was lost, silence.
    ``unsent``: the request cannot have arrived."""

    def __init__(self, text: str, *, unsent: bool = False) -> None:
        super().__init__(text)
        self.unsent = unsent


class Untrusted(Unreachable):
    """TLS failed: the certificate does not verify, or the other side does not speak it."""


class NotSubpage(Error):
    """Something answers at that URL, and it is not Subpage; or the URL is none."""


class StreamBroken(Error):
    """A stream ended before its end."""


class TooLarge(Error):
    """A reply is larger than the client takes; ``Client(most_bytes=…)`` says how much that is."""


class BadInput(Error, ValueError):
    """What was given cannot be sent: a file that is none, a trace of no known kind."""


class NotInstalled(Error, ImportError):
    """A library that the call needs is not installed; the text says which extra has it."""


class Interrupted(Error):
    """A job was cancelled, or the service ended before it did. ``state`` says which; the machine is as it was."""

    def __init__(self, text: str, state: str) -> None:
        super().__init__(text)
        self.state = state


class VersionMismatch(UserWarning):
    """The service is of another version than the client. Told once for each service."""


class Problem(Error):
    """A refusal of the service (RFC 9457). What was refused has changed nothing, unless ``resume_at`` is there.

    ``status`` and ``code`` say what kind it is; ``field``, ``value`` and ``rule`` what was wrong with which input;
    ``errno`` what the kernel would answer; ``document`` has every member. Example::

        >>> try:
        ...     vm.subpages(1 << 60)
        ... except Problem as problem:
        ...     problem.status, problem.code, problem.field
        (422, 'invalid-value', 'gfn')
    """

    def __init__(self, document: Mapping[str, Any], status: int, retry_after: float | None = None) -> None:
        self.document, self.status, self.retry_after = dict(document), status, retry_after
        self.code = str(document.get("code", "unknown"))
        self.title = str(document.get("title", ""))
        self.detail = str(document.get("detail", "no reason given"))
        self.field: str | None = document.get("field")
        self.value: Any = document.get("value")
        self.rule: str | None = document.get("rule")
        self.errno: str | None = document.get("errno")
        self.index: int | None = document.get("index")
        self.limit: str | None = document.get("limit")
        self.resume_at: int | None = document.get("resume_at")
        self.errors: list[dict[str, Any]] = document.get("errors") or []
        super().__init__(document, status)

    def __str__(self) -> str:
        where = f" at record {self.index}" if self.index is not None else ""
        return f"{self.title or self.status}{where}: {self.detail}"


class NotFound(Problem):
    """404: it does not exist, or is another tenant's."""


class Unauthenticated(Problem):
    """401: a token is needed, and none that is valid was given."""

    def __str__(self) -> str:
        return f"{super().__str__()}; Client(url, token) takes a token, `subpage token create` makes one"


class Forbidden(Problem):
    """403: the scope of the token does not include the call."""


_KINDS: Mapping[int, type[Problem]] = {401: Unauthenticated, 403: Forbidden, 404: NotFound}


def parsed(data: bytes | str) -> Any:
    """The document in ``data``; None where it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def problem_of(document: Mapping[str, Any], status: int, retry_after: float | None = None) -> Problem:
    """The problem of a document."""
    return _KINDS.get(status, Problem)(document, status, retry_after)


def refusal(url: str, status: int, headers: Mapping[str, str], content: bytes) -> Error:
    """What a reply with an error status says."""
    document = parsed(content)
    if not isinstance(document, dict) or "code" not in document:
        return NotSubpage(f"{url} answers {status}, and not as Subpage does: is that where the service is?")
    after = headers.get("retry-after", "")
    return problem_of(document, status, float(after) if after.isdecimal() and len(after) < 6 else None)
