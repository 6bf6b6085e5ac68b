"""Clients that are slow, that leave, or that send what blows up: they are told so, and others are served meanwhile."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
import zstandard

from service.app import create_app
from service.http.connection import MAX_HEAD_BYTES
from service.runtime.bodies import PIECE
from service.server import configured
from service.settings import MIB, Settings
from tests.contract.client import ContractClient
from tests.support.http import map_of, new_vm, set_map
from tests.support.server import Running
from tests.support.waiting import until

LINE = b'{"gpa": 65536}\n'


@contextlib.contextmanager
def configured_service(**settings: Any) -> Iterator[Running]:
    """A service as ``subpage serve`` configures it, its connections included."""
    given = Settings(warm_up=False, port=0, **settings)
    app = create_app(given)
    server = uvicorn.Server(configured(app, given))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with ContractClient(base_url=url, timeout=60.0) as client:
            yield Running(app, client, url, port)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    """Times are short so that the tests are; nothing below depends on how short."""
    limits = {"head_timeout": 0.3, "body_timeout": 0.3, "body_rate": 1000}
    with configured_service(**limits, busy_timeout=0, max_document_bytes=MIB, max_body_bytes=4 * MIB) as running:
        yield running


@pytest.fixture
def vm(service: Running) -> Iterator[str]:
    home = new_vm(service.client)
    assert set_map(service.client, home, 16, 0) == 204
    yield home
    service.client.delete(home)


def connect(service: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=60)


def opening(vm: str, length: int, media: str = "application/x-ndjson", **headers: str) -> bytes:
    """The head of a replay."""
    lines = [f"POST {vm}/traces HTTP/1.1", "Host: localhost", f"Content-Type: {media}", f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def answer(connection: socket.socket) -> tuple[int, dict[str, Any], bytes]:
    """Status, problem and head of a reply; no further, because what follows may be the end of the connection."""
    content = b""
    while b"\r\n\r\n" not in content:
        content += received(connection)
    head, _, body = content.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
    while len(body) < length:
        body += received(connection)
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body), head


def received(connection: socket.socket) -> bytes:
    part = connection.recv(1 << 16)
    assert part, "the connection ended without an answer"
    return part


def closed(connection: socket.socket) -> bool:
    """The service ends the connection without a word."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(1 << 16) == b""
    return True


def trickle(connection: socket.socket, piece: bytes, stop: threading.Event) -> threading.Thread:
    """Send ``piece`` again and again, slowly, until told to stop or cut off."""

    def work() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.02):
                connection.sendall(piece)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def under_way(service: Running) -> int:
    return service.app.state.metrics.under_way  # type: ignore[no-any-return]


def test_connections_that_say_nothing(service: Running) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(service)) for _ in range(50)]
        assert service.client.get("/livez").status_code == 200
        assert all(closed(connection) for connection in silent)


