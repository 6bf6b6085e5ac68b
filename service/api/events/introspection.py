"""Live introspection: a WebSocket over which a tool is asked about refused accesses (docs/introspection.md)."""

from __future__ import annotations

import asyncio
import json
import secrets
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from engine.errors import EngineError
from engine.trace.option_names import Answer, DefaultAnswer
from service.api.common import EXAMPLE_TRACE, EXAMPLE_VM, VmId, access_of, find, principal_of, router, settings_of
from service.api.traces.exits import EXAMPLE_EXIT, ExitRecord, exit_rows
from service.http.handlers import problem_response, refusal
from service.http.wire_types import Document, PageNumber, examples
from service.platform.stamps import stamp
from service.problems import InvalidDocument, Problem, ServiceError, describe
from service.runtime.broker import Interest, Question, Resolution, Tool
from service.runtime.entry import Entry

routes = router("introspection", "/v1/vms/{vm}/introspection", reads="write", writes="write")

SUBPROTOCOL = "subpage.introspection.v1"

# Close codes: RFC 6455's, and 4404 (the machine is gone) of those it leaves to applications.
UNSUPPORTED_DATA = 1003
POLICY = 1008
RESTART = 1012
GONE = 4404

_ATTACH_SECONDS = 10.0
# How long a peer has to take what is queued before the connection is cut.
_CLOSING_SECONDS = 2.0
_OUTBOX = 256
# Messages of one connection that may be refused; a tool that sends more is broken or wants to be a burden.
_REFUSALS = 100
_LONGEST_TIMEOUT = 3600

_EXAMPLE_QUESTION = "q_5be1c2d90f7a4863"
_EXAMPLE_TOOL = "tool_c81f0a4d7e2b9356"

Kind = Literal["violation", "internal-error", "run-failed"]
_NUMBERS = {"read": 0, "write": 1, "execute": 2}


class GfnRange(Document):
    """Consecutive pages."""

    gfn: PageNumber
    npages: int = Field(1, ge=1, description="Number of pages.")


class AttachMessage(Document):
    """Tool → service, the first message: which questions it wants and how it is to be asked."""

    model_config = ConfigDict(
        json_schema_extra=examples({"type": "attach", "priority": 10, "objects": ["modprobe_path"], "timeout": 5})
    )

    type: Literal["attach"] = Field(description="Which message this is.")
    priority: int = Field(0, ge=-1000, le=1000, description="Higher ones are asked first; of equals the first to come.")
    kinds: list[Kind] | None = Field(None, description="`resolution` of the exits it wants; null for all.")
    accesses: list[Literal["read", "write", "execute"]] | None = Field(None, description="Kinds of access; null: all.")
    objects: list[str] | None = Field(None, max_length=1000, description="Exits that touch one of these; null: all.")
    ranges: list[GfnRange] | None = Field(None, max_length=1000, description="Exits on these pages; null for all.")
    timeout: float | None = Field(
        None, gt=0, le=_LONGEST_TIMEOUT, description="Seconds it has for an answer; null: setting `ask_timeout`."
    )
    default_action: DefaultAnswer | None = Field(
        None,
        description="What becomes of a question that it and all after it leave open; null: the next one's, or the "
        "setting `ask_default_action`.",
    )


class AnswerMessage(Document):
    """Tool → service: what becomes of an access. `pass` leaves it to the next tool."""

    model_config = ConfigDict(
        json_schema_extra=examples({"type": "answer", "id": _EXAMPLE_QUESTION, "action": "allow"})
    )

    type: Literal["answer"] = Field(description="Which message this is.")
    id: str = Field(description="Of the question.")
    action: Literal[Answer, "pass"] = Field(description="What becomes of the access.")


class PingMessage(Document):
    """Tool → service: is the service there. Answered by `pong`."""

    model_config = ConfigDict(json_schema_extra=examples({"type": "ping", "data": "1"}))

    type: Literal["ping"] = Field(description="Which message this is.")
    data: str | None = Field(None, max_length=200, description="Comes back.")


