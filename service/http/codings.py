"""Coded request bodies (RFC 9110 section 8.4), decoded while they arrive and never past the limit of the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from starlette.types import Message, Receive

from engine.trace.columns import MalformedBody
from engine.trace.compressed import FAULTS, PIECE, Decoder, Gzip, Zstandard, too_much
from service.problems import BodyTooLarge, ServiceError

CODINGS: dict[str, Callable[[], Decoder]] = {"gzip": Gzip, "x-gzip": Gzip, "zstd": Zstandard}
ACCEPTED = "gzip, zstd, identity"


def decoded(receive: Receive, coding: str, limit: int, *, sparse: bool = False) -> Receive:
    """``receive`` with the body decoded.

    Reading raises BodyTooLarge past ``limit`` bytes or, unless it is ``sparse`` (zeros for the most part, which nobody
    keeps), what so many bytes may become, and ``malformed-body`` where the
    body is not what its coding says.
    """
    decoder = CODINGS[coding]()
    pieces: Iterator[bytes] = iter(())
    seen, sent, last, done = 0, 0, False, False

    async def reading() -> Message:
        nonlocal pieces, seen, sent, last, done
        while not done:
            try:
                # Not by the event loop: zstd lets the GIL go for each 128 KiB, and each time waits for those who count.
                piece = await asyncio.to_thread(_gathered, pieces)
            except FAULTS as fault:
                raise _malformed(coding) from fault
            except MalformedBody as fault:
                raise ServiceError(fault.rule, field="body", code="malformed-body") from fault
            if piece:
                seen += len(piece)
                if seen > limit:
                    raise BodyTooLarge(f"must be at most {limit} bytes when decoded", field="body")
                if not sparse and (rule := too_much(seen, sent)) is not None:
                    raise BodyTooLarge(rule, field="body")
                return {"type": "http.request", "body": piece, "more_body": True}
            if last:
                if not decoder.complete:
                    raise _malformed(coding)
                done = True
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await receive()
            if message["type"] != "http.request":
                return message
            sent += len(message.get("body", b""))
            pieces = decoder.feed(message.get("body", b""))
            last = not message.get("more_body", False)
        return await receive()

    return reading


def _gathered(pieces: Iterator[bytes]) -> bytes:
    """The next of them, together about ``PIECE`` bytes; empty at their end."""
    parts, size = list[bytes](), 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= PIECE:
            break
    return b"".join(parts)


def _malformed(coding: str) -> ServiceError:
    return ServiceError(f"must be a complete {coding} stream", field="body", code="malformed-body")
