"""Where accesses that ask meet the tools that answer: a broker for each machine, used from the event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from engine.errors import Conflict, InvalidValue, LimitExceeded, NotFound
from engine.trace.interactive import Load
from engine.trace.results import ExitColumns

# What a tool answers when another one is to decide.
PASS = "pass"
# In place of an answer: there was none in time.
_LATE = "late"
# What cannot become of an access that has happened: those of a guest that runs while it is watched.
UNDONE = "skip"
LANDED_RULE = (
    "must not be skip while a guest runs that is watched live: its stores have landed when they are asked about"
)


@dataclass(frozen=True, slots=True)
class Interest:
    """Which questions a tool wants: those that fit every member that is given."""

    kinds: frozenset[str] | None = None
    accesses: frozenset[int] | None = None
    objects: frozenset[str] | None = None
    gfns: tuple[tuple[int, int], ...] | None = None  # (first, end)


@dataclass(slots=True, eq=False)
class Question:
    """One exit that a replay or an access waits at. ``attempt`` counts from 1: each ``retry`` may ask again.

    ``trace`` is the id that the result of the replay will have, None for a single access; ``exit`` is one record.
    ``landed``: the access has happened, and cannot be undone. With ``load`` it is about a load of CR3 instead, and
    ``exit`` has no record; ``value`` is what is loaded if the answer is allow, None for what is recorded.
    """

    exit: ExitColumns
    trace: str | None
    attempt: int
    landed: bool = False
    load: Load | None = None
    value: int | None = None
    id: str = field(default_factory=lambda: f"q_{secrets.token_hex(8)}")
    tool: Tool | None = None
    answer: asyncio.Future[str | None] | None = None

    def fits(self, interest: Interest) -> bool:
        """Whether a tool wants to be asked."""
        if self.load is not None:
            return False
        gfn = int(self.exit.column("gfn")[0])
        return (
            (interest.kinds is None or self.exit.resolution_names()[0] in interest.kinds)
            and (interest.accesses is None or int(self.exit.column("access")[0]) in interest.accesses)
            and (interest.objects is None or not interest.objects.isdisjoint(self.exit.objects()[0]))
            and (interest.gfns is None or any(first <= gfn < end for first, end in interest.gfns))
        )


@dataclass(frozen=True, slots=True)
class Resolution:
    """What was decided, and how: ``reason`` is answer, default, or ended where nothing was. ``by`` is a tool's id."""

    action: str | None
    reason: str
    by: str | None = None
    timeouts: int = 0


class Tool(ABC):
    """An attached tool. What it is told must not make the one who tells wait."""

    id: str
    priority: int
    interest: Interest
    timeout: float
    default_action: str | None
    # vCPUs, by KVM's ids, whose loads of CR3 it wants to be asked about. Whoever changes it tells the broker.
    watched: frozenset[int] = frozenset()

    @property
    @abstractmethod
    def entitled(self) -> bool:
        """Whether it may be asked still. One that may not leaves, at the latest when this is looked at."""

    def wants(self, question: Question) -> bool:
        """Whether it is to be asked."""
        return question.fits(self.interest)

    @abstractmethod
    def ask(self, question: Question) -> None:
        """Put a question to it."""

    @abstractmethod
    def tell(self, question: Question, resolution: Resolution) -> None:
        """What became of a question that was put to it."""

    def vcpus_came(self) -> None:
        """The machine has vCPUs that it had not."""
        return

    @abstractmethod
    def dismiss(self, why: Exception) -> None:
        """The machine is gone: the connection ends."""


