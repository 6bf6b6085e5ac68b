"""The two ways to a service: one that blocks, whose coroutines never suspend, and one of asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any

import httpx2
import websockets.asyncio.client
import websockets.exceptions
import websockets.sync.client

from subpage.errors import StreamBroken, TooLarge, refusal
from subpage.wire import LINE_BYTES, MESSAGE_BYTES, Gathered, Reply, Request, SocketClosed, checked, told, trusting

FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)
SOCKET_FAILURES = (OSError, websockets.exceptions.WebSocketException)
_KEEPALIVE = 20.0  # seconds between pings, and for their answers


async def _now(value: Any) -> Any:
    return value


async def _later(value: Any) -> Any:
    return await value


class Transport:
    """HTTP with httpx2, WebSockets with websockets. ``done`` gives what a call has made, or what it will have made."""

    def __init__(self, url: str, ca: Any, connect: float, http: Any, dialler: Any, done: Any) -> None:
        self._url, self._trust, self._connect = url, trusting(ca), connect
        self._http: Any = http(verify=self._trust, follow_redirects=False)
        self._dialler, self._done = dialler, done

    async def _sent(self, request: Request) -> httpx2.Response:
        content = request.content() if callable(request.content) else request.content
        if self._done is _later and isinstance(content, Iterator):
            content = _in_threads(content)
        limits = (self._connect, request.patience, None, self._connect)
        try:
            prepared = self._http.build_request(
                request.method, request.url, content=content, headers=request.headers, timeout=limits
            )
            reply: httpx2.Response = await self._done(self._http.send(prepared, stream=True))
        except FAILURES as error:
            raise told(self._url, error) from None
        return reply

    async def send(self, request: Request, most: int) -> Reply:
        """Raises Unreachable, TooLarge beyond ``most`` bytes."""
        opened = Opened(await self._sent(request), self._url, self._done)
        try:
            checked(opened.headers, most)
            body = Gathered(most)
            while piece := await opened.next_piece():
                body.add(piece)
        except FAILURES as error:
            raise told(self._url, error) from None
        finally:
            await opened.close()
        return Reply(opened.status, opened.headers, body.whole())

    async def open(self, request: Request) -> Opened:
        """Raises Unreachable."""
        return Opened(await self._sent(request), self._url, self._done)

    async def dial(self, url: str, headers: dict[str, str], protocol: str) -> Socket:
        """Raises Unreachable, Problem."""
        trust = None if self._trust is True else self._trust
        try:
            # The blocking one is connected by then, the other one when it is entered.
            dialled = self._dialler(
                url,
                additional_headers=headers,
                subprotocols=[protocol],
                ssl=trust if url.startswith("wss:") else None,
                open_timeout=self._connect,
                ping_interval=_KEEPALIVE,
                ping_timeout=_KEEPALIVE,
                close_timeout=2,
                max_size=MESSAGE_BYTES,
                compression=None,
            )
            enter = dialled.__enter__ if self._done is _now else dialled.__aenter__
            return Socket(await self._done(enter()), self._done)
        except SOCKET_FAILURES as error:
            raise _undialled(self._url, error) from None

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close what is open."""
        await self._done(self._http.close() if self._done is _now else self._http.aclose())


class BlockingTransport(Transport):
    """Blocks while it waits, so that nothing is ever suspended."""

    def __init__(self, url: str, ca: Any, connect: float) -> None:
        super().__init__(url, ca, connect, httpx2.Client, websockets.sync.client.connect, _now)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)  # noqa: ASYNC251 - this is the one that blocks


class AsyncTransport(Transport):
    """Suspends while it waits."""

    def __init__(self, url: str, ca: Any, connect: float) -> None:
        super().__init__(url, ca, connect, httpx2.AsyncClient, websockets.asyncio.client.connect, _later)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class Opened:
    """A reply whose body comes in pieces."""

    def __init__(self, reply: httpx2.Response, url: str, done: Any) -> None:
        self._url, self._done = url, done
        self._reply: Any = reply
        self._pieces: Any = reply.iter_raw() if done is _now else reply.aiter_raw()
        self.status: int = reply.status_code
        self.headers: Mapping[str, str] = reply.headers

    async def next_piece(self) -> bytes:
        """The same, with the errors of httpx2."""
        piece: bytes = await self._done((next if self._done is _now else anext)(self._pieces, b""))
        return piece

    async def piece(self) -> bytes:
        """The next bytes; empty at the end. Raises StreamBroken."""
        try:
            return await self.next_piece()
        except FAILURES as error:
            raise StreamBroken(f"the stream broke off: {told(self._url, error)}") from None

    async def close(self) -> None:
        """Leave the rest."""
        await self._done(self._reply.close() if self._done is _now else self._reply.aclose())


class Socket:
    """A WebSocket of text messages; its methods raise SocketClosed."""

    def __init__(self, socket: Any, done: Any) -> None:
        self._socket, self._done = socket, done

    async def receive(self) -> str:
        """The next message."""
        try:
            return str(await self._done(self._socket.recv()))
        except SOCKET_FAILURES as error:
            raise _closed(error) from None

    async def send(self, text: str) -> None:
        """Send one."""
        try:
            await self._done(self._socket.send(text))
        except SOCKET_FAILURES as error:
            raise _closed(error) from None

    async def close(self) -> None:
        """Say goodbye."""
        await self._done(self._socket.close())


async def lines(opened: Opened) -> AsyncGenerator[bytes, None]:
    """The lines of a body as they come, without their ends. Raises StreamBroken, TooLarge for an endless one."""
    rest = b""
    while piece := await opened.piece():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        if len(rest) > LINE_BYTES:
            raise TooLarge(f"a line of the stream has more than {LINE_BYTES} bytes")
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
