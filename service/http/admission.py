"""What stands between a request that found its route and the route: may the caller, within which limits, and then,
not before, its machine.

It is one plain ASGI function around each route and not a stack of middleware, because it runs for every request, and
because only a route knows what it demands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import EngineError
from service.http.handlers import problem_response
from service.http.idempotency import Idempotency
from service.http.limits import WITH_BODY, Held, HeldBodies, bounded
from service.http.negotiation import acceptable
from service.http.origins import check_page
from service.http.sockets import token_among
from service.http.vm_loader import API, check_open, with_machine
from service.problems import ServiceError
from service.runtime.registry import Registry
from service.security.access import AccessControl, Permission
from service.settings import Settings

# What a page may ask of anybody: the reply is kept from it unless CORS says otherwise, and nothing is changed.
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_READ = frozenset(
    {
        b"accept",
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"host",
        b"idempotency-key",
        b"origin",
        b"sec-fetch-site",
        b"transfer-encoding",
    }
)

_MACHINE = f"{API}vms/{{vm}}"
# Reads the log without the machine, for as long as a reader likes.
_WITHOUT = frozenset({f"{_MACHINE}/events"})


class Declared(Protocol):
    """A route that says what it demands; None, for one that forgot to say, is answered as ``admin``."""

    permission: Permission | None
    # Without what its parameters are converted by.
    path_format: str
    # The media types of its successes. A route with one is held to Accept here. It chooses itself where it has several,
    # or also answers without a body.
    offers: tuple[str, ...]
    chooses: bool


def gated(route: Declared, app: ASGIApp) -> ASGIApp:
    """``app``, the inside of ``route``, behind its gate."""
    path = route.path_format
    stored = path.startswith(API)
    inside = with_machine(app) if path.startswith(_MACHINE) and path not in _WITHOUT else app

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        websocket = scope["type"] == "websocket"
        headers = _wanted(scope["headers"])
        held: Held | None = None
        try:
            access = cast(AccessControl, state.access)
            if websocket or scope["method"] not in SAFE:
                allowed = cast(Settings, state.settings).cors_origins
                check_page(headers.get(b"origin"), headers.get(b"sec-fetch-site"), headers.get(b"host"), allowed)
            given = headers.get(b"authorization") or (token_among(scope["subprotocols"]) if websocket else None)
            principal = access.authorize(scope, route.permission or "admin", given, headers.get(b"host"))
            if stored:
                check_open(cast(Registry, state.registry))
            if route.offers and not route.chooses and b"accept" in headers:
                acceptable(headers[b"accept"].decode("latin-1"), route.offers)
            if scope["type"] == "http" and scope["method"] in WITH_BODY:
                held = Held(cast(HeldBodies, state.bodies), principal.tenant)
                receive = bounded(scope, receive, headers, cast(Settings, state.settings), held)
                # What changes nothing may be done again: no answer of it is kept.
                keyed = scope["method"] == "POST" and route.permission != "read"
                if keyed and b"idempotency-key" in headers:
                    keys = cast(Idempotency, state.idempotency)
                    await keys.once(headers[b"idempotency-key"], inside, scope, receive, send)
                    return
            await inside(scope, receive, send)
        except (ServiceError, EngineError) as refused:
            if websocket:
                await receive()  # the opening, which the refusal answers
            await problem_response(HTTPConnection(scope), refused)(scope, receive, send)
        finally:
            if held is not None:
                held.release()

    return gate


def _wanted(given: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Those headers that a gate reads; of a repeated one all values, with commas."""
    found: dict[bytes, bytes] = {}
    for name, value in given:
        if name in _READ:
            found[name] = value if name not in found else found[name] + b"," + value
    return found
