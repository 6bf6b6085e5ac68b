"""What HTTP itself leaves open: heads, trailers and chunks without end, requests behind requests, silence over TLS."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.http.connection import MAX_FIELDS, MAX_PIPELINED, MAX_URL_BYTES
from service.settings import MIB
from tests.abuse.heads import CHUNKED, WITHOUT_END
from tests.abuse.process import TOKEN, Service, flood, head, serving, watched

MOST = 64 * MIB  # what an attack here may send; many times what the server may take of it


@pytest.fixture(scope="module")
def victim() -> Iterator[Service]:
    with serving(head_timeout=1) as server:
        yield server


@pytest.mark.parametrize("name", WITHOUT_END)
def test_what_has_no_end_is_refused_and_the_connection_closed(victim: Service, name: str) -> None:
    """The answer is given at once and can be read; nothing is kept; others are served all the while."""
    start, piece, status = WITHOUT_END[name]
    with watched(victim) as seen, victim.connect() as connection:
        connection.sendall(start)
        done = flood(connection, piece, 10)
    assert done.reply.startswith(b"HTTP/1.1 ") and status in done.reply[8:13]
    assert b"connection: close" in done.reply.lower()
    assert done.closed, "a client that goes on is cut off"
    assert seen.grown < 32 * MIB and seen.asked


def test_as_many_fields_as_allowed(victim: Service) -> None:
    for count, status in ((MAX_FIELDS - 2, b" 200 "), (MAX_FIELDS, b" 431 ")):
        with victim.connect() as connection:
            connection.sendall(head("GET", "/livez", None, *(f"x-{number}: y" for number in range(count))))
            assert status in connection.recv(1 << 16)[:14]


def test_as_long_a_url_as_allowed(victim: Service) -> None:
    for length, status in ((MAX_URL_BYTES, b" 404 "), (MAX_URL_BYTES + 1, b" 431 ")):
        with victim.connect() as connection:
            connection.sendall(head("GET", "/" + "x" * (length - 1)))
            assert status in connection.recv(1 << 16)[:14]


def test_trailers_are_nobodys_headers(victim: Service) -> None:
    """Neither of the request that they end nor of the one behind it: a proxy may not have looked at them."""
    with victim.connect() as connection:
        sent = head("POST", "/v1/vms", None, CHUNKED, "Content-Type: application/json")
        connection.sendall(sent + b"2\r\n{}\r\n0\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n\r\n")
        connection.sendall(head("GET", "/v1/vms", None, "Connection: close"))
        replies = b""
        while got := connection.recv(1 << 16):
            replies += got
    assert replies.count(b"HTTP/1.1 401 ") == 2


def test_requests_behind_requests(victim: Service) -> None:
    """As many as may wait are answered, then the connection closes."""
    with victim.connect() as connection:
        connection.sendall(head("GET", "/livez") * 2000)
        connection.settimeout(10)
        replies = b""
        while got := connection.recv(1 << 16):
            replies += got
    assert replies.count(b"HTTP/1.1 200 ") == MAX_PIPELINED + 1


def test_a_short_body_that_is_late_keeps_the_connection(victim: Service) -> None:
    with victim.connect() as connection:
        for _ in range(2):
            connection.sendall(head("POST", "/v1/vms", None, "Content-Length: 2"))
            reply = b""
            while not reply.endswith(b"}"):
                reply += connection.recv(1 << 16)
            assert b" 401 " in reply[:14] and b"connection: close" not in reply
            connection.sendall(b"{}")


def test_a_long_body_that_is_refused_ends_with_its_answer(victim: Service) -> None:
    """The client sends all of it before it reads: the answer is still there."""
    with victim.connect() as connection:
        connection.sendall(head("POST", "/v1/vms", None, f"Content-Length: {8 * MIB}"))
        connection.sendall(bytes(8 * MIB))
        reply = b""
        while got := connection.recv(1 << 16):
            reply += got
    assert reply.startswith(b"HTTP/1.1 401 ") and reply.endswith(b"}") and b"connection: close" in reply


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    names = folder / "certificate.pem", folder / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*request, "-out", str(names[0]), "-keyout", str(names[1])], check=True, capture_output=True)
    return names


def test_silence_over_tls_lasts_as_long_as_without(certificate: tuple[Path, Path]) -> None:
    """A client that connects and says nothing, or stops in its hello, is closed after ``head_timeout``."""
    with serving(head_timeout=1, tls_certificate=certificate[0], tls_key=certificate[1]) as server:
        for hello in (b"", b"\x16\x03\x01\x02\x00\x01"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                connection.sendall(hello)
                try:
                    while connection.recv(4096):
                        pass
                except ConnectionError:
                    pass
        assert "Traceback" not in server.said()
