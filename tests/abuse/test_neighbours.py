"""What one tenant takes leaves the others their share, and says nothing about itself."""

from __future__ import annotations

import base64
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from tests.abuse.conftest import Begin
from tests.abuse.process import Service
from tests.support.http import OCTETS, new_vm
from tests.support.waiting import until

_RECORDS = (0x1000).to_bytes(8, "little") * 64


def refused(reply: httpx2.Response, limit: str) -> None:
    assert reply.status_code == 429, reply.text
    assert {"code": "limit-exceeded", "limit": limit, "limit_of": "tenant"}.items() <= reply.json().items()


def test_machines(tenants: Begin) -> None:
    _, red, blue = tenants(max_vms=9)
    replies = [red.post("/v1/vms", json={}) for _ in range(9)]
    made = [reply for reply in replies if reply.status_code == 201]
    assert len(made) == 7  # three tenants, and one place kept for each of the two others
    refused(replies[-1], "max_vms")
    assert blue.post("/v1/vms", json={}).status_code == 201
    assert red.delete(made[0].headers["Location"]).status_code == 204
    assert red.post("/v1/vms", json={}).status_code == 201


def test_a_tenant_that_comes_when_all_is_taken(tenants: Begin) -> None:
    """Its share is there although the others had everything before it was known."""
    service, red, _ = tenants(max_vms=8)
    while red.post("/v1/vms", json={}).status_code == 201:
        pass
    with service.client(service.token("violet")[1]) as violet:
        until(lambda: violet.get("/v1/vms").status_code == 200)
        assert violet.post("/v1/vms", json={}).status_code == 201


class SlowReplays:
    """Replays whose bodies never come to their end."""

    def __init__(self, service: Service, client: httpx2.Client) -> None:
        parts = urlsplit(service.url)
        self._address = (parts.hostname, parts.port)
        self._authorization = client.headers["Authorization"]
        self._open = ExitStack()

    def begin(self, vm: str, query: str, media: str, beginning: bytes, more: str = "") -> socket.socket:
        connection = self._open.enter_context(socket.create_connection(self._address))
        connection.sendall(
            f"POST {vm}/traces?{query} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {self._authorization}\r\n"
            f"Content-Type: {media}\r\nContent-Length: {1 << 20}\r\n{more}\r\n".encode()
            + beginning
        )
        return connection

    def close(self) -> None:
        self._open.close()


@pytest.mark.parametrize(
    ("media", "query", "beginning", "more"),
    [
        ("application/octet-stream", "record=gpa8", _RECORDS, ""),
        ("application/octet-stream", "record=gpa8", b"", ""),
        ("application/x-ndjson", "", b'{"gpa": 4096}\n', ""),
        ("application/json", "", b'{"accesses": [', ""),
        ("application/octet-stream", "record=gpa8", _RECORDS, "Prefer: respond-async\r\n"),
    ],
)
def test_slow_bodies_hold_up_nobody(tenants: Begin, media: str, query: str, beginning: bytes, more: str) -> None:
    """Forty bodies that have begun and do not go on, where only two replays may compute at one time."""
    service, red, blue = tenants(replay_threads=2, running_jobs=1)
    mine, theirs = new_vm(blue), [new_vm(red) for _ in range(4)]
    slow = SlowReplays(service, red)
    for number in range(40):
        slow.begin(theirs[number % 4], query, media, beginning, more)
    for body in (_RECORDS, _RECORDS * 4096):
        reply = blue.post(f"{mine}/traces?record=gpa8", content=body, headers=OCTETS)
        assert reply.status_code == 201 and reply.json()["records"] == len(body) // 8
    # One more of red, which has taken no more than its places, comes to its turn as well.
    assert red.post(f"{new_vm(red)}/traces?record=gpa8", content=_RECORDS, headers=OCTETS).status_code == 201
    slow.close()


def test_a_body_that_becomes_slow_goes_on(tenants: Begin) -> None:
    """It loses its turn after its first part and gets it again for the rest."""
    _, red, _ = tenants(replay_threads=1)
    vm, other = new_vm(red), new_vm(red)
    counts = []

    def body() -> Iterator[bytes]:
        yield _RECORDS * 1024
        for _ in range(2):
            reply = red.post(f"{other}/traces?record=gpa8", content=_RECORDS, headers=OCTETS)
            counts.append(reply.json()["records"])
            yield _RECORDS

    reply = red.post(f"{vm}/traces?record=gpa8", content=body(), headers=OCTETS)
    assert reply.status_code == 201 and reply.json()["records"] == 64 * 1026 and counts == [64, 64]