def test_heads_that_trickle(service: Running, vm: str) -> None:
    """A byte now and then does not keep a connection; the others are served all the while."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(service)) for _ in range(20)]
        for connection in slow:
            connection.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        threads = [trickle(connection, b"x", stop) for connection in slow]
        for word in range(20):
            assert set_map(service.client, vm, 1, word) == 204 and map_of(service.client, vm, 1) == word
        replies = [answer(connection) for connection in slow]
        stop.set()
        for thread in threads:
            thread.join()
    assert {(status, problem["code"]) for status, problem, _ in replies} == {(408, "request-timeout")}


def test_a_head_behind_an_answered_request(service: Running) -> None:
    """The clock starts anew with each request of a connection."""
    with connect(service) as connection:
        for _ in range(2):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /livez HT")
        assert answer(connection)[0] == 408


def test_a_request_that_takes_long_may_have_a_slow_one_behind_it(service: Running, vm: str) -> None:
    """Only the second head is late, and the first request is answered in full."""
    with connect(service) as connection, connect(service) as holder:
        holder.sendall(opening(vm, 2 * len(LINE)) + LINE)
        until(lambda: under_way(service) == 1)
        connection.sendall(opening(vm, len(LINE)) + LINE + b"GET /livez HT")
        first = connection.recv(1 << 16)
        assert first.startswith((b"HTTP/1.1 201 ", b"HTTP/1.1 409 "))


def test_a_head_without_end(service: Running) -> None:
    with connect(service) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(3 * MAX_HEAD_BYTES // 1000):
                connection.sendall(b"X-%06d: " % number + b"y" * 990 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            status, problem, _ = answer(connection)
            assert status == 431 and problem["code"] == "head-too-large" and str(MAX_HEAD_BYTES) in problem["rule"]
    assert service.client.get("/livez").status_code == 200


def test_what_is_not_http(service: Running) -> None:
    with connect(service) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        status, problem, head = answer(connection)
    assert status == 400 and problem["code"] == "malformed-request" and b"connection: close" in head


@pytest.mark.parametrize("media", ["application/x-ndjson", "application/json", "application/octet-stream"])
def test_bodies_that_trickle(service: Running, vm: str, media: str) -> None:
    """Below the documented rate the body is given up: the machine is as before, and takes changes again."""
    before = service.client.get(vm).json()
    stop = threading.Event()
    with connect(service) as connection:
        head = opening(vm, 1 << 20, media)
        connection.sendall(head.replace(b"/traces ", b"/traces?record=gpa8 ") if "octet" in media else head)
        thread = trickle(connection, b" ", stop)
        until(lambda: under_way(service) == 1)
        assert service.client.get(vm).json() == before and map_of(service.client, vm, 16) == 0
        status, problem, head = answer(connection)
        stop.set()
        thread.join()
    assert status == 408 and problem["code"] == "request-timeout" and problem["field"] == "body"
    assert b"connection: close" in head.lower()
    until(lambda: under_way(service) == 0)
    assert service.client.get(vm).json() == before
    assert set_map(service.client, vm, 1, 1) == 204, "the writer was let go"


def test_a_body_at_the_rate_may_take_its_time(service: Running, vm: str) -> None:
    """Slower than the time allows at once, but each piece buys its second."""
    pieces = 8

    def body() -> Iterator[bytes]:
        for _ in range(pieces):
            time.sleep(0.1)
            yield LINE * 20

    reply = service.client.post(f"{vm}/traces", content=body(), headers={"Content-Type": "application/x-ndjson"})
    assert reply.status_code == 201 and reply.json()["records"] == 20 * pieces


def test_a_refused_body_is_not_read_for_ever(service: Running, vm: str) -> None:
    """The answer comes at once; a client that goes on to send without end is cut off."""
    stop = threading.Event()
    with connect(service) as connection:
        connection.sendall(opening(vm, 1 << 40))
        thread = trickle(connection, b" " * 100, stop)
        content = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                content += part
        stop.set()
        thread.join()
    assert content.startswith(b"HTTP/1.1 413 ")
    assert service.client.get("/livez").status_code == 200


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_a_client_that_leaves_in_the_middle(service: Running, vm: str, reset: bool) -> None:
    """While its body arrives: nothing of it stays, and the writer is free at once."""
    client = service.client
    connection = connect(service)
    connection.sendall(opening(vm, 1 << 20) + LINE * (PIECE // len(LINE) + 1))
    until(lambda: under_way(service) == 1)
    until(lambda: set_map(client, vm, 1, 0xFFFFFFFF) == 409)
    assert map_of(client, vm, 16) == 0, "reads do not wait"
    # Only now: a map that is set before the replay holds the machine is a change of it.
    before = client.get(vm).json(), client.get(f"{vm}/counters").json(), client.get(f"{vm}/traces").json()
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: under_way(service) == 0)
    assert (client.get(vm).json(), client.get(f"{vm}/counters").json(), client.get(f"{vm}/traces").json()) == before
    assert set_map(client, vm, 1, 5) == 204 and map_of(client, vm, 1) == 5


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_bombs(service: Running, vm: str, coding: str) -> None:
    """Hundreds of MiB out of little: shed at the limit, which is named; a call beside it is answered meanwhile."""
    compress = gzip.compress if coding == "gzip" else zstandard.ZstdCompressor().compress
    bombs = {fill: compress(fill * (64 * MIB)) * 8 for fill in (b"\0", b"\n")}
    client = service.client
    before = client.get(vm).json()
    for target, media, fill, limit in (
        (f"{vm}/traces?record=gpa8", "application/octet-stream", b"\0", 4 * MIB),
        (f"{vm}/traces", "application/x-ndjson", b"\n", 4 * MIB),
        ("/v1/vms", "application/json", b"\n", MIB),
        (f"{vm}/subpages", "application/json", b"\n", MIB),
    ):
        body = bombs[fill]
        method = "PATCH" if target.endswith("subpages") else "POST"
        head = opening(vm, len(body), media, Content_Encoding=coding)
        head = head.replace(f"POST {vm}/traces".encode(), f"{method} {target}".encode())
        assert len(body) < limit, "the limit of the body as sent is not what is tested"
        with connect(service) as connection:
            sender = threading.Thread(target=send_all, args=(connection, head + body))
            sender.start()
            assert map_of(client, vm, 16) == 0
            status, problem, _ = answer(connection)
            sender.join()
        assert status == 413 and problem["code"] == "body-too-large" and str(limit) in problem["rule"]
    assert client.get(vm).json() == before and set_map(client, vm, 1, 1) == 204


def send_all(connection: socket.socket, content: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(content)
