"""Idempotency-Key: a POST that is sent again because its answer was lost is answered again, not done again.

A key belongs to the token that used it. The same key with the same request gets the answer that was given; with another
request it is refused; while the first one runs it has to wait. Answers that say to try again are not kept.

A change is stored with the key that it was made under. When the service is killed before the answer could be kept, the
key still says that the request was carried out: it is then refused, with what it changed, and not done again.
"""

from __future__ import annotations

import hashlib
import re

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import LimitExceeded
from service.http.handlers import problem_response
from service.problems import (
    IdempotencyAnswerLost,
    IdempotencyInProgress,
    IdempotencyMismatch,
    InvalidDocument,
    ServiceError,
    StoreUnavailable,
)
from service.runtime.answers import CARRIED_OUT, Answer, Answers, Headers, Keyed
from service.runtime.commit_hooks import CommitHooks
from service.security.access import Principal

_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
# Where a scope has the ``Keyed`` of its request.
_KEYED = "idempotency"
# Refused before the call was tried, or worth trying again.
_NOT_KEPT = frozenset({401, 403, 406, 408, 413, 415, 429, 499})
_UNKEPT = "the request was carried out, but its answer could not be kept: {}; read the state before trying again"


class _Hashed:
    """``receive``, with everything that passes hashed."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        given = dict(scope["headers"])
        media = given.get(b"content-type", b"")
        self._receive = receive
        self._hash = hashlib.blake2b(digest_size=32)
        for part in (scope["path"].encode("utf-8", "surrogateescape"), scope["query_string"], media):
            self._hash.update(len(part).to_bytes(8, "little") + part)
        # Nobody asks for a body that is known to be empty.
        self.ended = given.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in given
        self.gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._hash.update(message.get("body", b""))
            self.ended = not message.get("more_body", False)
        else:
            self.gone = True
        return message

    def so_far(self) -> bytes:
        """The hash of the whole request, empty while its body has not been read to its end."""
        return self._hash.digest() if self.ended else b""

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

        Raises InvalidDocument for what is no key, IdempotencyInProgress or IdempotencyAnswerLost (409),
        IdempotencyMismatch (422), LimitExceeded (429) when the owner keeps too many answers already, StoreUnavailable.
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
            if known.fingerprint and await request.fingerprint() != known.fingerprint:
                rule = "was used for another request; a new request needs a new key"
                raise IdempotencyMismatch(rule, field="Idempotency-Key", value=key)
            if known.status == CARRIED_OUT:
                where = f"; it changed {known.body.decode()}" if known.body else ""
                rule = f"names a request that was carried out, and whose answer was lost{where}"
                raise IdempotencyAnswerLost(rule, field="Idempotency-Key", value=key)
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
                try:
                    await self.answers.keep(owner, key, Answer(fingerprint, started["status"], headers, b"".join(body)))
                except StoreUnavailable as error:
                    # Raised in the middle of a reply it would be taken for a defect of the route.
                    lost = problem_response(HTTPConnection(scope), StoreUnavailable(_UNKEPT.format(error.rule)))
                    await lost(scope, request.receive, send)
                    return
            await send(started)
            await send({"type": "http.response.body", "body": b"".join(body)})

        scope[_KEYED] = Keyed(self.answers, owner, key, request.so_far)
        await app(scope, request.receive, sending)


def hooks_of(request: HTTPConnection) -> CommitHooks:
    """What every change that ``request`` makes is stored with: its key, if it has one."""
    keyed: Keyed | None = request.scope.get(_KEYED)
    return () if keyed is None else (keyed,)


def will_answer(request: HTTPConnection, response: Response) -> None:
    """See ``Keyed.will_answer``. Nothing without a key."""
    keyed: Keyed | None = request.scope.get(_KEYED)
    if keyed is not None:
        keyed.will_answer(response)


def _worth_keeping(status: int, headers: Headers) -> bool:
    # With a success Retry-After is about the job that was made, and not about the call.
    again = status >= 400 and any(name == b"retry-after" for name, _ in headers)
    return status < 500 and status not in _NOT_KEPT and not again
