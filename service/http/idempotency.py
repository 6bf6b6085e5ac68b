"""Idempotency-Key: a POST that is sent again because its answer was lost is answered again, not done again.

A key belongs to the token that used it. The same key with the same request gets the answer that was given; with another
request it is refused; while the first one runs it has to wait. Answers that say to try again are not kept.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import LimitExceeded
from service.problems import IdempotencyInProgress, IdempotencyMismatch, InvalidDocument, ServiceError
from service.security.access import Principal

_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
# Refused before the call was tried, or worth trying again.
_NOT_KEPT = frozenset({401, 403, 406, 408, 413, 415, 429, 499})
_OVERHEAD = 512

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered, and ``fingerprint``, the hash of the request that it answered."""

    fingerprint: bytes
    status: int
    headers: Headers
    body: bytes

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.body) + sum(len(name) + len(value) for name, value in self.headers) + _OVERHEAD


class Answers(Protocol):
    """Where answers are kept. One process at a time uses them, so nobody else adds one meanwhile."""

    async def find(self, owner: str, key: str) -> Answer | None:
        """The answer under ``key``, unless it is too old."""

    async def keep(self, owner: str, key: str, answer: Answer) -> None:
        """Keep it from now on."""

    async def used(self, owner: str) -> int:
        """Bytes that the answers of ``owner`` take."""


class MemoryAnswers:
    """Answers for as long as the process lives, ``seconds`` each."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._answers: dict[tuple[str, str], tuple[float, Answer]] = {}  # in the order of their end
        self._used: dict[str, int] = {}

    def _forget_old(self) -> None:
        now = self._clock()
        while self._answers:
            owner, key = next(iter(self._answers))
            until, answer = self._answers[owner, key]
            if now < until:
                return
            del self._answers[owner, key]
            self._used[owner] -= answer.size
            if not self._used[owner]:
                del self._used[owner]

    async def find(self, owner: str, key: str) -> Answer | None:
        self._forget_old()
        _, answer = self._answers.get((owner, key), (0.0, None))
        return answer

    async def keep(self, owner: str, key: str, answer: Answer) -> None:
        self._forget_old()
        self._answers[owner, key] = (self._clock() + self._seconds, answer)
        self._used[owner] = self._used.get(owner, 0) + answer.size

    async def used(self, owner: str) -> int:
        self._forget_old()
        return self._used.get(owner, 0)


class _Hashed:
    """``receive``, with everything that passes hashed."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        media = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        self._receive = receive
        self._hash = hashlib.blake2b(digest_size=32)
        for part in (scope["path"].encode("utf-8", "surrogateescape"), scope["query_string"], media):
            self._hash.update(len(part).to_bytes(8, "little") + part)
        self.ended = False
        self.gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._hash.update(message.get("body", b""))
            self.ended = not message.get("more_body", False)
        else:
            self.gone = True
        return message

    async def fingerprint(self) -> bytes | None:
        """The hash of the whole request, whose rest is read first; None when that has no proper end."""
        try:
            while not (self.ended or self.gone):
                await self.receive()
        except ServiceError:
            return None
        return self._hash.digest() if self.ended else None


class Idempotency:
    """The keys of one application: those of requests under way, and the kept answers."""

    def __init__(self, answers: Answers, most_bytes: int) -> None:
        self.answers = answers
        self._most_bytes = most_bytes
        self._running: set[tuple[str, str]] = set()

    async def once(self, given: bytes, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run ``app`` unless the answer under the key ``given`` is known.

        Raises InvalidDocument for what is no key, IdempotencyInProgress (409), IdempotencyMismatch (422), or
        LimitExceeded (429) when the owner keeps too many answers already.
        """
        name = given.strip()
        if len(name) > 2 and name[:1] == name[-1:] == b'"':
            name = name[1:-1]
        if not _KEY.fullmatch(name):
            rule = "must be 1 to 255 visible ASCII characters"
            raise InvalidDocument(rule, field="Idempotency-Key", value=given.decode("latin-1"))
        principal: Principal = scope["principal"]
        owner, key = f"{principal.tenant}/{principal.token}", name.decode("ascii")
        if (owner, key) in self._running:
            rule = "names a request that is still under way; try again"
            raise IdempotencyInProgress(rule, field="Idempotency-Key", value=key)
        self._running.add((owner, key))
        try:
            await self._once(owner, key, app, scope, _Hashed(scope, receive), send)
        finally:
            self._running.discard((owner, key))

    async def _once(self, owner: str, key: str, app: ASGIApp, scope: Scope, request: _Hashed, send: Send) -> None:
        known = await self.answers.find(owner, key)
        if known is not None:
            if await request.fingerprint() != known.fingerprint:
                rule = "was used for another request; a new request needs a new key"
                raise IdempotencyMismatch(rule, field="Idempotency-Key", value=key)
            headers = [*known.headers, (b"idempotency-replayed", b"true")]
            await send({"type": "http.response.start", "status": known.status, "headers": headers})
            await send({"type": "http.response.body", "body": known.body})
            return
        if await self.answers.used(owner) >= self._most_bytes:
            rule = f"the kept answers of one token may take {self._most_bytes} bytes; keys are kept for their time"
            raise LimitExceeded(rule, field="idempotency_bytes", value=self._most_bytes)
        started: Message = {}
        body: list[bytes] = []

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = message
                return
            body.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            headers: Headers = tuple((bytes(name), bytes(value)) for name, value in started["headers"])
            if _worth_keeping(started["status"], headers) and (fingerprint := await request.fingerprint()):
                # Before the client can see it: whoever has seen an answer gets the same one again.
                await self.answers.keep(owner, key, Answer(fingerprint, started["status"], headers, b"".join(body)))
            await send(started)
            await send({"type": "http.response.body", "body": b"".join(body)})

        await app(scope, request.receive, sending)


def _worth_keeping(status: int, headers: Headers) -> bool:
    return status < 500 and status not in _NOT_KEPT and all(name != b"retry-after" for name, _ in headers)
