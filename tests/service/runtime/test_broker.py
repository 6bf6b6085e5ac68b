"""The broker without a server: who is asked next, and what ends a question; and the checks of an opening handshake."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.errors import Conflict, NotFound
from engine.machine import VirtualMachine
from engine.trace.interactive_access import InteractiveAccess
from engine.trace.results import ExitColumns
from engine.trace.single import AccessRequest
from service.api.events.introspection import GONE, RESTART, Session
from service.http.sockets import token_among
from service.problems import NotReady, StoreUnavailable
from service.runtime.asking import Asker
from service.runtime.broker import Broker, Interest, Question, Resolution, Tool
from service.runtime.entry import Entry
from service.security.access import LOCAL_ADMIN, AccessControl, Principal
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.engine.builders import machine, set_map


@pytest.fixture(scope="module")
def refused() -> ExitColumns:
    """The exit of a write to a page that is shut."""
    vm: VirtualMachine = machine()
    set_map(vm, 5, 0)
    run = InteractiveAccess()
    vm.access(AccessRequest(gpa=0x5000, on_violation="ask"), run)
    assert run.asked is not None
    return run.asked


class Scripted(Tool):
    """Does what the test says when it is asked; remembers what it was told."""

    def __init__(self, broker: Broker, does: Callable[[Scripted, Question], None], **members: Any) -> None:
        self.id, self.priority, self.timeout, self.default_action = "tool", 0, 30.0, None
        self.interest, self.may = Interest(), True
        vars(self).update(members)
        self.does = does
        self.told: list[Resolution] = []
        self.dismissed: list[Exception] = []
        broker.attach(self)

    @property
    def entitled(self) -> bool:
        return self.may

    def ask(self, question: Question) -> None:
        self.does(self, question)

    def tell(self, question: Question, resolution: Resolution) -> None:
        self.told.append(resolution)

    def dismiss(self, why: Exception) -> None:
        self.dismissed.append(why)


def resolve(broker: Broker, exit: ExitColumns, give_up: Callable[[], Exception | None] = lambda: None) -> Resolution:
    return asyncio.run(broker.ask(Question(exit, None, 1), "skip", 8, give_up))


def test_every_tool_that_holds_the_guest_has_to_let_go() -> None:
    async def scenario() -> None:
        broker = Broker()
        tools = [Scripted(broker, lambda tool, question: None) for _ in range(3)]
        for tool in tools:
            broker.hold(tool)
        waiting = asyncio.create_task(broker.released())
        for let_go in (broker.release, broker.leave):
            let_go(tools.pop())
            await asyncio.sleep(0)
            assert broker.held and not waiting.done()
        # The machine is deleted.
        broker.end(lambda: NotFound("gone"))
        await asyncio.wait_for(waiting, 10)

    asyncio.run(scenario())


def test_order(refused: ExitColumns) -> None:
    broker, seen = Broker(), []

    def passes(tool: Scripted, question: Question) -> None:
        seen.append(tool.id)
        broker.answer(tool, question.id, "pass")

    for name, priority in (("low", -1), ("first", 3), ("second", 3), ("may not", 9)):
        Scripted(broker, passes, id=name, priority=priority, may=name != "may not")
    assert resolve(broker, refused) == Resolution("skip", "default")
    assert seen == ["first", "second", "low"] and not broker.questions


def test_who_may_answer(refused: ExitColumns) -> None:
    broker = Broker()

    def meddles(tool: Scripted, question: Question) -> None:
        with pytest.raises(Conflict):
            broker.answer(other, question.id, "allow")
        with pytest.raises(NotFound):
            broker.answer(tool, "q_0", "allow")
        broker.answer(tool, question.id, "grant")
        with pytest.raises(Conflict):
            broker.answer(tool, question.id, "allow")

    other = Scripted(broker, meddles, id="other", priority=-1)
    tool = Scripted(broker, meddles, id="asked")
    assert resolve(broker, refused) == Resolution("grant", "answer", "asked")
    assert tool.told == [Resolution("grant", "answer", "asked")] and other.told == []


def test_a_tool_that_leaves_takes_its_default_along(refused: ExitColumns) -> None:
    broker = Broker()
    tool = Scripted(broker, lambda tool, question: broker.detach(tool), default_action="stop")
    assert resolve(broker, refused) == Resolution("skip", "default")
    assert tool.told == []
    broker.detach(tool)  # a second time does nothing


def test_a_reason_to_give_up_counts_when_a_tool_has_left(refused: ExitColumns) -> None:
    broker = Broker()
    Scripted(broker, lambda tool, question: broker.answer(tool, question.id, "pass"))
    stopping = NotReady("the service is stopping")
    assert resolve(broker, refused, lambda: stopping).reason == "default"
    Scripted(broker, lambda tool, question: broker.detach(tool), priority=1)
    with pytest.raises(NotReady):
        resolve(broker, refused, lambda: stopping)


def test_the_end_of_the_machine(refused: ExitColumns) -> None:
    broker = Broker()
    tool = Scripted(broker, lambda tool, question: broker.end(lambda: StoreUnavailable("gone")))
    with pytest.raises(StoreUnavailable):
        resolve(broker, refused)
    assert tool.told == [Resolution(None, "ended")] and len(tool.dismissed) == 1


def asker(entry: Any, draining: bool) -> Asker:
    return Asker(cast(Entry, entry), Settings(), Metrics(), lambda: draining)


def test_an_asker_counts_attempts_and_gives_up_with_the_service(refused: ExitColumns) -> None:
    broker, attempts = Broker(), []

    def notes(tool: Scripted, question: Question) -> None:
        attempts.append(question.attempt)
        broker.answer(tool, question.id, "retry")

    async def run() -> None:
        entry = SimpleNamespace(broker=broker, gone=False, absence=lambda: NotFound("gone"), loaded=None)
        tool = Scripted(broker, notes)
        asking = asker(entry, draining=True)
        assert [await asking.ask(refused) for _ in range(3)] == ["retry"] * 3
        broker.detach(tool)
        Scripted(broker, lambda tool, question: broker.detach(tool))
        with pytest.raises(NotReady):
            await asking.ask(refused)
        Scripted(broker, lambda tool, question: broker.detach(tool))
        assert await asker(entry, draining=False).ask(refused) == "skip"
        entry.gone = True
        with pytest.raises(NotFound):
            await asking.ask(refused)

    asyncio.run(run())
    assert attempts == [1, 2, 3]


@pytest.mark.parametrize(("lost", "code"), [(True, RESTART), (False, GONE)])
def test_a_session_says_why_it_ends(lost: bool, code: int) -> None:
    entry = SimpleNamespace(broker=Broker(), lost=lost)
    state = SimpleNamespace(settings=Settings())
    socket = SimpleNamespace(app=SimpleNamespace(state=state), scope={"principal": LOCAL_ADMIN})
    session = Session(cast(Any, socket), cast(Entry, entry))
    session.dismiss(NotFound("there is none"))
    assert session._outbox.get_nowait()[0] == code  # type: ignore[index]


def test_tokens_among_subprotocols() -> None:
    assert token_among(["subpage.introspection.v1", "subpage.bearer.sp_1_2"]) == b"Bearer sp_1_2"
    assert token_among(["subpage.introspection.v1"]) is None


def test_callers_that_were_let_in_stay_so() -> None:
    open_to_all = AccessControl(Settings(), None)
    assert open_to_all.holds(LOCAL_ADMIN)
    guarded = AccessControl(Settings(token="x" * 32), None)  # type: ignore[arg-type]
    scope: dict[str, Any] = {}
    fixed = guarded.authorize(scope, "write", b"Bearer " + b"x" * 32, b"localhost")
    assert guarded.holds(fixed)
    assert not guarded.holds(LOCAL_ADMIN)
    assert not guarded.holds(Principal("0", "revoked", "red", "write"))
