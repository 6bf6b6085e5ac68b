"""WebSocket frames without end: a connection takes its turn, and one that sends what is no message loses it."""

from __future__ import annotations

import pytest
from websockets.sync.client import connect

from service.http.frames import FRAMES_AT_ONCE
from service.http.sockets import MESSAGE_BYTES
from service.settings import MIB
from tests.abuse.frames import CONTINUATION, OPENING, PING, TEXT, WITHOUT_END, frame, opened
from tests.abuse.process import TOKEN, Service, flood, head, watched
from tests.support.http import new_vm

COMPRESSED = 0x40


@pytest.fixture(scope="module")
def path(victim: Service) -> str:
    with victim.client() as client:
        return new_vm(client) + "/introspection"


@pytest.mark.parametrize("name", WITHOUT_END)
def test_frames_without_end(victim: Service, path: str, name: str) -> None:
    start, piece, code = WITHOUT_END[name]
    with watched(victim) as seen, opened(victim, path) as connection:
        connection.sendall(start)
        done = flood(connection, piece, 30)
    assert code.to_bytes(2, "big") in done.reply and done.closed
    assert seen.grown < 32 * MIB and seen.asked
    assert "ERROR" not in victim.said() and "Traceback" not in victim.said()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(TEXT, b"\x4b\x04\x00\x00", bits=COMPRESSED), 1002),
        (b"\x81\xff" + (1 << 40).to_bytes(8, "big") + bytes(4), 1009),
        (frame(TEXT, b"x" * 100, last=False) + frame(CONTINUATION, b"x" * 100, last=False) * 300, 1008),
        (
            frame(TEXT, b"x", last=False) + b"\x80\xff" + (MESSAGE_BYTES).to_bytes(8, "big") + bytes(4),
            1009,
        ),
    ],
)
def test_frames_that_are_too_much(victim: Service, path: str, sent: bytes, code: int) -> None:
    """Compressed where nothing was agreed, longer than a message may be, and the same in pieces."""
    with opened(victim, path, "Sec-WebSocket-Extensions: permessage-deflate") as connection:
        connection.sendall(sent)
        reply = b""
        try:
            while got := connection.recv(4096):
                reply += got
        except ConnectionError:
            pass
    assert code.to_bytes(2, "big") in reply


def test_frames_before_the_opening_is_answered(victim: Service, path: str) -> None:
    with victim.connect() as connection:
        connection.sendall(head("GET", path, TOKEN, *OPENING))
        connection.settimeout(1)
        connection.sendall(frame(PING) * 2000)
        try:
            while connection.recv(4096):
                pass
        except (ConnectionError, TimeoutError):
            pass
    assert "Traceback" not in victim.said()


def test_what_a_tool_sends_is_taken(victim: Service, path: str) -> None:
    """Pings now and then, a message in as many pieces as are allowed, messages of the largest size, many at once."""
    url = victim.url.replace("http", "ws") + path
    with connect(url, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as tool:
        assert tool.ping("hello").wait(10)
        text = '{"type": "ping", "data": "1"}'
        tool.send(iter([text[:10], *text[10:], *[" "] * (FRAMES_AT_ONCE - 64)]))
        assert '"data":"1"' in str(tool.recv(10))
        tool.send(text + " " * (MESSAGE_BYTES - len(text)))
        assert '"data":"1"' in str(tool.recv(10))
        for number in range(200):
            tool.send(f'{{"type": "ping", "data": "{number}"}}')
        assert [f'"data":"{number}"' in str(tool.recv(10)) for number in range(200)] == [True] * 200
