"""``subpage attach``: be the tool that is asked what becomes of refused accesses, at the keyboard or by rules."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, show
from service.cli.accesses import ACCESSES
from service.cli.connection import Service, remote, told
from service.cli.rules import ANSWERS, read_rules
from service.cli.vms import VmArgument, machine
from service.platform.failures import Failure

if TYPE_CHECKING:
    import subpage

# What is typed for each answer; s is taken, so stop is t.
KEYS = {"s": "skip", "a": "allow", "g": "grant", "r": "retry", "t": "stop", "p": "pass"}
_ASKED = "[s]kip, [a]llow, [g]rant, [r]etry, s[t]op or [p]ass? "
_LOOK_SECONDS = 0.2
_SEND_SECONDS = 2.0
_WORKERS = 8


@remote
def attach(
    service: Service,
    vm: VmArgument,
    rules: Annotated[
        Path | None,
        typer.Option(help="TOML or JSON: rules that answer, instead of the keyboard (docs/introspection.md)."),
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option("--object", help="Be asked about these objects only.", autocompletion=complete.objects),
    ] = None,
    priority: Annotated[int | None, typer.Option(help="The tool with the highest is asked first.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for an answer; then the next tool is asked.")] = None,
    default: Annotated[
        str | None,
        typer.Option(help="What counts where no tool answers.", autocompletion=complete.one_of(*ANSWERS[:-1])),
    ] = None,
    count: Annotated[int | None, typer.Option("-n", "--count", min=1, help="Leave after so many answers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each question, with its answer, as JSON.")] = False,
) -> None:
    """Attach a tool to a machine: it is asked about accesses that are refused under `on_violation=ask`.

    It attaches again after every interruption, until the machine is deleted or Ctrl-C.
    """
    known = None if rules is None else read_rules(rules)
    if known is None and not sys.stdin.isatty():
        raise Failure("questions are answered at a terminal; without one, --rules names a file that answers them")
    wishes = {"objects": objects or None, "priority": priority, "timeout": timeout, "default_action": default}
    waiting: queue.SimpleQueue[tuple[subpage.Question, Future[str]]] = queue.SimpleQueue()
    leaving = threading.Event()
    answered = 0

    def decide(question: subpage.Question) -> str:
        if known is not None:
            answer: Future[str] = Future()
            answer.set_result(known.answer(question.exit))
        else:
            answer = Future()
        waiting.put((question, answer))
        while not leaving.is_set():
            with contextlib.suppress(TimeoutError):
                return answer.result(_LOOK_SECONDS)
        return "pass"

    asking = _Console(as_json)
    try:
        with told("subpage attach"), service.client() as client:
            asked = machine(client, vm)
            with asked.attach(decide, workers=_WORKERS, **wishes) as tool:
                if not as_json:
                    name = tool.attached["tool"] if tool.attached else "a tool"
                    typer.echo(f"attached to {asked.id} as {name}; Ctrl-C leaves", err=True)
                try:
                    while not tool.wait(0) and answered != count:
                        if (found := _next(waiting)) is None:
                            continue
                        question, answer = found
                        if known is None:
                            answer.set_result(asking.ask(question))
                        asking.tell(question, answer.result())
                        answered += 1
                    _sent(tool, answered)
                finally:
                    leaving.set()
    except (KeyboardInterrupt, EOFError):
        typer.echo("", err=True)


def _next(waiting: queue.SimpleQueue[Any]) -> Any:
    try:
        return waiting.get(timeout=_LOOK_SECONDS)
    except queue.Empty:
        return None


def _sent(tool: subpage.Tool, answered: int) -> None:
    """Wait until the last answers are on their way."""
    deadline = time.monotonic() + _SEND_SECONDS
    while tool.answered < answered and time.monotonic() < deadline:
        time.sleep(0.01)


class _Console:
    """Questions as people see them."""

    def __init__(self, as_json: bool, read: Callable[[str], str] | None = None) -> None:
        self._as_json = as_json
        self._read = read or input

    def ask(self, question: subpage.Question) -> str:
        """What is typed, until it is an answer."""
        typer.echo(_described(question), err=True)
        while True:
            typed = self._read(_ASKED).strip().lower()
            if answer := KEYS.get(typed) or (typed if typed in ANSWERS else None):
                return answer
            typer.echo(f"must be one of {', '.join(ANSWERS)}, or its letter", err=True)

    def tell(self, question: subpage.Question, answer: str) -> None:
        """A question with its answer."""
        if self._as_json:
            show.line({**question.message, "answer": answer})
        else:
            typer.echo(f"{answer:<5}  {_described(question)}")


def _described(question: subpage.Question) -> str:
    exit = question.exit
    kind = ACCESSES[exit["access"]] if exit["access"] in range(len(ACCESSES)) else exit["access"]
    hit = ", ".join(exit["objects"]) or "no object"
    again = f", asked {question.attempt} times" if question.attempt > 1 else ""
    where = f"{kind} of {exit['size']} bytes at {exit['gpa']} by vCPU {exit['vcpu']}"
    return f"{where}: {hit} (until {question.deadline[11:19]}Z{again})"