def test_replays_under_way(tenants: Begin) -> None:
    service, red, blue = tenants(max_replays=6, busy_timeout=60)
    mine, theirs, other = new_vm(blue), new_vm(red), new_vm(red)
    slow = SlowReplays(service, red)
    begun = [slow.begin(theirs, "record=gpa8", "application/octet-stream", _RECORDS) for _ in range(8)]
    # Before it asks itself: its call would have the place of one of them.
    until(lambda: len(select.select(begun, [], [], 0)[0]) == 4)
    refused(red.post(f"{other}/traces?record=gpa8", content=_RECORDS, headers=OCTETS), "max_replays")
    assert blue.post(f"{mine}/traces?record=gpa8", content=_RECORDS, headers=OCTETS).status_code == 201
    slow.close()


def test_jobs_and_their_bodies(tenants: Begin) -> None:
    size = 1 << 16
    service, red, blue = tenants(max_queued_jobs=7, running_jobs=1, max_job_bytes=12 * size)
    mine, theirs = new_vm(blue), new_vm(red)
    later = {**OCTETS, "Prefer": "respond-async"}
    slow = SlowReplays(service, red)
    for _ in range(8):
        slow.begin(theirs, "record=gpa8", "application/octet-stream", _RECORDS, "Prefer: respond-async\r\n")
    replies = []

    def no_place_is_left() -> bool:
        replies.append(red.post(f"{theirs}/traces?record=gpa8", content=_RECORDS, headers=later))
        return bool(replies[-1].status_code == 429)

    until(no_place_is_left)
    refused(replies[-1], "max_queued_jobs")
    reply = blue.post(f"{mine}/traces?record=gpa8", content=_RECORDS * (size // 512), headers=later)
    assert reply.status_code == 202
    slow.close()

    def only_its_bytes_are_too_many() -> bool:
        """Once those that were slow have left their places."""
        replies.append(blue.post(f"{mine}/traces?record=gpa8", content=bytes(13 * size), headers=later))
        return bool(replies[-1].json().get("limit") == "max_job_bytes")

    until(only_its_bytes_are_too_many)
    refused(replies[-1], "max_job_bytes")


def test_streams_of_events(tenants: Begin) -> None:
    _service, red, blue = tenants(max_event_streams=6)
    mine, theirs = new_vm(blue), new_vm(red)
    follow = {"Accept": "text/event-stream"}
    with ExitStack() as stack:
        replies = [stack.enter_context(red.stream("GET", f"{theirs}/events", headers=follow)) for _ in range(6)]
        assert [reply.status_code for reply in replies] == [200] * 4 + [429] * 2
        replies[-1].read()
        refused(replies[-1], "max_event_streams")
        assert stack.enter_context(blue.stream("GET", f"{mine}/events", headers=follow)).status_code == 200


def test_numbers_are_of_ones_own(tenants: Begin) -> None:
    """What KVM_CREATE_VM returns, and cursors, say nothing about what other tenants make."""
    service, red, blue = tenants()

    def made(client: httpx2.Client) -> int:
        return int(client.post("/v1/ioctls/KVM_CREATE_VM", json={"arg": 0}).json()["return"])

    def cursor(client: httpx2.Client) -> int:
        follow = client.get("/v1/vms?limit=1").json()["next"]
        (text,) = parse_qs(urlsplit(follow).query)["cursor"]
        return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[:8], "little")

    first = made(blue)
    for _ in range(5):
        made(red)
    assert [made(blue), made(blue)] == [first + 1, first + 2]
    # A cursor holds no more than the moment that the last item of its page shows itself.
    shown = blue.get("/v1/vms?limit=1").json()["vms"][0]["created"]
    seconds, micros = shown.removesuffix("Z").split(".")
    assert cursor(blue) % 1_000_000 == int(micros) and seconds
    token = blue.headers["Authorization"].removeprefix("Bearer ")
    follow, listed = blue.get("/v1/vms?limit=1").json()["next"], blue.get("/v1/vms").json()["vms"]
    service.kill()
    again, _, _ = tenants()
    with again.client(token) as same:
        assert [vm["id"] for vm in same.get(follow.replace("limit=1", "limit=9")).json()["vms"]] == [
            vm["id"] for vm in listed[1:]
        ]
