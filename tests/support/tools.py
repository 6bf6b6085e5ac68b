"""Introspection tools for the tests: a WebSocket client whose messages are held against the contract."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from service.api.events.introspection import SUBPROTOCOL
from tests.contract.client import contract
from tests.support.server import Running

SOCKET = contract().document["x-websockets"]["/v1/vms/{vm}/introspection"]


class ToolClient:
    """One connection of a tool."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def send(self, **message: Any) -> None:
        contract().valid(message, SOCKET["receives"], "message to the service")
        self.socket.send(json.dumps(message))

    def receive(self, kind: str | None = None, timeout: float = 30) -> dict[str, Any]:
        """The next message; of ``kind``."""
        message: dict[str, Any] = json.loads(self.socket.recv(timeout))
        contract().valid(message, SOCKET["sends"], "message from the service")
        assert kind is None or message["type"] == kind, message
        return message

    def attach(self, **members: Any) -> dict[str, Any]:
        self.send(type="attach", **members)
        return self.receive("attached")

    def answer(self, question: dict[str, Any], action: str) -> None:
        self.send(type="answer", id=question["id"], action=action)

    def closed(self) -> tuple[int, str]:
        """Read to the end; the close code and reason."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.socket.recv(30)
        return self.socket.close_code or 0, self.socket.close_reason or ""


def url_of(service: Running, vm: str) -> str:
    return f"ws://127.0.0.1:{service.port}{vm}/introspection"


@contextlib.contextmanager
def tool(service: Running, vm: str, *, attach: bool = True, **members: Any) -> Iterator[ToolClient]:
    """A tool that is attached."""
    with connect(url_of(service, vm), subprotocols=[SUBPROTOCOL], close_timeout=5) as socket:  # type: ignore[list-item]
        client = ToolClient(socket)
        if attach:
            client.attach(**members)
        yield client


class Answering:
    """Answers in a thread until the connection ends; what it was asked is in ``questions``."""

    def __init__(self, client: ToolClient, policy: Callable[[dict[str, Any]], str | None]) -> None:
        self.client, self.policy = client, policy
        self.questions: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.fault: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while True:
                message = self.client.receive()
                if message["type"] != "violation":
                    self.others.append(message)
                    continue
                self.questions.append(message)
                action = self.policy(message)
                if action is not None:
                    self.client.answer(message, action)
        except ConnectionClosed:
            pass
        except Exception as fault:  # noqa: BLE001 - told to the test
            self.fault = fault


@contextlib.contextmanager
def answering(
    service: Running, vm: str, policy: Callable[[dict[str, Any]], str | None] | str, **members: Any
) -> Iterator[Answering]:
    """A tool that answers in the background."""
    with tool(service, vm, **members) as client:
        run = Answering(client, policy if callable(policy) else lambda question: policy)
        run.thread.start()
        yield run
        client.socket.close()
        run.thread.join(30)
    if run.fault is not None:
        raise run.fault


class Background:
    """A call in a thread, whose outcome is asked for later."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._outcome: Any = None
        self._fault: Exception | None = None
        self.thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self.thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._outcome = call()
        except Exception as fault:  # noqa: BLE001 - raised where it is asked for
            self._fault = fault

    def result(self) -> Any:
        self.thread.join(60)
        assert not self.thread.is_alive(), "it waits still"
        if self._fault is not None:
            raise self._fault
        return self._outcome


def trace(addresses: Sequence[int]) -> dict[str, Any]:
    return {"accesses": [{"gpa": gpa} for gpa in addresses]}