class AttachedMessage(Document):
    """Service → tool: it will be asked from now on."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "type": "attached",
                "vm": EXAMPLE_VM,
                "tool": _EXAMPLE_TOOL,
                "priority": 10,
                "timeout": 5.0,
                "default_action": "skip",
                "tools": 1,
            }
        )
    )

    type: Literal["attached"] = Field(description="Which message this is.")
    vm: str = Field(description="Id of the VM.")
    tool: str = Field(description="Id of the tool, on this VM.")
    priority: int = Field(description="Tools of a higher one are asked first.")
    timeout: float = Field(description="Seconds that the tool has for an answer.")
    default_action: str = Field(description="What it gave, or the setting.")
    tools: int = Field(description="Tools that are attached to the VM now.")


class ViolationMessage(Document):
    """Service → tool: an access was refused and waits. Everything before it is committed; the VM may be changed."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "type": "violation",
                "id": _EXAMPLE_QUESTION,
                "vm": EXAMPLE_VM,
                "trace": EXAMPLE_TRACE,
                "vcpu": 0,
                "attempt": 1,
                "deadline": "2026-11-22T21:30:05.000000Z",
                "exit": EXAMPLE_EXIT,
            }
        )
    )

    type: Literal["violation"] = Field(description="Which message this is.")
    id: str = Field(description="Id of the question.")
    vm: str = Field(description="Id of the VM.")
    trace: str | None = Field(description="Id that the result of the replay will have; null for a single access.")
    vcpu: int = Field(description="KVM vCPU id.")
    attempt: int = Field(description="1, and one more each time that `retry` was refused again.")
    deadline: str = Field(description="RFC 3339, UTC: when the question goes on to the next tool.")
    exit: ExitRecord = Field(description="What happened.")


class ResolvedMessage(Document):
    """Service → every tool that was asked: what became of the access."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "type": "resolved",
                "id": _EXAMPLE_QUESTION,
                "action": "allow",
                "reason": "answer",
                "by": _EXAMPLE_TOOL,
            }
        )
    )

    type: Literal["resolved"] = Field(description="Which message this is.")
    id: str = Field(description="Id of the question.")
    action: Answer | None = Field(description="Null where the replay ended without one.")
    reason: Literal["answer", "default", "ended"] = Field(
        description="Who decided: a tool, the default, or the end of the replay."
    )
    by: str | None = Field(description="Id of the tool that answered.")


class PongMessage(Document):
    """Service → tool: the answer to a ping."""

    model_config = ConfigDict(json_schema_extra=examples({"type": "pong", "data": "1"}))

    type: Literal["pong"] = Field(description="Which message this is.")
    data: str | None = Field(description="What came with the ping.")


class RefusedMessage(Document):
    """Service → tool: a message was not taken; the connection goes on unless it is closed."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "type": "error",
                "problem": {
                    "type": "/problems/not-found",
                    "title": "Not found",
                    "status": 404,
                    "detail": "id: must be the id of a question that waits for an answer",
                    "instance": f"/v1/vms/{EXAMPLE_VM}/introspection",
                    "code": "not-found",
                },
            }
        )
    )

    type: Literal["error"] = Field(description="Which message this is.")
    problem: Problem = Field(description="Why it was not taken.")


TAKEN = (AttachMessage, AnswerMessage, PingMessage)
SENT = (AttachedMessage, ViolationMessage, ResolvedMessage, PongMessage, RefusedMessage)
_Message = AttachMessage | AnswerMessage | PingMessage
_message: TypeAdapter[_Message] = TypeAdapter(Annotated[_Message, Field(discriminator="type")])


