"""Bodies that are read past the parser: the same bytes arrive however they are cut, and no request behind is lost."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from service.http.long_bodies import BLOCK, FIRST, LONG
from service.settings import MIB
from tests.abuse.process import TOKEN, Service, head, serving, watched
from tests.support.http import new_vm

RECORDS = np.arange(300_000, dtype="<u8") % 0x1000
BODY = RECORDS.tobytes()


@pytest.fixture(scope="module")
def victim() -> Iterator[Service]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def vm(victim: Service) -> str:
    with victim.client() as client:
        return new_vm(client)


def request(path: str, size: int = len(BODY), token: str | None = TOKEN) -> bytes:
    return head("POST", path, token, f"Content-Length: {size}", "Content-Type: application/octet-stream")


def replies(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Status and body of so many replies of one connection, one behind the other."""
    found = []
    with connection.makefile("rb") as file:
        for _ in range(count):
            status = int(file.readline().split()[1])
            fields = http.client.parse_headers(file)
            found.append((status, file.read(int(fields["Content-Length"]))))
    return found


CUTS = {
    "all at once": [len(BODY)],
    "the head alone": [0, len(BODY)],
    "a byte with the head": [1, len(BODY)],
    "just short": [len(BODY) - LONG, len(BODY)],
    "one byte more": [len(BODY) - LONG - 1, len(BODY)],
    "within a block": [10, FIRST - 1, FIRST, FIRST + 1, FIRST + BLOCK, FIRST + BLOCK + 1, len(BODY) - 1, len(BODY)],
    "small pieces": [*range(0, 40_000, 999), len(BODY)],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_however_it_is_cut(victim: Service, vm: str, cuts: Sequence[int]) -> None:
    """A request behind it comes in the same segment as its last byte, and is answered."""
    sent = request(f"{vm}/traces?record=gpa8")
    with victim.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        done = 0
        for cut in cuts:
            behind = head("GET", "/livez", None) if cut == len(BODY) else b""
            connection.sendall(sent + BODY[done:cut] + behind)
            sent, done = b"", cut
            time.sleep(0.005)
        (status, result), (alive, _) = replies(connection, 2)
    assert (status, alive) == (201, 200)
    assert b'"records":300000' in result


def test_two_long_bodies_on_one_connection(victim: Service, vm: str) -> None:
    with victim.connect() as connection:
        connection.sendall((request(f"{vm}/traces?record=gpa8") + BODY) * 2)
        assert [status for status, _ in replies(connection, 2)] == [201, 201]


def test_what_is_wrong_late_in_it_is_found(victim: Service, vm: str) -> None:
    """By its index: the bytes are those that were sent, in their order."""
    wrong = BODY[:-16] + (1 << 63).to_bytes(8, "little") + BODY[-8:]
    with victim.connect() as connection:
        connection.sendall(request(f"{vm}/traces?record=gpa8") + wrong)
        ((status, problem),) = replies(connection, 1)
    assert status == 422 and b'"index": 299998' in problem


def test_a_document(victim: Service) -> None:
    """One that is held whole, of a call that knows nothing of views."""
    document = b'{"name": "' + b"n" * 900_000 + b'"}'
    sent = head("POST", "/v1/vms", TOKEN, f"Content-Length: {len(document)}", "Content-Type: application/json")
    with victim.connect() as connection:
        connection.sendall(sent + document)
        ((status, problem),) = replies(connection, 1)
    assert status == 422 and b"name" in problem


def test_one_that_nobody_reads_takes_little(victim: Service) -> None:
    """Fifty strangers with a gigabyte each: they are answered, and what they go on sending is not kept."""
    with watched(victim) as seen:
        connections = [victim.connect() for _ in range(50)]
        for connection in connections:
            connection.settimeout(0.2)
            connection.sendall(request("/v1/vms/vm_0/traces", 1024 * MIB, None))
            with contextlib.suppress(OSError):  # the server reads slowly what it does not want, and closes
                connection.sendall(bytes(4 * MIB))
        for connection in connections:
            connection.close()
    assert seen.grown < 32 * MIB and seen.asked


def test_clients_that_leave_half_way(victim: Service, vm: str) -> None:
    """The machine is as it was, and free."""
    for _ in range(20):
        with victim.connect() as connection:
            connection.sendall(request(f"{vm}/traces?record=gpa8") + BODY[: len(BODY) // 2])
    with victim.connect() as connection:
        connection.sendall(request(f"{vm}/traces?record=gpa8") + BODY)
        assert replies(connection, 1)[0][0] == 201
