"""Tools that are asked what becomes of refused accesses: many questions at once, through every interruption."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from subpage.core import Core, filled
from subpage.errors import NotSubpage, Problem, Unauthenticated, Unreachable, parsed, problem_of
from subpage.events import PAUSES
from subpage.html import Document
from subpage.modes import run
from subpage.transports import Socket
from subpage.wire import SocketClosed

T = TypeVar("T")

LOG = logging.getLogger("subpage")

PROTOCOL = "subpage.introspection.v1"
PATH = "/v1/vms/{vm}/introspection"
ANSWERS = frozenset({"skip", "allow", "grant", "retry", "stop", "pass"})
WAITING = 1000  # questions that a tool has taken and not answered; more are passed on
_GONE, _POLICY = 4404, 1008
_KEPT_ERRORS = 100


class Question:
    """An access that was refused and waits. ``exit`` is its exit record, ``message`` all that was asked."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self.message = message
        self.id = str(message["id"])
        self.vm = str(message["vm"])
        self.trace: str | None = message["trace"]
        self.attempt = int(message["attempt"])
        self.deadline = str(message["deadline"])
        self.exit = Document(message["exit"])
        self.vcpu = int(self.exit["vcpu"])
        self.gpa = int(self.exit["gpa"], 16)
        self.gfn = int(self.exit["gfn"], 16)
        self.denied = int(self.exit["denied"], 16)
        self.objects: list[str] = list(self.exit["objects"])

    def __repr__(self) -> str:
        return f"<question {self.id}: {self.exit['name']} at {self.gpa:#x}, objects {self.objects}>"

    def _repr_html_(self) -> str:
        return self.exit._repr_html_()


Handler = Callable[[Question], str | Awaitable[str]]
"""Takes a question and gives ``skip``, ``allow``, ``grant``, ``retry``, ``stop`` or ``pass``; may use the machine."""


class _Tool:
    """What a tool of either kind is: its wishes, and one connection after the other."""

    def __init__(self, core: Core, vm: str, handler: Handler, wishes: Mapping[str, Any], workers: int) -> None:
        self._core, self._vm, self._handler = core, vm, handler
        self._attach = {"type": "attach", **{name: wish for name, wish in wishes.items() if wish is not None}}
        self._room = asyncio.Semaphore(workers)
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None]
        self._socket: Socket
        self._ending = False
        self.attached: Document | None = None
        """What the service said when it was attached last: ``tool``, ``timeout``, ``tools`` and so on."""
        self.answered = 0
        """Questions that were answered."""
        self.errors: list[Exception] = []
        """What the handler raised: those questions were passed on. The first hundred."""

    async def _connected(self) -> Socket:
        """A socket that is attached. Raises Problem, Unreachable."""
        url = "ws" + self._core.url.removeprefix("http") + filled("introspection", PATH, {"vm": self._vm})
        headers = {name: self._core.headers[name] for name in ("Authorization",) if name in self._core.headers}
        socket = await self._core.transport.dial(url, headers, PROTOCOL)
        try:
            await socket.send(json.dumps(self._attach))
            message = _read(await socket.receive())
            if message["type"] == "error":
                raise problem_of(message["problem"], int(message["problem"]["status"]))
            if message["type"] != "attached":
                raise NotSubpage(f"{url} does not speak {PROTOCOL}")
        except SocketClosed as end:
            await socket.close()
            raise Unreachable(f"the connection for introspection was closed: {end.code} {end.reason}") from None
        except BaseException:
            await socket.close()
            raise
        self.attached, self._socket = Document(message), socket
        return socket

    async def _begin(self) -> None:
        """Attached, and answering. Raises Problem, Unreachable."""
        self._serving = asyncio.create_task(self._serve(await self._connected()))

    async def _end(self) -> None:
        """Left: what is not answered yet goes to the next tool."""
        self._ending = True
        await self._socket.close()
        everything = [*self._tasks, self._serving]
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)

    async def _serve(self, socket: Socket) -> None:
        """Until the end of the machine, of the token, or of the tool."""
        while True:
            try:
                while True:
                    message = _read(await socket.receive())
                    if message["type"] == "violation":
                        question = _question(message)
                        if len(self._tasks) < WAITING:
                            task = asyncio.create_task(self._answer(socket, question))
                            self._tasks.add(task)
                            task.add_done_callback(self._tasks.discard)
                        else:
                            await self._say(socket, question, "pass")
                    elif message["type"] == "error":
                        LOG.info("an answer was not taken: %s", message["problem"].get("detail"))
            except SocketClosed as end:
                await socket.close()  # where it was what came that was wrong, it is open
                if self._ending or end.code == _GONE:
                    return
                if end.code == _POLICY and "token" in end.reason:
                    raise Unauthenticated({"detail": end.reason}, 401) from None
                LOG.info("introspection of %s broke off (%s %s); attaching again", self._vm, end.code, end.reason)
            socket = await self._again()

    async def _again(self) -> Socket:
        """Attached once more, however long that takes. Raises Problem."""
        pauses = itertools.chain(PAUSES, itertools.repeat(PAUSES[-1]))
        while True:
            await asyncio.sleep(next(pauses))
            try:
                return await self._connected()
            except Unreachable:
                continue
            except Problem as problem:
                if problem.status not in (429, 503):
                    raise

    async def _answer(self, socket: Socket, question: Question) -> None:
        """Ask the handler; what it fails at is passed on."""
        async with self._room:
            try:
                if inspect.iscoroutinefunction(self._handler):
                    answer = await self._handler(question)
                else:
                    answer = await asyncio.to_thread(self._handler, question)
                if answer not in ANSWERS:
                    raise ValueError(f"a handler answers with one of {', '.join(sorted(ANSWERS))}, not {answer!r}")
            except Exception as error:
                LOG.error("the handler failed at %r, which is passed on", question, exc_info=error)
                self.errors += [error][: _KEPT_ERRORS - len(self.errors)]
                answer = "pass"
            await self._say(socket, question, answer)

    async def _say(self, socket: Socket, question: Question, answer: str) -> None:
        """An answer, to the connection that asked; where that is gone, the question is gone, too."""
        try:
            await socket.send(json.dumps({"type": "answer", "id": question.id, "action": answer}))
            self.answered += 1
        except SocketClosed:
            LOG.info("the answer to %s came after the end of its connection", question.id)


