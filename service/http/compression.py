"""Coded replies (RFC 9110 section 12.5.3): gzip or zstd, where the client takes it and it pays.

Codings hide nothing here: an attacker who reads lengths off a wire (BREACH) needs a reply with a secret and words of
his own in it, fetched with the victim's credentials. No reply has a secret in it, and a page of another origin has no
credentials to send: tokens are no cookies.
"""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import Callable, Sequence

import zstandard
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.conditional import entity_tag, not_modified, variant
from service.http.negotiation import qualities

# What fits the first window of TCP (ten segments) arrives in one round trip with or without a coding.
SMALLEST = 14_000
# Coding more than this takes longer than the event loop should be kept from others: gzip 0.3 ms, zstd 0.1.
_INLINE = 1 << 16
_LONGEST = 1000

_TEXTS = (b"application/json", b"application/problem+json", b"text/", b"application/x-ndjson")

# In the order in which they are taken when the client likes them equally. The first function is for what is made for
# one reply: at these levels a page of exit records shrinks to a twelfth in less time than it takes to render. The
# second is for what is kept.
CODINGS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "zstd": (lambda plain: zstandard.compress(plain, 1), lambda plain: zstandard.compress(plain, 15)),
    "gzip": (lambda plain: zlib.compress(plain, 1, 31), lambda plain: zlib.compress(plain, 9, 31)),
}


@functools.lru_cache(maxsize=256)
def coding_for(accepted: str) -> str | None:
    """The coding that Accept-Encoding likes best; None for none, also where it likes that one better."""
    wanted = qualities(accepted)
    rest = wanted.get("*", 0.0)
    best, best_quality = None, 0.0
    for coding in CODINGS:
        quality = wanted.get(coding, wanted.get(f"x-{coding}", rest))
        if quality > best_quality:
            best, best_quality = coding, quality
    return best if best_quality >= wanted.get("identity", 0.0) else None


class Compression:
    """ASGI middleware: codes replies that are whole, textual and large. Others pass as they are.

    The entity tag of a coded reply is one of its own, which ``conditional`` knows as the plain one's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: Message | None = None

        async def sending(message: Message) -> None:
            nonlocal held
            if held is not None:
                start, held = held, None
                if not message.get("more_body", False):
                    start, message = await _coded(scope, start, message)
                await send(start)
            elif message["type"] == "http.response.start":
                if _worth_it(message["headers"]):
                    held = message
                    return
                if message["status"] == 304:
                    message["headers"] = _named_again(scope, message["headers"])
            await send(message)

        await self.app(scope, receive, sending)


def _worth_it(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name == b"content-length":
            # As a number, from our own reply: shorter means less.
            return len(value) >= 5 and int(value) >= SMALLEST and _codable(dict(headers))
    return False


def _codable(headers: dict[bytes, bytes]) -> bool:
    """Whether a reply with these headers is text, and whoever made it has not chosen a coding."""
    chosen = b"content-encoding" in headers or b"Accept-Encoding" in headers.get(b"vary", b"")
    return headers.get(b"content-type", b"").startswith(_TEXTS) and not chosen


async def _coded(scope: Scope, start: Message, message: Message) -> tuple[Message, Message]:
    """The two messages of a whole reply, coded as the request likes."""
    coding = coding_for(accepted_by(scope))
    headers = [*_varying(start["headers"])]
    if coding is None:
        return {**start, "headers": headers}, message
    quickly = CODINGS[coding][0]
    plain = message.get("body", b"")
    body = quickly(plain) if len(plain) <= _INLINE else await asyncio.to_thread(quickly, plain)
    told = {b"content-length": str(len(body)).encode()}
    headers = [
        (name, variant(value.decode("latin-1"), coding).encode("latin-1") if name == b"etag" else told.get(name, value))
        for name, value in headers
    ]
    headers.append((b"content-encoding", coding.encode()))
    return {**start, "headers": headers}, {**message, "body": body}


def accepted_by(scope: Scope) -> str:
    """The Accept-Encoding of a request; empty without one, which stands for whatever the service likes: no coding."""
    given = b",".join(value for name, value in scope["headers"] if name == b"accept-encoding")
    return given.decode("latin-1") if len(given) <= _LONGEST else ""  # what no client sends is not remembered


def _varying(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """``headers`` with Accept-Encoding among the reasons why the reply is as it is."""
    known = [value for name, value in headers if name == b"vary"]
    others = [(name, value) for name, value in headers if name != b"vary"]
    return [*others, (b"vary", b", ".join([*known, b"Accept-Encoding"]))]


def _named_again(scope: Scope, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of a 304 with the tag under which the client has the content, coded or plain: it looks for that."""
    coding = coding_for(accepted_by(scope))
    if coding is None:
        return headers
    given = b",".join(value for name, value in scope["headers"] if name == b"if-none-match").decode("latin-1")

    def known(tag: bytes) -> bytes:
        coded = variant(tag.decode("latin-1"), coding)
        return coded.encode("latin-1") if coded in given else tag

    return [(name, known(value) if name == b"etag" else value) for name, value in headers]


class Kept:
    """A document that stays as it is while the process lives, in the forms that clients asked for."""

    def __init__(self, content: bytes, media: str) -> None:
        self.content = content
        self.media = media
        self.tag = entity_tag(content)
        self._coded: dict[str, bytes] = {}

    async def reply(self, request: Request, headers: dict[str, str] | None = None) -> Response:
        """The document as ``request`` wants it, or 304. It is coded once, in a thread, and then remembered."""
        told = {"ETag": self.tag, "Vary": "Accept-Encoding", **(headers or {})}
        if not_modified(request, self.tag):
            return Response(status_code=304, headers=told)
        coding = coding_for(accepted_by(request.scope)) if self._shrinks else None
        if coding is None:
            return Response(self.content, media_type=self.media, headers=told)
        if coding not in self._coded:
            self._coded[coding] = await asyncio.to_thread(CODINGS[coding][1], self.content)
        told |= {"ETag": variant(self.tag, coding), "Content-Encoding": coding}
        return Response(self._coded[coding], media_type=self.media, headers=told)

    @property
    def _shrinks(self) -> bool:
        return len(self.content) >= SMALLEST and self.media.encode().startswith(_TEXTS)
