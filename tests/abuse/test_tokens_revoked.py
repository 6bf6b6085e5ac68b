"""A token that is revoked or has expired ends what it began: within seconds, and before anything more is changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.abuse.conftest import Begin
from tests.abuse.process import Service
from tests.support.http import new_vm
from tests.support.waiting import until

_WITHIN = 5.0
_TOOLS = 3


Attach = Callable[[Service, str, str], ClientConnection]


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Attaches a tool to a machine, with a token."""
    with ExitStack() as opened:

        def one(service: Service, vm: str, token: str) -> ClientConnection:
            url = f"{service.url.replace('http', 'ws')}{vm}/introspection"
            headers = {"Authorization": f"Bearer {token}"}
            socket = opened.enter_context(connect(url, additional_headers=headers, close_timeout=1))
            socket.send(json.dumps({"type": "attach"}))
            assert json.loads(socket.recv(timeout=10))["type"] == "attached"
            return socket

        yield one


def asked(service: Service, vm: str, token: str) -> int:
    with service.client(token) as client:
        return client.get(vm).status_code


def closed(socket: ClientConnection) -> tuple[int, str]:
    """How the server closes an idle connection."""
    with pytest.raises(ConnectionClosed) as ended:
        socket.recv(timeout=_WITHIN)
    assert ended.value.rcvd is not None
    return ended.value.rcvd.code, ended.value.rcvd.reason


@pytest.fixture
def red_machine(tenants: Begin) -> Iterator[tuple[Service, httpx2.Client, str]]:
    """A machine of red on which three tools may be attached."""
    service, red, _ = tenants(max_tools=_TOOLS)
    return service, red, new_vm(red)


def test_an_idle_socket_of_a_revoked_token_is_closed(
    red_machine: tuple[Service, httpx2.Client, str], attach: Attach
) -> None:
    service, _red, vm = red_machine
    token_id, token = service.token("red")
    _other_id, other = service.token("red")
    known = service.client(other)
    until(lambda: known.get(vm).status_code == 200)
    sockets = [attach(service, vm, token) for _ in range(_TOOLS)]
    with pytest.raises(InvalidStatus) as refused:
        attach(service, vm, other)
    assert refused.value.response.status_code == 429
    service.tokens.revoke(token_id, datetime.now(UTC))
    assert {closed(socket) for socket in sockets} == {(1008, "the token is not valid any more")}
    for _ in range(_TOOLS):
        attach(service, vm, other)
    known.close()


def test_a_socket_whose_token_expires_is_closed(
    red_machine: tuple[Service, httpx2.Client, str], attach: Attach
) -> None:
    service, _red, vm = red_machine
    _, token = service.token("red", expires=2.0)
    client = service.client(token)
    until(lambda: client.get(vm).status_code == 200)
    assert closed(attach(service, vm, token))[0] == 1008
    assert client.get(vm).status_code == 401
    client.close()


def test_one_that_does_not_read_takes_no_place(red_machine: tuple[Service, httpx2.Client, str], attach: Attach) -> None:
    """A revoked peer that never takes the close is cut off, and its place is free before."""
    service, red, vm = red_machine
    token_id, token = service.token("red")
    until(lambda: asked(service, vm, token) == 200)
    deaf = [attach(service, vm, token) for _ in range(_TOOLS)]
    service.tokens.revoke(token_id, datetime.now(UTC))
    tool: list[ClientConnection] = []

    def let_in() -> bool:
        try:
            tool.append(attach(service, vm, red.headers["Authorization"].removeprefix("Bearer ")))
        except InvalidStatus:
            return False
        return True

    until(let_in, _WITHIN)
    assert len(deaf) == _TOOLS


def test_an_idle_stream_of_events_ends(red_machine: tuple[Service, httpx2.Client, str]) -> None:
    service, _red, vm = red_machine
    token_id, token = service.token("red")
    client = service.client(token)
    until(lambda: client.get(vm).status_code == 200)
    with client.stream("GET", f"{vm}/events?follow=true", headers={"Accept": "application/x-ndjson"}) as reply:
        lines = reply.iter_lines()
        assert json.loads(next(lines))["kind"] == "lifecycle"
        service.tokens.revoke(token_id, datetime.now(UTC))
        began = time.monotonic()
        last = [line for line in lines if line][-1]
    assert json.loads(last)["detail"] == {"reason": "unauthenticated"} and time.monotonic() - began < _WITHIN
    client.close()


@pytest.mark.parametrize("on_violation", ["skip", "ask"])
def test_a_replay_whose_token_is_revoked_changes_nothing(
    red_machine: tuple[Service, httpx2.Client, str], on_violation: str
) -> None:
    """Looked at when it begins and when it would commit: revoked in between it ends in 401, and commits nothing."""
    service, red, vm = red_machine
    token_id, token = service.token("red")
    client = service.client(token)
    until(lambda: client.get(vm).status_code == 200)

    def body() -> Iterator[bytes]:
        yield b"".join((page << 12).to_bytes(8, "little") for page in range(512))
        service.tokens.revoke(token_id, datetime.now(UTC))
        until(lambda: asked(service, vm, token) == 401)
        yield (0x1000).to_bytes(8, "little")

    before = red.get(vm).json()["revision"]
    reply = client.post(
        f"{vm}/traces?record=gpa8&on_violation={on_violation}",
        content=body(),
        headers={"Content-Type": "application/octet-stream"},
    )
    assert reply.status_code == 401 and reply.json()["code"] == "unauthenticated"
    assert "not valid any more" in reply.json()["detail"]
    assert red.get(vm).json()["revision"] == before and red.get(f"{vm}/traces").json()["traces"] == []
    client.close()