class Session(Tool):
    """One connection. It becomes a tool of the machine with its ``attach``."""

    def __init__(self, socket: WebSocket, entry: Entry) -> None:
        settings = settings_of(socket)
        self.id = f"tool_{secrets.token_hex(8)}"
        self.priority = 0
        self.interest = Interest()
        self.timeout = settings.ask_timeout
        self.default_action: str | None = None
        self.attached = False
        self._refused = 0
        self._default = settings.ask_default_action
        self._socket = socket
        self._entry = entry
        self._principal = principal_of(socket)
        # Documents to be sent, or the close code and reason after which nothing is.
        self._outbox: asyncio.Queue[dict[str, Any] | tuple[int, str]] = asyncio.Queue()
        self.closing = asyncio.Event()

    # As a tool

    @property
    def entitled(self) -> bool:
        if access_of(self._socket).holds(self._principal):
            return True
        self.expel()
        return False

    def expel(self) -> None:
        self.close(POLICY, "the token is not valid any more")

    def ask(self, question: Question) -> None:
        deadline = datetime.now(UTC) + timedelta(seconds=self.timeout)
        [row] = exit_rows(question.exit)
        self.send(
            {
                "type": "violation",
                "id": question.id,
                "vm": self._entry.id,
                "trace": question.trace,
                "vcpu": row["vcpu"],
                "attempt": question.attempt,
                "deadline": stamp(deadline),
                "exit": row,
            }
        )

    def tell(self, question: Question, resolution: Resolution) -> None:
        self.send(
            {
                "type": "resolved",
                "id": question.id,
                "action": resolution.action,
                "reason": resolution.reason,
                "by": resolution.by,
            }
        )

    def dismiss(self, why: Exception) -> None:
        if self._entry.lost:
            self.close(RESTART, "another process has taken the store over")
        else:
            self.close(GONE, str(why))

    # Messages out

    def send(self, document: dict[str, Any]) -> None:
        """Queue a message; a peer that does not read them loses the connection."""
        if self._outbox.qsize() >= _OUTBOX:
            self.close(POLICY, "messages are not read")
        else:
            self._outbox.put_nowait(document)

    def close(self, code: int, reason: str) -> None:
        """End the connection after what is queued; it is no tool from now on."""
        self._entry.broker.leave(self)
        self._outbox.put_nowait((code, reason[:120]))
        self.closing.set()

    def refuse(self, error: Exception) -> None:
        self._refused += 1
        if self._refused > _REFUSALS:
            if self._refused == _REFUSALS + 1:
                self.close(POLICY, "too many messages that cannot be taken")
            return
        body, _ = describe(error, self._socket.url.path)
        self.send({"type": "error", "problem": body})

    async def send_all(self) -> None:
        while True:
            item = await self._outbox.get()
            if isinstance(item, tuple):
                await self._socket.close(*item)
                return
            await self._socket.send_text(msgspec.json.encode(item).decode())

    async def cut(self) -> None:
        """Ends some time after ``close``, whether or not the peer takes what is queued."""
        await self.closing.wait()
        await asyncio.sleep(_CLOSING_SECONDS)

    # Messages in

    async def receive_all(self) -> None:
        """Take messages until the peer is gone."""
        try:
            async with asyncio.timeout(_ATTACH_SECONDS):
                while not self.attached:
                    await self._take(await self._socket.receive())
        except TimeoutError:
            self.close(POLICY, "attach comes first, within 10 seconds")
        while True:
            await self._take(await self._socket.receive())

    async def _take(self, event: Any) -> None:
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code") or 1006)
        if event.get("text") is None:
            self.close(UNSUPPORTED_DATA, "messages are JSON, in text frames")
            return
        if not self.entitled:
            return
        try:
            self._obey(_parsed(event["text"]))
        except (ServiceError, EngineError) as refused:
            self.refuse(refused)

    def _obey(self, message: _Message) -> None:
        if isinstance(message, PingMessage):
            self.send({"type": "pong", "data": message.data})
        elif isinstance(message, AttachMessage):
            self._attach(message)
        else:
            self._answer(message)

    def _attach(self, message: AttachMessage) -> None:
        if self.attached:
            raise InvalidDocument(
                "must not be sent again: it is the first message, once", field="type", value=message.type
            )
        self._entry.broker.check_default(message.default_action)
        self.attached = True
        self.priority = message.priority
        self.timeout = message.timeout or self.timeout
        self.default_action = message.default_action
        self.interest = Interest(
            frozenset(message.kinds) if message.kinds is not None else None,
            frozenset(map(_NUMBERS.__getitem__, message.accesses)) if message.accesses is not None else None,
            frozenset(message.objects) if message.objects is not None else None,
            tuple((item.gfn, item.gfn + item.npages) for item in message.ranges)
            if message.ranges is not None
            else None,
        )
        broker = self._entry.broker
        broker.attach(self)
        self.send(
            {
                "type": "attached",
                "vm": self._entry.id,
                "tool": self.id,
                "priority": self.priority,
                "timeout": self.timeout,
                "default_action": self.default_action or self._default,
                "tools": len(broker.tools),
            }
        )

    def _answer(self, message: AnswerMessage) -> None:
        if not self.attached:
            raise InvalidDocument("must be attach in the first message", field="type", value=message.type)
        self._entry.broker.answer(self, message.id, message.action)
        self._socket.app.state.audit.write(
            "answer", self._principal, vm=self._entry.id, tool=self.id, question=message.id, action=message.action
        )


def _parsed(text: str) -> _Message:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"a message must be JSON: {error}", code="malformed-body") from None
    try:
        return _message.validate_python(document)
    except ValidationError as error:
        raise refusal(error.errors(), _Message) from None


@routes.websocket("")
async def introspect(socket: WebSocket, vm: VmId) -> None:
    try:
        if socket.scope["query_string"]:
            raise InvalidDocument("there are no parameters; what a tool wants is in its attach", field="query")
        entry = find(socket, vm)
        session = Session(socket, entry)
        entry.broker.connect(session, settings_of(socket).max_tools)
    except (ServiceError, EngineError) as refused:
        await socket.receive()  # the opening, which the refusal answers
        await problem_response(socket, refused)(socket.scope, socket.receive, socket.send)
        return
    access = access_of(socket)
    try:
        with access.watching(principal_of(socket), session.expel):
            await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
            await _converse(session)
    finally:
        entry.broker.leave(session)


async def _converse(session: Session) -> None:
    """Both directions, until one of them ends."""
    loop = asyncio.get_running_loop()
    directions = (session.receive_all(), session.send_all(), session.cut())
    tasks = [loop.create_task(direction) for direction in directions]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            # Whichever direction noticed first that the peer is gone.
            left = isinstance(outcome, WebSocketDisconnect | asyncio.CancelledError | OSError)
            if isinstance(outcome, BaseException) and not left:
                raise outcome
