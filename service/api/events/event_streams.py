"""Streams of events: one task each, the request's own, which sleeps until its machine's log has something new."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError
from service.api.events.event_feed import Feed, Item, marker
from service.http.negotiation import SSE
from service.problems import NotReady, ServiceError
from service.runtime.events import END, LogStats
from service.runtime.shares import Share
from service.security.access import AccessControl, Principal

# How long an EventSource waits before it comes again, in milliseconds.
_RETRY = b"retry: 2000\n\n"

# Proxies that hold replies back would hold events back.
STREAM_HEADERS = {"Vary": "Accept", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def sse(items: Iterable[Item]) -> bytes:
    """Events as a browser's EventSource reads them."""
    return b"".join(
        b"%bevent: %b\ndata: %b\n\n"
        % (b"" if item.id is None else b"id: %d\n" % item.id, item.kind.encode(), item.data)
        for item in items
    )


def ndjson(items: Iterable[Item]) -> bytes:
    """One JSON object per line."""
    return b"".join(item.data + b"\n" for item in items)


class EventStream(Response):
    """The body is sent as it is made, for as long as ``access`` would let ``reader`` in.

    The framework's own streaming reply keeps a second task waiting for the client to leave. Here it is asked when
    something is sent: an idle stream notices at its next heartbeat.
    """

    def __init__(
        self,
        request: Request,
        feed: Feed,
        stats: LogStats,
        *,
        media: str,
        heartbeat: float,
        places: Share,
        access: AccessControl,
        reader: Principal,
        follow: bool,
    ) -> None:
        if follow and request.app.state.draining:
            raise NotReady("the service is stopping: streams of events are not begun")
        if places.room(reader.tenant) <= 0:
            raise places.exceeded(reader.tenant)
        super().__init__(
            status_code=200,
            media_type=media,
            headers=STREAM_HEADERS,
        )
        del self.headers["content-length"]
        self._request = request
        self._feed = feed
        self._stats = stats
        self._render = sse if media == SSE else ndjson
        self._media = media
        self._heartbeat = heartbeat
        self._places = places
        self._access = access
        self._reader = reader
        self._follow = follow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stats.streams += 1
        self._places.count(self._reader.tenant, 1)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with self._access.watching(self._reader, self._feed.log.nudge):
                await self._send_pieces(send)
        finally:
            self._stats.streams -= 1
            self._places.count(self._reader.tenant, -1)

    async def _send_pieces(self, send: Send) -> None:
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if await self._request.is_disconnected():
                    return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        feed, log = self._feed, self._feed.log
        below = log.next_id
        if self._media == SSE:
            yield _RETRY
        while True:
            if self._follow:
                below = log.next_id
            reason = log.ended or (None if self._access.holds(self._reader) else "unauthenticated")
            if reason is None:
                try:
                    items = await feed.next(below)
                except (ServiceError, EngineError):
                    items, reason = [], "store-unavailable"
                if items:
                    yield self._render(items)
                    continue
            if reason is None and not self._follow:
                return
            if reason is not None:
                yield self._render([marker(END, None, {"reason": reason})])
                return
            if not await log.wait(feed.position, self._heartbeat):
                yield self._sign_of_life()

    def _sign_of_life(self) -> bytes:
        """Nothing to a reader; but an EventSource notes how far it has come, whatever it filters."""
        return b":\nid: %d\n\n" % self._feed.position if self._media == SSE else b"\n"
