"""One WebSocket of a client, within bounds that the server itself does not set: how much of what has come is looked at
before others have their turn, and how many frames there may be that are no message.
"""

from __future__ import annotations

from typing import Any

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.utils import ClientDisconnected
from websockets.frames import CloseCode, Frame, Opcode

from service.http.sockets import SocketConnection

# Bytes that are looked at in one turn: 42 frames without content, or 36 messages of one byte.
TURN_BYTES = 256
# Frames that end no message (pings, pongs, pieces of a message): so many at once, and so many a second.
FRAMES_AT_ONCE = 256
FRAMES_A_SECOND = 32
# How long a peer may take to answer a close.
CLOSE_SECONDS = 2.0

_CONTENT = frozenset({Opcode.TEXT, Opcode.BINARY, Opcode.CONT})


class PatientSocket(SocketConnection):
    """A WebSocket which takes what came in turns and reads no more before it has looked at all of it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.close_timeout = CLOSE_SECONDS
        self._held = bytearray()
        self._turn_comes = False
        self._allowance = float(FRAMES_AT_ONCE)
        self._seen = self.loop.time()

    def data_received(self, data: bytes) -> None:
        self._held += data
        self.transport.pause_reading()
        if not self._turn_comes:
            self._take_turn()

    async def receive(self) -> ASGIReceiveEvent:
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._await_turn()
        return message

    async def send(self, message: ASGISendEvent) -> None:
        await self.writable.wait()
        if self.close_sent:
            raise ClientDisconnected  # the application could not know yet
        await super().send(message)
        if self.close_sent and self._held:
            self._await_turn()  # the peer's own close may be among what is held

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is None:  # frames that came before the opening was answered
            self.queue.put_nowait({"type": "websocket.disconnect", "code": CloseCode.ABNORMAL_CLOSURE})
            self.disconnected = True
            self.transport.close()
        else:
            super().handle_parser_exception()

    def _await_turn(self) -> None:
        if not self._turn_comes:
            self._turn_comes = True
            self.loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Look at a piece, unless the application has messages to take; read on when there is none left."""
        self._turn_comes = False
        if self.transport.is_closing() or (self.read_paused and not self.close_sent):
            return
        if self._held:
            piece = bytes(self._held[:TURN_BYTES])
            del self._held[:TURN_BYTES]
            super().data_received(piece)
        if self.transport.is_closing():
            self._held.clear()
        elif self._held:
            self._await_turn()
        elif not self.read_paused:
            self.transport.resume_reading()

    def handle_events(self) -> None:
        now = self.loop.time()
        self._allowance = min(FRAMES_AT_ONCE, self._allowance + (now - self._seen) * FRAMES_A_SECOND)
        self._seen = now
        self._allowance -= sum(map(_is_no_message, self.conn.events))
        if self._allowance < 0:
            self.conn.events.clear()
            self.conn.fail(CloseCode.POLICY_VIOLATION, "too many frames that are no message")
            self.handle_parser_exception()
            return
        super().handle_events()


def _is_no_message(event: object) -> bool:
    return isinstance(event, Frame) and not (event.fin and event.opcode in _CONTENT)
