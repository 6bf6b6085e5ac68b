"""The two ways to a service: one that blocks, whose coroutines never suspend, and one of asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import httpx2
import websockets.asyncio.client
import websockets.exceptions
from websockets.typing import Subprotocol

from subpage.errors import StreamBroken, TooLarge, Unreachable, refusal
from subpage.wire import LINE_BYTES, MESSAGE_BYTES, Reply, Request, SocketClosed, checked, told, trusting

FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)
SOCKET_FAILURES = (OSError, websockets.exceptions.WebSocketException)
_KEEPALIVE = 20.0  # seconds between pings, and for their answers


async def _now(value: Any) -> Any:
    return value


async def _later(value: Any) -> Any:
    return await value


class Way(NamedTuple):
    """One of the two, as the libraries call things there. ``done`` gives what a call has made, or will have made."""

    done: Callable[[Any], Any]
    sleep: Callable[[float], Any]
    http: Any
    next: Any
    pieces: str
    close: str
    away: Callable[..., Any]


BLOCKING = Way(_now, time.sleep, httpx2.Client, next, "iter_raw", "close", lambda does, *given: does(*given))
AWAITING = Way(_later, asyncio.sleep, httpx2.AsyncClient, anext, "aiter_raw", "aclose", asyncio.to_thread)


class _Dial(websockets.asyncio.client.connect):
    def process_redirect(self, exc: Exception) -> Exception:
        """Nowhere else: what is said there is for the service."""
        return exc


class Transport:
    """HTTP with httpx2, WebSockets with websockets. ``connect``: seconds for a connection."""

    def __init__(self, way: Way, url: str, ca: Any, connect: float) -> None:
        self._way, self._url, self._trust, self._connect = way, url, trusting(ca), connect
        self._http = way.http(verify=self._trust, follow_redirects=False)

    async def send(self, request: Request, most: int) -> Reply:
        """Raises Unreachable, TooLarge beyond ``most`` bytes."""
        opened = await self.open(request)
        try:
            checked(opened.headers, most)
            return Reply(opened.status, opened.headers, await opened.rest(most))
        finally:
            await opened.close()

    async def open(self, request: Request) -> Opened:
        """Raises Unreachable."""
        content = request.content() if callable(request.content) else request.content
        if self._way is AWAITING and isinstance(content, Iterator):
            content = _in_threads(content)
        limits = (self._connect, request.patience, None, self._connect)
        try:
            prepared = self._http.build_request(
                request.method, request.url, content=content, headers=request.headers, timeout=limits
            )
            return Opened(self._way, await self._way.done(self._http.send(prepared, stream=True)), self._url)
        except FAILURES as error:
            raise told(self._url, error) from None

    async def dial(self, url: str, headers: dict[str, str], protocol: str) -> Socket:
        """A WebSocket, which is awaited either way. Raises Unreachable, Problem."""
        trust = None if self._trust is True else self._trust
        try:
            dialled = await _Dial(
                url,
                additional_headers=headers,
                subprotocols=[Subprotocol(protocol)],
                ssl=trust if url.startswith("wss:") else None,
                open_timeout=self._connect,
                ping_interval=_KEEPALIVE,
                ping_timeout=_KEEPALIVE,
                close_timeout=2,
                max_size=MESSAGE_BYTES,
                compression=None,
            )
            return Socket(dialled)
        except SOCKET_FAILURES as error:
            raise _undialled(self._url, error) from None

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._way.done(self._way.sleep(seconds))

    async def away(self, does: Callable[..., Any], *given: Any) -> Any:
        """What may block, where it blocks nobody."""
        return await self._way.done(self._way.away(does, *given))

    async def close(self) -> None:
        """Close what is open."""
        await self._way.done(getattr(self._http, self._way.close)())


class Opened:
    """A reply whose body comes in pieces."""

    def __init__(self, way: Way, reply: Any, url: str) -> None:
        self._way, self._reply, self._url = way, reply, url
        self._pieces: Any = getattr(reply, way.pieces)()
        self.status: int = reply.status_code
        self.headers: Mapping[str, str] = reply.headers

    async def piece(self) -> bytes:
        """The next bytes; empty at the end. Raises Unreachable."""
        try:
            return cast(bytes, await self._way.done(self._way.next(self._pieces, b"")))
        except FAILURES as error:
            raise told(self._url, error) from None

    async def rest(self, most: int) -> bytes:
        """All that comes. Raises Unreachable, TooLarge beyond ``most`` bytes."""
        parts, count = [], 0
        while piece := await self.piece():
            count += len(piece)
            if count > most:
                raise TooLarge(f"the reply has more bytes than the {most} that the client takes: raise most_bytes")
            parts.append(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def close(self) -> None:
        """Leave the rest."""
        await self._way.done(getattr(self._reply, self._way.close)())


class Socket:
    """A WebSocket of text messages; its methods raise SocketClosed."""

    def __init__(self, socket: websockets.asyncio.client.ClientConnection) -> None:
        self._socket = socket
        self.close = socket.close

    async def receive(self) -> str:
        """The next message."""
        try:
            return str(await self._socket.recv())
        except SOCKET_FAILURES as error:
            raise _closed(error) from None

    async def send(self, text: str) -> None:
        """Send one."""
        try:
            await self._socket.send(text)
        except SOCKET_FAILURES as error:
            raise _closed(error) from None


async def lines(opened: Opened) -> AsyncGenerator[bytes, None]:
    """The lines of a body as they come, without their ends. Raises StreamBroken, TooLarge for an endless one."""
    rest = b""
    try:
        while piece := await opened.piece():
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line.removesuffix(b"\r")
            if len(rest) > LINE_BYTES:
                raise TooLarge(f"a line of the stream has more than {LINE_BYTES} bytes")
    except Unreachable as error:
        raise StreamBroken(f"the stream broke off: {error}") from None
    if rest:
        raise StreamBroken("the stream ended in the middle of a line")


async def _in_threads(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """What blocks, read where it blocks nobody."""
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def _undialled(url: str, error: Exception) -> Exception:
    """Why there is no WebSocket."""
    if isinstance(error, websockets.exceptions.InvalidStatus):
        reply = error.response
        headers = {name.lower(): value for name, value in reply.headers.raw_items()}
        return refusal(url, reply.status_code, headers, bytes(reply.body or b""))
    if isinstance(error, TimeoutError):
        return told(url, httpx2.ConnectTimeout("timed out"))
    return told(url, (httpx2.ConnectError if isinstance(error, OSError) else httpx2.RemoteProtocolError)(str(error)))


def _closed(error: Exception) -> SocketClosed:
    """How a socket ended."""
    received = error.rcvd if isinstance(error, websockets.exceptions.ConnectionClosed) else None
    return SocketClosed(1006, str(error)) if received is None else SocketClosed(received.code, received.reason)
