"""The socket under a connection: bytes to and fro, each message in one piece, a slow tool never in anybody's way.

libkvmi does not wait for the rest of an event, and loses the stream for good when one is torn. So nothing is written
while something is still to be taken by the kernel: each message is one ``send``.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Any, cast

from service.kvmi.connection import Answer, Close, Connection, Do, Send
from service.kvmi.guest import Change
from service.kvmi.handshake import Identity, hello, take_answer
from service.kvmi.wire import PAGE_SIZE, Broken

logger = logging.getLogger("subpage")

_HANDSHAKE_SECONDS = 10.0
# How long commands are served before others have their turn.
_TURN_SECONDS = 0.001
# Bytes that may wait to be served before no more are read.
_MOST_WAITING = 1 << 16


class Owner(ABC):
    """Whose connection it is."""

    @abstractmethod
    async def make(self, change: Change) -> int:
        """Make a change; its error, or 0."""

    @abstractmethod
    def answered(self, token: Any, action: str, value: int | None = None) -> None:
        """What becomes of an access that was asked about, or of a load, of ``value``."""

    @abstractmethod
    def hooked(self) -> None:
        """The tool has taken the guest."""

    @abstractmethod
    def served(self) -> None:
        """Something was served, or is to be looked at."""


class Link(asyncio.Protocol):
    """One connection to a tool, from its first byte. ``over`` is why it has ended."""

    def __init__(self, owner: Owner, identity: Identity, connection: Connection) -> None:
        self.connection = connection
        self._owner = owner
        self._identity = identity
        self._loop = asyncio.get_running_loop()
        self.over: asyncio.Future[str] = self._loop.create_future()
        self.hooked = False
        self._transport: asyncio.Transport | None = None
        self._greeting = bytearray()
        self._full = False
        self._deaf = False
        self._making: asyncio.Task[None] | None = None
        self._again: asyncio.Handle | None = None
        self._limit: asyncio.TimerHandle | None = None
        self._reason = "the tool has closed the connection"

    # The transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = self._transport = cast(asyncio.Transport, transport)
        made.set_write_buffer_limits(high=0)
        self._limit = self._loop.call_later(_HANDSHAKE_SECONDS, self.close, "the tool does not answer the handshake")
        made.write(hello(self._identity, self.connection.guest.max_gfn() * PAGE_SIZE))

    def data_received(self, data: bytes) -> None:
        if not self.hooked:
            self._greeting += data
            try:
                if not take_answer(self._greeting, self._identity):
                    return
            except Broken as broken:
                self.close(str(broken))
                return
            if self._limit is not None:
                self._limit.cancel()
            self.hooked = True
            data = bytes(self._greeting)
            self._owner.hooked()
        elif not self._full and self._transport is not None:
            answer = self.connection.at_once(data)
            if answer is not None:
                self._transport.write(answer)
                return
        self.connection.receive(data)
        self.turn()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self.turn()

    def connection_lost(self, exc: Exception | None) -> None:
        for handle in (self._limit, self._again):
            if handle is not None:
                handle.cancel()
        self._transport = None
        reason = self._reason if exc is None else str(exc)
        if not self.over.done():
            self.over.set_result(reason if self.hooked else f"in the handshake: {reason}")

    # Serving

    def turn(self) -> None:
        """Serve what there is to serve, for a moment; the rest when others have had theirs."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        until = 0.0
        while self._transport is not None and not self._full:
            if until and self._loop.time() > until:
                self._again = self._loop.call_soon(self.turn)
                break
            step = self.connection.step()
            if step is None:
                break
            until = until or self._loop.time() + _TURN_SECONDS
            if isinstance(step, Send):
                self._transport.write(step.data)
            elif isinstance(step, Answer):
                self._owner.answered(step.token, step.action, step.value)
            elif isinstance(step, Do):
                self._making = self._loop.create_task(self._make(step.change))
            elif isinstance(step, Close):
                self.close(step.reason)
        self._listen()
        self._owner.served()

    def _listen(self) -> None:
        """Read as long as what was read is served."""
        if self._transport is None or self._transport.is_closing():
            return
        waiting = self.connection.buffered > _MOST_WAITING
        if waiting and not self._deaf:
            self._transport.pause_reading()
        elif self._deaf and not waiting:
            self._transport.resume_reading()
        self._deaf = waiting

    async def _make(self, change: Change) -> None:
        try:
            errno = await self._owner.make(change)
        except Exception:
            logger.exception("a change that a tool wanted has failed")
            self.close("the service has failed; its log says how")
            return
        self._making = None
        self.connection.done(errno)
        self.turn()

    def close(self, reason: str) -> None:
        """End it; what was sent still arrives."""
        if self._transport is not None:
            self._reason = reason
            self._transport.close()

    async def settled(self) -> None:
        """It is over, and no change of it is under way."""
        await asyncio.wait([self.over])
        if self._making is not None:
            await asyncio.wait([self._making])
