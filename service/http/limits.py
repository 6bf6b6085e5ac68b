"""Limits that hold before a route sees the request: size and coding of the body."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.handlers import problem_response
from service.problems import BodyTooLarge, UnsupportedMediaType
from service.settings import Settings

# The body of any other method is never read.
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class BodyLimits:
    """ASGI middleware. A declared length over the limit is refused unread, an undeclared one where it passes it."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length")
        if (declared is None or declared == "0") and "transfer-encoding" not in headers:
            await self.app(scope, receive, send)
            return
        limit = self._limit(scope)
        refused: BodyTooLarge | UnsupportedMediaType | None = None
        if declared is not None and int(declared) > limit:
            refused = _too_large(limit)
        elif headers.get("content-encoding", "identity").lower() != "identity":
            rule, coding = "must be identity: coded bodies are not read", headers["content-encoding"]
            accepted = {"Accept-Encoding": "identity"}
            refused = UnsupportedMediaType(rule, field="Content-Encoding", value=coding, headers=accepted)
        if refused is not None:
            await problem_response(Request(scope, receive), refused)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise _too_large(limit)
            return message

        await self.app(scope, counted, send)

    def _limit(self, scope: Scope) -> int:
        match scope["method"], scope["path"].rpartition("/")[2]:
            case "POST", "traces":
                return self.settings.max_body_bytes
            case "PUT", "memory":
                return self.settings.max_memory_window
            case _:
                return self.settings.max_document_bytes


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"must be at most {limit} bytes", field="body")
