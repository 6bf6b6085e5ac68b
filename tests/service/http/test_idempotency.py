"""Idempotency-Key: answered again, not done again."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from service.runtime.answers import Answer, MemoryAnswers
from service.security.tokens import MemoryTokens, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.http import key
from tests.support.server import Running, running


def vms(client: ContractClient) -> int:
    return len(client.get("/v1/vms?limit=1000").json()["vms"])


@pytest.fixture
def own() -> Iterator[Running]:
    with running(Settings(warm_up=False, idempotency_bytes=4096)) as service:
        yield service


def test_same_key_same_body_same_answer(own: Running) -> None:
    first = own.client.post("/v1/vms", json={"name": "a"}, headers=key("k1"))
    assert first.status_code == 201 and "Idempotency-Replayed" not in first.headers
    for given in ("k1", '"k1"'):
        again = own.client.post("/v1/vms", json={"name": "a"}, headers=key(given))
        assert again.status_code == 201 and again.content == first.content
        assert again.headers["Location"] == first.headers["Location"] and again.headers["ETag"] == first.headers["ETag"]
        assert again.headers["Idempotency-Replayed"] == "true"
        assert again.headers["X-Request-Id"] != first.headers["X-Request-Id"]
    assert vms(own.client) == 1
    own.client.delete(first.headers["Location"])
    assert own.client.post("/v1/vms", json={"name": "a"}, headers=key("k1")).content == first.content
    assert vms(own.client) == 0
    assert own.client.post("/v1/vms", json={"name": "a"}).status_code == 201


def test_another_request_with_the_key(own: Running) -> None:
    home = own.client.post("/v1/vms", json={"name": "a"}, headers=key("k")).headers["Location"]
    for path, options in (
        ("/v1/vms", {"json": {"name": "b"}}),
        ("/v1/vms", {"content": b'{"name": "a"}', "headers": {"Content-Type": "application/json"}}),
        (f"{home}/accesses", {"json": {"gpa": 0}}),
        (f"{home}/traces?record=gpa8", {"content": b"", "headers": {"Content-Type": "application/octet-stream"}}),
    ):
        headers = key("k", **options.pop("headers", {}))  # type: ignore[arg-type]
        reply = own.client.post(path, headers=headers, **options)  # type: ignore[arg-type]
        assert reply.status_code == 422 and reply.json()["code"] == "idempotency-mismatch", path
        assert reply.json()["field"] == "Idempotency-Key" and reply.json()["value"] == "k"
    assert vms(own.client) == 1


def test_refusals_are_kept_unless_trying_again_can_help(own: Running) -> None:
    refused = own.client.post("/v1/vms", json={"maxphyaddr": 1}, headers=key("bad"))
    assert refused.status_code == 422
    again = own.client.post("/v1/vms", json={"maxphyaddr": 1}, headers=key("bad"))
    assert again.content == refused.content and again.headers["Idempotency-Replayed"]
    home = own.client.post("/v1/vms", json={"spp": True}).headers["Location"]
    entry = own.app.state.registry.get(home.rpartition("/")[2])
    entry.lock._timeout = 0.01
    entry.lock.held = True
    body: dict[str, Any] = {"json": {"gpa": 0}, "headers": key("busy")}
    assert own.client.post(f"{home}/accesses", **body).json()["code"] == "vm-busy"
    entry.lock.held = False
    assert own.client.post(f"{home}/accesses", **body).status_code == 200
    small = {"Content-Type": "text/plain"}
    assert own.client.post("/v1/vms", content=b"{}", headers=key("media", **small)).status_code == 415
    assert own.client.post("/v1/vms", json={}, headers=key("media")).status_code == 201


@pytest.mark.parametrize("given", ["", "x" * 256, "a b", "ü", "a\tb"])
def test_what_is_no_key(client: ContractClient, given: str) -> None:
    reply = client.post("/v1/vms", json={}, headers={"Idempotency-Key": given.encode("latin-1")})  # type: ignore[dict-item]
    assert reply.status_code == 422 and reply.json()["field"] == "Idempotency-Key"


def test_a_key_belongs_to_its_token() -> None:
    now = datetime.now(UTC)
    (one, a), (two, b) = mint("a", scope="write", now=now), mint("b", scope="write", now=now)
    with running(Settings(warm_up=False), MemoryTokens([one, two])) as service:
        made = {
            service.client.post("/v1/vms", json={}, headers=key("k", Authorization=f"Bearer {token}")).json()["id"]
            for token in (a, b, a, b)
        }
        assert len(made) == 2


def test_a_request_under_way(own: Running) -> None:
    home = own.client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": 4096}]}).headers["Location"]
    head = (
        f"POST {home}/traces HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
        "Idempotency-Key: slow\r\nContent-Length: 12\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", own.port)) as connection:
        connection.sendall(head.encode() + b'{"gpa":')
        ask: dict[str, Any] = {
            "content": b'{"gpa": 16}\n',
            "headers": key("slow", **{"Content-Type": "application/x-ndjson"}),
        }
        until = time.monotonic() + 30
        while not own.app.state.idempotency._running:
            assert time.monotonic() < until
        reply = own.client.post(f"{home}/traces", **ask)
        assert reply.status_code == 409 and reply.json()["code"] == "idempotency-in-progress"
        assert reply.headers["Retry-After"] == "1"
        connection.sendall(b" 16}\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 201 ")
    again = own.client.post(f"{home}/traces", **ask)
    assert again.headers["Idempotency-Replayed"] and again.json()["records"] == 1
    assert own.client.get(f"{home}/counters").json()["counters"]["records"] == 1


def test_a_client_that_leaves_may_try_again(own: Running) -> None:
    home = own.client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": 4096}]}).headers["Location"]
    head = f"POST {home}/traces HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
    with socket.create_connection(("127.0.0.1", own.port)) as connection:
        connection.sendall((head + "Idempotency-Key: k\r\nContent-Length: 100\r\n\r\n").encode() + b'{"gpa": 8}\n')
        until = time.monotonic() + 30
        while not own.app.state.idempotency._running:
            assert time.monotonic() < until
    while own.app.state.idempotency._running:
        assert time.monotonic() < until
    headers = key("k", **{"Content-Type": "application/x-ndjson"})
    reply = own.client.post(f"{home}/traces", content=b'{"gpa": 8}\n', headers=headers)
    assert reply.status_code == 201 and "Idempotency-Replayed" not in reply.headers


def test_a_replay_that_stops_early_is_answered_again(own: Running) -> None:
    """The rest of the body, which the replay never read, counts for the comparison."""
    home = own.client.post(
        "/v1/vms", json={"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": 4096}]}
    ).headers["Location"]
    own.client.put(f"{home}/subpages?gfn=0", json={"access": [0]})
    lines = b'{"gpa": 8}\n' * 50_000
    headers = key("k", **{"Content-Type": "application/x-ndjson"})
    ask = f"{home}/traces?on_violation=stop"
    first = own.client.post(ask, content=lines, headers=headers)
    assert first.status_code == 201 and first.json()["stopped_at"] == 0
    assert own.client.post(ask, content=lines, headers=headers).content == first.content
    other = own.client.post(ask, content=lines[:-1] + b" ", headers=headers)
    assert other.json()["code"] == "idempotency-mismatch"


def test_only_so_many_answers(own: Running) -> None:
    """Nothing that was promised for a day is dropped silently."""
    status = 201
    for number in range(100):
        reply = own.client.post("/v1/vms", json={}, headers=key(f"k{number}"))
        status = reply.status_code
        if status != 201:
            break
        own.client.delete(reply.headers["Location"])
    assert status == 429 and reply.json()["field"] == "idempotency_bytes" and reply.headers["Retry-After"]
    assert own.client.post("/v1/vms", json={}, headers=key("k0")).headers["Idempotency-Replayed"]
    assert own.client.post("/v1/vms", json={}).status_code == 201


def test_two_at_once_do_it_once(own: Running) -> None:
    replies: list[httpx2.Response] = []

    def post() -> None:
        replies.append(httpx2.post(f"{own.url}/v1/vms", json={"name": "once"}, headers=key("race")))

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {reply.status_code for reply in replies} <= {201, 409} and vms(own.client) == 1
    assert len({reply.json()["id"] for reply in replies if reply.status_code == 201}) == 1


def test_answers_are_kept_for_their_time() -> None:
    clock = 0.0
    answers = MemoryAnswers(10, lambda: clock)
    answer = Answer(b"f", 200, ((b"a", b"b"),), b"body")

    async def run() -> None:
        nonlocal clock
        await answers.keep("me", "k", answer)
        clock = 5
        await answers.keep("me", "l", answer)
        assert await answers.used("me") == 2 * answer.size and await answers.used("you") == 0
        clock = 9.9
        assert await answers.find("me", "k") is answer and await answers.find("you", "k") is None
        clock = 10
        assert await answers.find("me", "k") is None and await answers.find("me", "l") is answer
        assert await answers.used("me") == answer.size
        clock = 15
        assert await answers.used("me") == 0 and await answers.find("me", "l") is None

    asyncio.run(run())
