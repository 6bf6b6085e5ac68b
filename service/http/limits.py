"""Limits that hold before a route reads its body: size, coding, and how long it may take to arrive."""

from __future__ import annotations

import asyncio
import types
from collections import Counter
from collections.abc import Coroutine, Generator, Mapping
from functools import partial
from typing import Any, cast

from starlette.types import Message, Receive, Scope

from service.http.codings import ACCEPTED, CODINGS, decoded
from service.http.wire_types import decimal
from service.problems import BodyTooLarge, BodyTooSlow, UnsupportedMediaType
from service.runtime.shares import ShareExceeded
from service.settings import Settings

# The body of any other method is never read.
WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

# Bodies up to this size are not counted among those that are held.
_SMALL = 1 << 16


class HeldBodies:
    """Bytes of the bodies that are in memory whole, until their requests have ended: in all and of each tenant."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: Counter[str] = Counter()

    def take(self, tenant: str, size: int) -> None:
        """Raises ShareExceeded beyond half of the limit for one tenant, beyond the whole for all of them."""
        if self._held[tenant] + size > self._limit // 2:
            raise self._exceeded(self._limit // 2, "tenant", "this tenant, which may have half of what there is")
        if self._held.total() + size > self._limit:
            raise self._exceeded(self._limit, "service", "all tenants")
        self._held[tenant] += size

    def give_back(self, tenant: str, size: int) -> None:
        self._held[tenant] -= size
        if not self._held[tenant]:
            del self._held[tenant]

    def _exceeded(self, most: int, whose: str, who: str) -> ShareExceeded:
        rule = f"at most {most} bytes of bodies may be held at one time for {who}: try again"
        return ShareExceeded(rule, field="max_held_body_bytes", value=most, whose=whose)


class Held:
    """What one request holds of them."""

    def __init__(self, bodies: HeldBodies, tenant: str) -> None:
        self._bodies, self._tenant = bodies, tenant
        self._size = 0

    def grow(self, size: int) -> None:
        """Its body has ``size`` bytes by now. Raises ShareExceeded."""
        if size > _SMALL:
            self._bodies.take(self._tenant, size - self._size)
            self._size = size

    def release(self) -> None:
        if self._size:
            self._bodies.give_back(self._tenant, self._size)
            self._size = 0


def bounded(
    scope: Scope, receive: Receive, headers: Mapping[bytes, bytes], settings: Settings, held: Held | None = None
) -> Receive:
    """``receive`` within the limits of the call, and decoded; the limit holds before and after that.

    A declared length over the limit is refused here and unread, an undeclared one where it passes it: raises
    BodyTooLarge, or UnsupportedMediaType for a coding that is not read. ``held`` learns how long the decoded body is
    where it is read whole, which is everywhere but in traces and memory images.
    """
    declared = headers.get(b"content-length")
    if (declared is None or declared == b"0") and b"transfer-encoding" not in headers:
        return receive
    if _published(scope):
        return _alive(receive, headers, settings)
    limit = limit_of(scope, settings)
    if declared is not None and decimal(declared.decode("latin-1"), most=limit) is None:
        raise _too_large(limit)
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
    if coding != "identity" and coding not in CODINGS:
        rule, accepted = f"must be one of {ACCEPTED}", {"Accept-Encoding": ACCEPTED}
        raise UnsupportedMediaType(rule, field="Content-Encoding", value=coding, headers=accepted)
    arriving = punctual(receive, settings.body_timeout, settings.body_rate) if settings.body_timeout else receive
    if coding == "identity" and b"transfer-encoding" not in headers and int(declared or b"0") <= _SMALL:
        return arriving  # which is as long as the server's parser was told, and not counted
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await arriving()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_large(limit)
        return message

    whole = counted if coding == "identity" else decoded(counted, coding, limit, sparse=_image(scope))
    return whole if held is None or _streamed(scope) else _kept(whole, held)


def _published(scope: Scope) -> bool:
    """Whether it is a trace that is published while it comes: it may be as long as a guest runs."""
    return _trace(scope) and _has_parameter(scope, b"publish_every")


def _alive(receive: Receive, headers: Mapping[bytes, bytes], settings: Settings) -> Receive:
    """``receive`` that waits for each piece of the body, whose length has no limit, as long as for other bodies."""
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
    if coding != "identity":
        rule = "must be identity where a trace is published while it comes: what is packed comes in pieces of any size"
        raise UnsupportedMediaType(
            rule, field="Content-Encoding", value=coding, headers={"Accept-Encoding": "identity"}
        )
    seconds, ended = settings.body_timeout, False

    async def waiting() -> Message:
        nonlocal ended
        if ended or not seconds:
            return await receive()
        try:
            async with asyncio.timeout(seconds):
                message = await receive()
        except TimeoutError:
            rule = f"must send something every {seconds:g} seconds; an empty batch is a sign of life"
            raise BodyTooSlow(rule) from None
        ended = not message.get("more_body", False)
        return message

    return waiting


def _kept(receive: Receive, held: Held) -> Receive:
    size = 0

    async def growing() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        held.grow(size)
        return message

    return growing


def _streamed(scope: Scope) -> bool:
    """Whether the body is taken piece by piece: it is a trace or a memory image."""
    return _accesses(scope) or _image(scope)


def _trace(scope: Scope) -> bool:
    return bool(scope["method"] == "POST" and scope["path"].endswith("/traces"))


def _accesses(scope: Scope) -> bool:
    """Whether it is a trace, replayed or reduced to a footprint."""
    return _trace(scope) or bool(scope["method"] == "POST" and scope["path"] == "/v1/footprints")


def _memory(scope: Scope) -> bool:
    return bool(scope["method"] == "PUT" and scope["path"].endswith("/memory"))


def _image(scope: Scope) -> bool:
    """Whether it is guest memory that says what format it has."""
    return _memory(scope) and _has_parameter(scope, b"format")


def _has_parameter(scope: Scope, name: bytes) -> bool:
    """Whether the query has one of that name, whatever its value."""
    return any(part.startswith(name + b"=") for part in scope["query_string"].split(b"&"))


def punctual(receive: Receive, seconds: float, rate: int) -> Receive:
    """``receive`` that waits for a body ``seconds`` in all, and one more for each ``rate`` bytes of it.

    Only waiting counts, not the time in which nobody wants more of the body. Reading raises BodyTooSlow.
    """
    left, ended = seconds, False

    async def waiting() -> Message:
        nonlocal left, ended
        if ended:
            return await receive()  # watching for the client to leave takes as long as it takes
        arriving = _arriving(receive)
        try:
            suspended = arriving.send(None)
        except StopIteration as here:
            message: Message = here.value
        else:
            clock = asyncio.get_running_loop().time
            began = clock()
            try:
                async with asyncio.timeout(left):
                    message = await _go_on(arriving, suspended)
            except TimeoutError:
                rule = f"must arrive within {seconds:g} seconds and one more for each {rate} bytes"
                raise BodyTooSlow(rule) from None
            left -= clock() - began
        left += len(message.get("body", b"")) / rate
        ended = not message.get("more_body", False)
        return message

    return waiting


async def _arriving(receive: Receive) -> Message:
    return await receive()


@types.coroutine
def _go_on(begun: Coroutine[Any, Any, Message], suspended: Any) -> Generator[Any, Any, Message]:
    """Await the rest of a coroutine that was begun by ``send``, which gave ``suspended``.

    Most bodies are here when they are asked for: a limit on the time that this takes would take more than the rest.
    """
    while True:
        try:
            sent = yield suspended
        except BaseException as error:  # noqa: BLE001 - given on
            resume = partial(begun.throw, error)
        else:
            resume = partial(begun.send, sent)
        try:
            suspended = resume()
        except StopIteration as done:
            return cast(Message, done.value)


def limit_of(scope: Scope, settings: Settings) -> int:
    """The largest body of this call in bytes."""
    if _accesses(scope):
        return settings.max_body_bytes
    if _image(scope):
        return settings.max_image_bytes
    if _memory(scope):
        return settings.max_memory_window
    return settings.max_document_bytes


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"must be at most {limit} bytes", field="body")
