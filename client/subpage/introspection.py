"""Tools that are asked what becomes of refused accesses: many questions at once, through every interruption."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from subpage.core import Core, filled
from subpage.errors import Error, NotSubpage, Problem, Unauthenticated, Unreachable, problem_of
from subpage.events import PAUSES
from subpage.html import Document
from subpage.modes import run
from subpage.transports import Socket
from subpage.wire import SocketClosed

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

    def __init__(self, core: Core, vm: str, handler: Handler, wishes: Mapping[str, Any]) -> None:
        self._core, self._vm, self._handler = core, vm, handler
        self._attach = {"type": "attach", **{name: wish for name, wish in wishes.items() if wish is not None}}
        self._socket: Socket | None = None
        self._ending = False
        self._waiting = 0
        self.attached: Document | None = None
        """What the service said when it was attached last: ``tool``, ``timeout``, ``tools`` and so on."""
        self.answered = 0
        """Questions that were answered."""
        self.errors: list[Exception] = []
        """What the handler raised: those questions were passed on. The first hundred."""

    async def _connected(self) -> Socket:
        """A socket that is attached. Raises Problem, Unreachable."""
        if self._core.met is None:
            await self._core.meet()
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
            raise Unreachable(f"the connection for introspection was closed: {end.code} {end.reason}") from None
        except BaseException:
            await socket.close()
            raise
        self.attached, self._socket = Document(message), socket
        return socket

    async def _serve(self, socket: Socket, take: Callable[[Socket, Question], object]) -> None:
        """Until the end of the machine, of the token, or of the tool."""
        while True:
            try:
                while True:
                    message = _read(await socket.receive())
                    if message["type"] == "violation":
                        question = Question(message)
                        if self._waiting < WAITING:
                            self._waiting += 1
                            take(socket, question)
                        else:
                            await self._say(socket, question, "pass")
                    elif message["type"] == "error":
                        LOG.info("an answer was not taken: %s", message["problem"].get("detail"))
            except SocketClosed as end:
                if self._ending or end.code == _GONE:
                    return
                if end.code == _POLICY and "token" in end.reason:
                    raise Unauthenticated({"detail": end.reason}, 401) from None
                LOG.info("introspection of %s broke off (%s %s); attaching again", self._vm, end.code, end.reason)
            socket = await self._again()

    async def _again(self) -> Socket:
        """Attached once more. Raises Unreachable when the tool has left meanwhile."""
        failures = 0
        while True:
            await self._core.transport.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
            failures += 1
            try:
                socket = await self._connected()
            except Problem as problem:
                if problem.status not in (429, 503):
                    raise
            except Unreachable:
                if self._ending:
                    raise
            else:
                if not self._ending:
                    return socket
                await socket.close()
            if self._ending:
                raise Unreachable("the tool has left")

    async def _say(self, socket: Socket, question: Question, answer: str) -> None:
        """An answer, to the connection that asked; where that is gone, the question is gone, too."""
        try:
            await socket.send(json.dumps({"type": "answer", "id": question.id, "action": answer}))
            self.answered += 1
        except SocketClosed:
            LOG.info("the answer to %s came after the end of its connection", question.id)

    def _failed(self, question: Question, error: Exception) -> str:
        LOG.error("the handler failed at %r, which is passed on", question, exc_info=error)
        if len(self.errors) < _KEPT_ERRORS:
            self.errors.append(error)
        return "pass"

    def _raise(self) -> None:
        if self.errors:
            raise self.errors[0]


def _checked(answer: Any) -> str:
    if answer not in ANSWERS:
        raise ValueError(f"a handler answers with one of {', '.join(sorted(ANSWERS))}, not {answer!r}")
    return str(answer)


def _read(text: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise SocketClosed(1002, "a message is not one of the protocol")
    return message


class Tool(_Tool):
    """A tool that answers from threads of its own, until it is closed. Use as a context.

    Leaving it raises what the handler raised first, if it did; ``wait`` returns when the machine is gone.
    """

    def __init__(self, core: Core, vm: str, handler: Handler, wishes: Mapping[str, Any], workers: int) -> None:
        super().__init__(core, vm, handler, wishes)
        first = run(self._connected())
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="subpage-tool")
        self._lock = threading.Lock()
        self._end: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(first,), name="subpage-attach", daemon=True)
        self._thread.start()

    def _run(self, first: Socket) -> None:
        try:
            run(self._serve(first, lambda socket, question: self._pool.submit(self._answer, socket, question)))
        except Error as error:
            self._end = None if self._ending else error
        except Exception as error:  # noqa: BLE001 - a thread has nobody else to tell
            self._end = error

    def _answer(self, socket: Socket, question: Question) -> None:
        try:
            answer = _checked(self._handler(question))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises
            answer = self._failed(question, error)
        with self._lock:
            self._waiting -= 1
        run(self._say(socket, question, answer))

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the machine is gone within ``timeout`` seconds. Raises Problem, Unauthenticated."""
        self._thread.join(timeout)
        if self._end is not None:
            raise self._end
        return not self._thread.is_alive()

    def close(self) -> None:
        """Leave: what is not answered yet goes to the next tool."""
        self._ending = True
        if self._socket is not None:
            run(self._socket.close())
        self._thread.join(10)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.close()
        if kind is None:
            self._raise()


class AsyncTool(_Tool):
    """A tool that answers from tasks. Use with ``async with``."""

    def __init__(self, core: Core, vm: str, handler: Handler, wishes: Mapping[str, Any], workers: int) -> None:
        super().__init__(core, vm, handler, wishes)
        self._room = asyncio.Semaphore(workers)
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncTool:
        first = await self._connected()
        self._serving = asyncio.create_task(self._serve(first, self._take))
        return self

    def _take(self, socket: Socket, question: Question) -> None:
        task = asyncio.create_task(self._answer(socket, question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, socket: Socket, question: Question) -> None:
        async with self._room:
            try:
                if inspect.iscoroutinefunction(self._handler):
                    said: Any = await self._handler(question)
                else:
                    said = await asyncio.to_thread(self._handler, question)
                answer = _checked(said)
            except Exception as error:  # noqa: BLE001 - whatever a handler raises
                answer = self._failed(question, error)
            self._waiting -= 1
            await self._say(socket, question, answer)

    async def wait(self) -> None:
        """Until the machine is gone. Raises Problem, Unauthenticated."""
        if self._serving is not None:
            await asyncio.shield(self._serving)

    async def __aexit__(self, kind: object, *rest: object) -> None:
        self._ending = True
        if self._socket is not None:
            await self._socket.close()
        everything: list[asyncio.Task[None]] = [*self._tasks, *([self._serving] if self._serving else [])]
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)
        if kind is None:
            self._raise()
