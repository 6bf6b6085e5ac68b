"""What stands between a request that found its route and the route: may the caller, and within which limits.

It is one plain ASGI function around each route and not a stack of middleware, because it runs for every request, and
because only a route knows what it demands.
"""

from __future__ import annotations

from typing import Protocol, cast

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.handlers import problem_response
from service.http.limits import WITH_BODY, bounded
from service.problems import ServiceError
from service.security.access import AccessControl, Permission
from service.settings import Settings

_READ = frozenset({b"authorization", b"host", b"content-length", b"content-encoding", b"transfer-encoding"})


class Declared(Protocol):
    """A route that says what it demands; None, for one that forgot to say, is answered as ``admin``."""

    permission: Permission | None


def gated(route: Declared, app: ASGIApp) -> ASGIApp:
    """``app``, the inside of ``route``, behind its gate."""

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        try:
            access = cast(AccessControl, state.access)
            access.admit(scope, route.permission or "admin", headers.get(b"authorization"), headers.get(b"host"))
            if scope["type"] == "http" and scope["method"] in WITH_BODY:
                receive = bounded(scope, receive, headers, cast(Settings, state.settings))
        except ServiceError as refused:
            if scope["type"] == "websocket":
                await receive()  # the opening, which the refusal answers
            await problem_response(HTTPConnection(scope), refused)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return gate
