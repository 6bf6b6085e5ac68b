"""Long bodies on their way from the socket to who reads them: the kernel writes them where they are handed on from.

The parser has nothing to say about a body whose length its head declared. Through it, and through uvicorn, such a body
is copied four times before the application has it: to an object of the loop, out of the parser, into an array and out
of it. Here it is not copied: once the head is read and a long part of the body is still to come, the connection lets
another protocol read that part, no byte more, and goes on with a new parser behind it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, cast

import httptools
import numpy as np
from uvicorn._types import ASGIReceiveEvent
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# Bodies of which more is to come than this are worth it.
LONG = 1 << 18
# Memory that the kernel writes to at one time, and that a connection has waiting when it pauses: little until somebody
# reads the body, then so much that what each piece costs whatever its length does not count.
FIRST, BLOCK = 1 << 18, 1 << 20


class Connection(Protocol):
    """What is asked of a connection."""

    transport: asyncio.Transport
    flow: FlowControl
    parser: Any

    @property
    def wanted(self) -> RequestResponseCycle | None:
        """The request whose body it is; None when nobody wants the rest of it."""

    def on_part(self, size: int) -> None:
        """So many bytes of the body have come."""

    def on_message_complete(self) -> None:
        """All of it has come."""

    def connection_lost(self, exc: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class Handing(RequestResponseCycle):
    """A request that hands on what has come of its body as it is: bytes, or a view of a block, and not a copy."""

    async def receive(self) -> ASGIReceiveEvent:
        """As uvicorn's."""
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self.message_event.wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body = cast("bytes | bytearray | memoryview", self.body)
        self.body = cast(bytearray, b"")  # which becomes the next piece when that is added
        whole = bytes(body) if isinstance(body, bytearray) else cast(bytes, body)
        return {"type": "http.request", "body": whole, "more_body": self.more_body}


class LongBody(asyncio.BufferedProtocol):
    """Reads ``left`` bytes of a body for a connection, then gives the transport back to it."""

    def __init__(self, connection: Connection, left: int) -> None:
        self._connection = connection
        self._left = left
        self._block = memoryview(b"")
        self._begin = self._end = 0  # of what has come and was not handed on, in the block

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._end == len(self._block):
            self._block = memoryview(np.empty(BLOCK if self._block else FIRST, dtype=np.uint8))  # type: ignore[arg-type]
            self._begin = self._end = 0
        return self._block[self._end : self._end + self._left]

    def buffer_updated(self, nbytes: int) -> None:
        connection = self._connection
        self._left -= nbytes
        cycle = connection.wanted
        connection.on_part(nbytes)
        if cycle is not None:
            self._hand_on(cycle, nbytes)
        if not self._left:
            connection.transport.set_protocol(cast(asyncio.Protocol, connection))
            connection.parser = new_parser(connection)
            connection.on_message_complete()

    def _hand_on(self, cycle: RequestResponseCycle, size: int) -> None:
        """Put what has come behind what the request has not yet received; it is in one block with that."""
        begin, self._end = self._end, self._end + size
        waiting = cast("bytes | memoryview", cycle.body)
        if waiting and not isinstance(waiting, memoryview):  # it came with the head
            cycle.body = bytearray(b"".join((waiting, self._block[begin : self._end])))
        else:
            self._begin = self._begin if waiting else begin
            cycle.body = cast(bytearray, self._block[self._begin : self._end])
        if len(cycle.body) > HIGH_WATER_LIMIT or self._end == len(self._block):
            self._connection.flow.pause_reading()
        cycle.message_event.set()

    def eof_received(self) -> None:
        """The client will send no more; the connection ends."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()


def new_parser(connection: Connection) -> Any:
    """A parser as uvicorn makes it: that of a request with a long body never hears of its end."""
    parser = httptools.HttpRequestParser(connection)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
