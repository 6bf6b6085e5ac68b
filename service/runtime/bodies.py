"""Request bodies as blocking binary files, so that a replay reads while the body arrives."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, Self, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.runtime.turns import Turn

T = TypeVar("T")

# Bytes of a body that are worth a turn.
PIECE = 1 << 18
# Seconds that a reader keeps its turn while nothing comes, and then waits for a piece before less will do.
_PATIENCE = 0.1
_REST = 1.0


class BodyAborted(Exception):
    """The body ended before its end; raised in the reading thread. The reason is known to the event loop."""


class BodyPipe:
    """A bounded queue with an asynchronous writing end (one task) and a blocking, file-like reading end (one thread).

    The writing end waits while more than ``bound`` bytes are queued, which stops the socket from being read. The
    reading end is woken when what it waits for is there, not for each piece: waking a thread takes longer than that.
    It has a ``turn``, which it gives away while the body does not come, and then waits for a piece of it and no longer
    for single bytes: a sender that is slow has a turn for an instant now and then. Before the thread, the queue is read
    with ``begun`` and ``gathered``.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, bound: int, turn: Turn | None = None) -> None:
        self._loop = loop
        self._bound = bound
        self._limit = bound if turn is None else min(bound, PIECE)  # until somebody has the turn to read
        self._turn = turn
        self._patience = _PATIENCE
        self._chunks: deque[bytes] = deque()
        self._queued = 0
        self._awaited = 1
        self.prompt = False  # whether ``read`` gives what is there, instead of what was asked for
        self._ended = False
        self._aborted = False
        self._offset = 0
        self._changed = threading.Condition()
        self._room = asyncio.Event()
        self._arrived = asyncio.Event()

    # The writing end, on the event loop.

    async def feed(self, chunk: bytes) -> None:
        """Queue ``chunk``; waits for room first."""
        while True:
            with self._changed:
                if self._queued < self._limit or self._aborted:
                    self._chunks.append(chunk)
                    self._queued += len(chunk)
                    if self._queued >= self._awaited:
                        self._changed.notify()
                        self._arrived.set()
                    return
                self._room.clear()
            await self._room.wait()

    def end(self) -> None:
        """The body is complete."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._arrived.set()

    def abort(self) -> None:
        """The body will never be complete: whoever reads gets BodyAborted."""
        with self._changed:
            self._aborted = True
            self._changed.notify()
        if self._turn is not None:
            self._turn.abandon()
        self._room.set()

    # The reading end, on the event loop, before there is a thread.

    async def begun(self) -> None:
        """Wait until there is a piece of the body, or all of it, or some of it and no more for a while."""
        await self._arrival(1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REST):
                await self._arrival(self._limit)

    async def gathered(self) -> list[memoryview]:
        """The next piece of the body; empty at its end."""
        await self._arrival(self._limit)
        with self._changed:
            taken = self._taken(1 << 62)
        self._room.set()
        return taken

    async def _arrival(self, least: int) -> None:
        with self._changed:
            self._awaited = least
            self._arrived.clear()
            if self._ready(least):
                return
        await self._arrived.wait()

    def widen(self) -> None:
        """A thread is going to read: let the queue fill."""
        with self._changed:
            self._limit = self._bound
        self._room.set()

    # The reading end, in a thread.

    def check(self) -> None:
        """Raise BodyAborted if the request is gone, also when everything has been read."""
        if self._aborted:
            raise BodyAborted

    @property
    def waiting(self) -> bool:
        """Whether there is something to read, or will be nothing more."""
        return self._ready(1)

    def read(self, size: int = -1) -> bytes:
        """Exactly ``size`` bytes, fewer only at the end of the body, or where it is ``prompt`` (then one at least, and
        ``size`` is positive); everything when ``size`` is negative."""
        if self.prompt:
            return b"".join(self._take(size, least=1))
        parts: list[memoryview] = []
        wanted = size if size >= 0 else 1 << 62
        while wanted and (taken := self._take(wanted, least=min(wanted, self._bound))):
            parts += taken
            wanted -= sum(map(len, taken))
        return b"".join(parts)

    def readinto(self, target: memoryview) -> int:
        """Fill ``target`` with what is there, at least one byte; 0 at the end of the body."""
        done = 0
        for part in self._take(len(target), least=1):
            target[done : done + len(part)] = part
            done += len(part)
        return done

    def _take(self, wanted: int, *, least: int) -> list[memoryview]:
        """What is queued, at most ``wanted`` bytes; waits for ``least``, or the end of the body. Empty after that."""
        while not self._wait(least, self._patience if self._turn is not None else None):
            self._rest(least)
        with self._changed:
            if self._aborted:
                raise BodyAborted
            was_full = self._queued >= self._limit
            taken = self._taken(wanted)
            room = was_full and self._queued < self._limit
        if room:
            self._loop.call_soon_threadsafe(self._room.set)
        return taken

    def _taken(self, wanted: int) -> list[memoryview]:
        taken: list[memoryview] = []
        while wanted and self._chunks:
            head = memoryview(self._chunks[0])[self._offset :]
            if len(head) <= wanted:
                self._chunks.popleft()
                self._offset = 0
            else:
                head = head[:wanted]
                self._offset += wanted
            taken.append(head)
            wanted -= len(head)
            self._queued -= len(head)
        return taken

    def _ready(self, least: int) -> bool:
        return self._queued >= least or self._ended or self._aborted

    def _wait(self, least: int, seconds: float | None) -> bool:
        """Whether there are ``least`` bytes or will be no more, at the latest after ``seconds``."""
        with self._changed:
            self._awaited = least
            return self._ready(least) or self._changed.wait_for(lambda: self._ready(least), seconds)

    def _rest(self, least: int) -> None:
        """The body does not come: give the turn away until there is a piece more of it. Raises BodyAborted."""
        assert self._turn is not None
        with self._changed:
            goal = max(min(self._bound, PIECE), min(least, self._queued + PIECE))
            self._limit = goal
        self._turn.give()
        # Some of it will do after a while: slow senders, too, get on.
        full = self._wait(goal, _REST) or self._wait(min(least, goal), None)
        self._patience = _PATIENCE if full and self._queued >= goal else _PATIENCE / 10
        if self._aborted or not self._turn.again():
            raise BodyAborted
        with self._changed:
            self._limit = self._bound
        self._loop.call_soon_threadsafe(self._room.set)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    @property
    def closed(self) -> bool:
        return False


async def _pump(request: Request, pipe: BodyPipe) -> None:
    """Move the body into ``pipe``, then watch for the client leaving. Ends only by an exception."""
    async for chunk in request.stream():
        if chunk:
            await pipe.feed(chunk)
    pipe.end()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect


async def first(coming: Coroutine[Any, Any, T], failing: asyncio.Task[None]) -> T:
    """The outcome of ``coming``, which is given up when ``failing`` ends, as that does only by an exception."""
    waiting = asyncio.get_running_loop().create_task(coming)
    try:
        await asyncio.wait((waiting, failing), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            await failing
        return waiting.result()
    finally:
        if not waiting.done():
            waiting.cancel()
            await asyncio.wait((waiting,))
        if not waiting.cancelled():
            waiting.exception()


async def unless_first(coming: Coroutine[Any, Any, T], failing: asyncio.Task[None]) -> T:
    """As ``first``, in the task that asks: what is awaited has to end when it is cancelled, as threads do not."""
    task = asyncio.current_task()
    assert task is not None
    if failing.done():
        coming.close()
        failing.result()
    waits, failed = True, False

    def give_up(_: asyncio.Task[None]) -> None:
        nonlocal failed
        if waits:  # the callback may be on its way when the outcome is there
            failed = True
            task.cancel()

    failing.add_done_callback(give_up)
    try:
        return await coming
    except asyncio.CancelledError:
        # Cancelled from elsewhere as well, it is that.
        if failed and not task.uncancel():
            failing.result()
        raise
    finally:
        waits = False
        failing.remove_done_callback(give_up)


async def while_connected(request: Request, coming: Coroutine[Any, Any, T]) -> T:
    """The outcome of ``coming`` for a request whose body was read; ClientDisconnect when its client leaves before."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect

    leaving = asyncio.get_running_loop().create_task(watch())
    try:
        return await first(coming, leaving)
    finally:
        leaving.cancel()
        await asyncio.wait((leaving,))
        if not leaving.cancelled():
            leaving.exception()