class Broker:
    """The tools of one machine, and the questions that wait."""

    def __init__(self) -> None:
        self.tools: list[Tool] = []
        self.questions: dict[str, Question] = {}
        self.connections: set[Tool] = set()
        self._holding: set[Tool] = set()
        self._let_go = asyncio.Event()
        self._live = 0
        self._watched: frozenset[int] = frozenset()

    # Guests that run

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """A guest runs meanwhile, whose accesses have happened when they are asked about. Raises Conflict where a tool
        is attached that leaves the undoing of them as its default."""
        if any(tool.default_action == UNDONE for tool in self.tools):
            raise Conflict(f"the default_action of an attached tool {LANDED_RULE}", field="on_violation", value="ask")
        self._live += 1
        try:
            yield
        finally:
            self._live -= 1

    def check_default(self, action: str | None) -> None:
        """Whether a tool may attach with this default. Raises InvalidValue."""
        if self._live and action == UNDONE:
            raise InvalidValue(LANDED_RULE, field="default_action", value=action)

    # Tools

    def connect(self, tool: Tool, most: int) -> None:
        """Take a place for a connection, from one that is not entitled to its own if need be. Raises LimitExceeded."""
        if len(self.connections) >= most and sum(known.entitled for known in list(self.connections)) >= most:
            raise LimitExceeded(f"at most {most} tools may be attached to a VM", field="max_tools", value=most)
        self.connections.add(tool)

    def leave(self, tool: Tool) -> None:
        """It is no tool any more, and its place is free."""
        self.connections.discard(tool)
        self.release(tool)
        self.detach(tool)

    def attach(self, tool: Tool) -> None:
        """Ask it from now on."""
        self.tools.append(tool)
        self.tools.sort(key=lambda known: -known.priority)  # stable: of equals the first that came
        self.watch()

    def detach(self, tool: Tool) -> None:
        """Ask it no more; what it was asked goes to the next."""
        if tool not in self.tools:
            return
        self.tools.remove(tool)
        self.watch()
        for question in self.questions.values():
            if question.tool is tool and question.answer is not None and not question.answer.done():
                question.answer.set_result(None)

    def answer(self, tool: Tool, question_id: str, action: str) -> None:
        """What a tool says. Raises NotFound for a question that does not wait, Conflict for another tool's,
        InvalidValue for what cannot become of the access; the question waits on then."""
        question = self.questions.get(question_id)
        if question is None:
            raise NotFound("must be the id of a question that waits for an answer", field="id", value=question_id)
        if question.tool is not tool or question.answer is None or question.answer.done():
            raise Conflict("the question is not put to this tool, or not any more", field="id", value=question_id)
        if question.landed and action == UNDONE:
            raise InvalidValue(LANDED_RULE, field="action", value=action)
        question.answer.set_result(action)

    def end(self, why: Callable[[], Exception]) -> None:
        """The machine is gone: who waits gets an exception that says so, tools are dismissed."""
        for question in self.questions.values():
            if question.answer is not None and not question.answer.done():
                question.answer.set_exception(why())
        for tool in list(self.tools):
            self.release(tool)
            tool.dismiss(why())

    def vcpus_came(self) -> None:
        """The machine has vCPUs that it had not."""
        for tool in list(self.tools):
            tool.vcpus_came()

    def watch(self) -> None:
        """Look again which loads of CR3 the tools want to be asked about."""
        self._watched = frozenset().union(*(tool.watched for tool in self.tools))

    def watches(self, vcpu: int) -> bool:
        """Whether a tool wants to be asked about the loads of CR3 of a vCPU, by KVM's id. From any thread."""
        return vcpu in self._watched

    # Holding the guest

    def hold(self, tool: Tool) -> None:
        """No access that asks goes on from now on, until every tool that holds the guest has let go of it."""
        self._holding.add(tool)

    def release(self, tool: Tool) -> None:
        """It goes on, as far as this tool is concerned."""
        self._holding.discard(tool)
        if not self._holding:
            self._let_go.set()

    @property
    def held(self) -> bool:
        """Whether a tool holds the guest."""
        return bool(self._holding)

    async def released(self) -> None:
        """Wait until no tool holds the guest."""
        while self._holding:
            self._let_go.clear()
            await self._let_go.wait()

    # Questions

    async def ask(
        self, question: Question, default_action: str, most: int, give_up: Callable[[], Exception | None]
    ) -> Resolution:
        """Put a question to one tool after the other until one answers.

        The default is that of the first of those asked that has one and is still there, else ``default_action``.
        ``give_up`` may name a reason to end instead of going on without a tool that has left. Raises that,
        LimitExceeded when ``most`` questions wait already, or why the machine is gone.
        """
        if len(self.questions) >= most:
            rule = f"at most {most} accesses of one machine may wait for an answer"
            raise LimitExceeded(rule, field="max_questions", value=most)
        self.questions[question.id] = question
        asked: list[Tool] = []
        timeouts = 0
        resolution = Resolution(None, "ended")
        try:
            while (tool := self._next(question, asked)) is not None:
                asked.append(tool)
                action = await self._put(question, tool)
                timeouts += action is _LATE
                if action not in (None, PASS, _LATE):
                    resolution = Resolution(action, "answer", tool.id, timeouts)
                    return resolution
                reason = give_up() if tool not in self.tools else None
                if reason is not None:
                    raise reason
            left = (tool.default_action for tool in asked if tool in self.tools and tool.default_action)
            resolution = Resolution(next(left, default_action), "default", None, timeouts)
            return resolution
        finally:
            del self.questions[question.id]
            for tool in asked:
                if tool in self.tools:
                    tool.tell(question, resolution)

    def _next(self, question: Question, asked: list[Tool]) -> Tool | None:
        fitting = (tool for tool in self.tools if tool not in asked and tool.wants(question))
        return next((tool for tool in fitting if tool.entitled), None)

    async def _put(self, question: Question, tool: Tool) -> str | None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str | None] = loop.create_future()
        question.tool, question.answer = tool, answer
        limit = loop.call_later(tool.timeout, _end_waiting, answer)
        try:
            tool.ask(question)
            return await answer
        finally:
            limit.cancel()
            question.tool = None
            answer.cancel()


def _end_waiting(answer: asyncio.Future[str | None]) -> None:
    if not answer.done():
        answer.set_result(_LATE)
