"""Around every exchange: its id, the headers that every reply carries, and what is recorded of it.

Plain ASGI, the outermost layer of the application, so that it also sees what no route answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import secrets
import time
from http import HTTPStatus

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.handlers import problem_response
from service.problems import NotReady
from service.security.access import NOBODY, Principal
from service.security.audit import AuditLog, cut, outcome_of
from service.settings import Settings
from service.telemetry.logs import request_id
from service.telemetry.metrics import Metrics

# Nothing here may be framed, guessed at, embedded or kept by a shared cache; what a route says itself outranks these.
SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"cache-control", b"private, no-cache"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
TRANSPORT_SECURITY = (b"strict-transport-security", b"max-age=31536000")

_GIVEN_ID = re.compile(rb"[A-Za-z0-9._~:-]{1,128}")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_METHODS = _SAFE | {"POST", "PUT", "PATCH", "DELETE", "WEBSOCKET"}

access_logger = logging.getLogger("subpage.access")


class Envelope:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, settings: Settings, audit: AuditLog, metrics: Metrics) -> None:
        self.app = app
        self._audit = audit
        self._metrics = metrics
        self._log_requests = settings.access_log
        self._headers = (*SECURITY_HEADERS, TRANSPORT_SECURITY) if settings.tls_certificate else SECURITY_HEADERS
        self._names = frozenset(name for name, _ in self._headers)
        self._prefix = secrets.token_hex(6)
        self._count = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        identity = self._identity(scope)
        request_id.set(identity)
        status, audited = 0, False
        self._metrics.under_way += 1
        began = time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status, audited
            match message["type"]:
                case "http.response.start" | "websocket.http.response.start":
                    status = message["status"]
                    message["headers"] = self._enriched(message["headers"], identity)
                case "websocket.accept":
                    status = 101
                case "websocket.close" if not status:
                    status = 403
            if not audited and status:
                audited = True
                # Before the client is told: what it knows of is in the log.
                self._audit_mutation(scope, identity, status, time.perf_counter() - began)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:
            if not scope["app"].state.draining:
                raise
            # The service stops and gave the request up: its client is told, and the task ends here as it was meant to.
            if not status and scope["type"] == "http":
                stopping = NotReady("the service is stopping; look at the state before trying again")
                with contextlib.suppress(OSError):
                    await problem_response(HTTPConnection(scope), stopping)(scope, receive, sending)
        except Exception as defect:
            if not status and scope["type"] == "http":
                # The framework would answer outside of this layer, without the headers and the id that the log shows.
                # A client that has left is no reason to lose the defect.
                with contextlib.suppress(OSError):
                    await problem_response(HTTPConnection(scope), defect)(scope, receive, sending)
            raise
        finally:
            self._metrics.under_way -= 1
            seconds = time.perf_counter() - began
            if not audited:
                self._audit_mutation(scope, identity, status, seconds)
            self._record(scope, status, seconds)

    def _identity(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _GIVEN_ID.fullmatch(value):
                return str(value, "ascii")
        return f"{self._prefix}-{next(self._count):010x}"  # always as long: replies of equal content are equally long

    def _enriched(self, headers: list[tuple[bytes, bytes]], identity: str) -> list[tuple[bytes, bytes]]:
        own = self._headers
        for name, _ in headers:
            if name in self._names:
                given = {name for name, _ in headers}
                own = tuple(header for header in own if header[0] not in given)
                break
        return [*headers, *own, (b"x-request-id", identity.encode())]

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope.get("method", "WEBSOCKET")
        # A path that no route has is whatever strangers type: it must not make a time series.
        template = getattr(scope.get("route"), "path_format", "(none)")
        self._metrics.request(method if method in _METHODS else "(other)", template, status, seconds)
        if self._log_requests:
            fields = {"method": method, "path": cut(scope["path"]), "status": status, "seconds": round(seconds, 6)}
            fields["token"] = scope.get("principal", NOBODY).token
            access_logger.info("%s %s %d", method, fields["path"], status, extra={"fields": fields})

    def _audit_mutation(self, scope: Scope, identity: str, status: int, seconds: float) -> None:
        method = scope.get("method", "WEBSOCKET")
        if method in _SAFE or not self._audit.on:
            return
        # Where the path has no such method, the route is one of another method.
        if getattr(scope.get("route"), "permission", "") == "read" and status != HTTPStatus.METHOD_NOT_ALLOWED:
            return
        principal: Principal = scope.get("principal", NOBODY)
        query = scope["query_string"].decode("latin-1")
        members = {
            "request_id": identity,
            "client": scope["client"][0] if scope.get("client") else None,
            "method": method,
            "path": scope["path"],
            **({"query": query} if query else {}),
            "outcome": outcome_of(status),
            "seconds": round(seconds, 6),
        }
        if principal is NOBODY and HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
            self._audit.refused_stranger(status, **members)
        else:
            self._audit.write("request", principal, status=status, **members)