class Upload:
    """The body of one request, flowing into a pipe while work in threads reads it. Use as an async context manager.

    Work needs an ``executor``, and has its ``turn`` while it runs, but not while it waits for more of the body.

    When the client leaves or the body passes its limit, running work is told through the pipe and waited for before the
    reason is raised: after ``run`` and after the context, no thread of this request runs on.
    """

    def __init__(self, request: Request, executor: Executor | None, bound: int, turn: Turn | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._executor = executor
        self._turn = turn
        self.pipe = BodyPipe(loop, bound, turn)
        self._pump = loop.create_task(_pump(request, self.pipe))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._pump.cancel()
        await asyncio.wait((self._pump,))
        if not self._pump.cancelled():
            self._pump.exception()  # told by run, or of no interest to anybody any more

    async def until(self, coming: Coroutine[Any, Any, T]) -> T:
        """The outcome of something else than work in a thread, unless the request fails first."""
        return await unless_first(coming, self._pump)

    async def begun(self) -> None:
        """Wait for the beginning of the body, without a thread."""
        await self.until(self.pipe.begun())

    async def gathered(self) -> list[memoryview]:
        """The next piece of the body, without a thread; empty at its end."""
        return await self.until(self.pipe.gathered())

    async def run(self, work: Callable[[BodyPipe], T]) -> T:
        """``work(pipe)`` in a thread. Its result counts even if the client left while it came to its end."""
        if self._turn is None:
            return await self._run(work)
        await self.until(self._turn.take())
        try:
            self.pipe.widen()
            return await self._run(work)
        finally:
            self._turn.give()

    async def _run(self, work: Callable[[BodyPipe], T]) -> T:
        thread = self._loop.run_in_executor(self._executor, work, self.pipe)
        try:
            await asyncio.wait((thread, self._pump), return_when=asyncio.FIRST_COMPLETED)
            if not thread.done():
                # The pump ends only when the request failed; its reason outranks whatever the reader makes of it.
                self.pipe.abort()
                await asyncio.wait((thread,))
                if thread.exception() is not None:
                    await self._pump
            return thread.result()
        except asyncio.CancelledError:
            self.pipe.abort()
            while not thread.done():
                # A second cancellation must not leave the thread behind with the machine half fed.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((thread,))
            thread.exception()  # that it was aborted is no news
            raise