def _read(text: str) -> dict[str, Any]:
    message = parsed(text)
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise SocketClosed(1002, "a message is not one of the protocol")
    return message


def _question(message: dict[str, Any]) -> Question:
    try:
        return Question(message)
    except (KeyError, TypeError, ValueError) as error:
        raise SocketClosed(1002, f"a question is not one of the protocol: {error!r}") from None


class Tool(_Tool):
    """A tool that answers from threads of its own, until it is closed. Use as a context.
    Leaving it raises what the handler raised first, if it did; ``wait`` returns when the machine is gone."""

    def __init__(self, core: Core, vm: str, handler: Handler, wishes: Mapping[str, Any], workers: int) -> None:
        super().__init__(core, vm, handler, wishes, workers)
        if core.met is None:
            run(core.meet())
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(workers, thread_name_prefix="subpage-tool"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="subpage-attach", daemon=True)
        self._thread.start()
        try:
            self._done(self._begin())
        except BaseException:
            self._stop()
            raise

    def _done(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop(self) -> None:
        self._done(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the machine is gone within ``timeout`` seconds. Raises Problem, Unauthenticated."""
        if not self._serving.done():
            self._done(asyncio.wait([self._serving], timeout=timeout))
        if self._serving.done() and not self._serving.cancelled():
            self._serving.result()
        return self._serving.done()

    def close(self) -> None:
        """Leave: what is not answered yet goes to the next tool."""
        if not self._ending:
            self._done(self._end())
            self._stop()

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.close()
        if kind is None and self.errors:
            raise self.errors[0]


class AsyncTool(_Tool):
    """A tool that answers from tasks. Use with ``async with``."""

    async def __aenter__(self) -> AsyncTool:
        if self._core.met is None:
            await self._core.meet()
        await self._begin()
        return self

    async def wait(self) -> None:
        """Until the machine is gone. Raises Problem, Unauthenticated."""
        await asyncio.shield(self._serving)

    async def __aexit__(self, kind: object, *rest: object) -> None:
        await self._end()
        if kind is None and self.errors:
            raise self.errors[0]
