"""Limits that hold before a route reads its body: size, coding, and how long it may take to arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Message, Receive, Scope

from service.http.codings import ACCEPTED, CODINGS, decoded
from service.http.words import decimal
from service.problems import BodyTooLarge, BodyTooSlow, UnsupportedMediaType
from service.settings import Settings

# The body of any other method is never read.
WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


def bounded(scope: Scope, receive: Receive, headers: Mapping[bytes, bytes], settings: Settings) -> Receive:
    """``receive`` within the limits of the call, and decoded; the limit holds before and after that.

    A declared length over the limit is refused here and unread, an undeclared one where it passes it: raises
    BodyTooLarge, or UnsupportedMediaType for a coding that is not read.
    """
    declared = headers.get(b"content-length")
    if (declared is None or declared == b"0") and b"transfer-encoding" not in headers:
        return receive
    limit = limit_of(scope, settings)
    if declared is not None and decimal(declared.decode("latin-1"), most=limit) is None:
        raise _too_large(limit)
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
    if coding != "identity" and coding not in CODINGS:
        rule, accepted = f"must be one of {ACCEPTED}", {"Accept-Encoding": ACCEPTED}
        raise UnsupportedMediaType(rule, field="Content-Encoding", value=coding, headers=accepted)
    arriving = punctual(receive, settings.body_timeout, settings.body_rate) if settings.body_timeout else receive
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await arriving()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_large(limit)
        return message

    return counted if coding == "identity" else decoded(counted, coding, limit)


def punctual(receive: Receive, seconds: float, rate: int) -> Receive:
    """``receive`` that waits for a body ``seconds`` in all, and one more for each ``rate`` bytes of it.

    Only waiting counts, not the time in which nobody wants more of the body. Reading raises BodyTooSlow.
    """
    left, ended = seconds, False

    async def waiting() -> Message:
        nonlocal left, ended
        if ended:
            return await receive()  # watching for the client to leave takes as long as it takes
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            async with asyncio.timeout(left):
                message = await receive()
        except TimeoutError:
            rule = f"must arrive within {seconds:g} seconds and one more for each {rate} bytes"
            raise BodyTooSlow(rule) from None
        left += len(message.get("body", b"")) / rate - (clock() - began)
        ended = not message.get("more_body", False)
        return message

    return waiting


def limit_of(scope: Scope, settings: Settings) -> int:
    """The largest body of this call in bytes."""
    match scope["method"], scope["path"].rpartition("/")[2]:
        case "POST", "traces":
            return settings.max_body_bytes
        case "PUT", "memory":
            return settings.max_memory_window
        case _:
            return settings.max_document_bytes


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"must be at most {limit} bytes", field="body")
