"""Frames of a WebSocket as they go over the wire, good ones and others."""

from __future__ import annotations

import socket

from tests.abuse.process import TOKEN, Service, head

OPENING = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
CONTINUATION, TEXT, PING, PONG = 0, 1, 9, 10


def frame(opcode: int, data: bytes = b"", *, last: bool = True, bits: int = 0) -> bytes:
    """One of a client's, of less than 126 bytes, with a mask that changes nothing."""
    return bytes([(0x80 if last else 0) | bits | opcode, 0x80 | len(data)]) + bytes(4) + data


def opened(victim: Service, path: str, *fields: str) -> socket.socket:
    connection = victim.connect()
    connection.sendall(head("GET", path, TOKEN, *OPENING, *fields))
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += connection.recv(1)
    assert reply.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-extensions" not in reply.lower(), "nothing compressed is taken"
    return connection


BEGUN = frame(TEXT, b"{", last=False)
# Sent at first, then over and over, and the close code that ends it.
WITHOUT_END = {
    "empty continuations": (BEGUN, frame(CONTINUATION, last=False) * 8000, 1008),
    "continuations of a byte": (BEGUN, frame(CONTINUATION, b" ", last=False) * 8000, 1008),
    "pings": (b"", frame(PING, b"x") * 8000, 1008),
    "pongs": (b"", frame(PONG) * 8000, 1008),
    "pings in a message": (BEGUN, frame(PING) * 8000, 1008),
    "messages that are none": (b"", frame(TEXT, b"x") * 8000, 1008),
}
