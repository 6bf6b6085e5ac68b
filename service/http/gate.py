"""Before a route looks for its machine: is the store ours, and is the machine in memory."""

from __future__ import annotations

from contextlib import AsyncExitStack

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import EngineError
from service.http.handlers import problem_response
from service.problems import ServiceError
from service.runtime.registry import Registry

_API = "/v1/"
_VMS = "/v1/vms/"


def _vm_of(path: str) -> str | None:
    """The machine that a request needs, if any. The event log is read without it, for as long as a reader likes."""
    vm, _, rest = path[len(_VMS) :].partition("/")
    return vm or None if path.startswith(_VMS) and rest != "events" else None


class StoreGate:
    """ASGI middleware. Routes find machines without waiting; what has to be waited for is waited for here."""

    def __init__(self, app: ASGIApp, registry: Registry) -> None:
        self.app = app
        self.registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            not self.registry.home.durable
            or scope["type"] not in ("http", "websocket")
            or not scope["path"].startswith(_API)
        ):
            await self.app(scope, receive, send)
            return
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.registry.using(_vm_of(scope["path"])))
            except (ServiceError, EngineError) as refused:
                if scope["type"] == "websocket":
                    await receive()  # the opening, which the refusal answers
                await problem_response(HTTPConnection(scope), refused)(scope, receive, send)
                return
            await self.app(scope, receive, send)
