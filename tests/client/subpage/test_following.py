"""Events go on behind the last one that was given, whatever happens to the connection."""

from __future__ import annotations

import json
from typing import Any

import pytest

import subpage
from subpage import Client
from tests.client.stub import Answer, Stub, problem, stub

VM = Answer(document={"id": "vm_1", "name": ""})


def event(number: int | None, kind: str = "violation", **detail: Any) -> bytes:
    found = {"id": number, "kind": kind, "created": "2026-11-22T00:00:00Z", "trace": None, "detail": detail}
    head = b"" if number is None else b"id: %d\n" % number
    return head + b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps(found).encode())


def sse(*parts: bytes, cut: int | None = None) -> Answer:
    return Answer(body=b"retry: 2000\n\n" + b"".join(parts), headers={"Content-Type": "text/event-stream"}, cut=cut)


def asked(server: Stub) -> list[str | None]:
    """Where each reader wanted to begin."""
    return [headers.get("Last-Event-ID") for _, path, headers, _ in server.requests if "/events" in path]


DELETED = event(None, "end", reason="deleted")


def test_a_stream_that_breaks_is_begun_again() -> None:
    whole = event(1) + event(2)
    broken = sse(whole, event(3), cut=13 + len(whole) + 20)  # in the middle of the third
    with stub(VM, broken, sse(event(3), b":\nid: 7\n\n", cut=1000), sse(event(8), DELETED)) as server:
        with Client(server.url) as client:
            events = list(client.vm("vm_1").events(follow=True))
        assert [found["id"] for found in events] == [1, 2, 3, 8]
        assert asked(server) == [None, "2", "7"]


@pytest.mark.parametrize("reason", ["draining", "store-lost", "store-unavailable"])
def test_a_service_that_stops_is_waited_for(reason: str) -> None:
    ends = sse(event(1), event(None, "end", reason=reason))
    with stub(VM, ends, problem(503, "not-ready"), sse(event(2), DELETED)) as server, Client(server.url) as client:
        assert [found["id"] for found in client.vm("vm_1").events(follow=True)] == [1, 2]
        assert asked(server) == [None, "1", "1"]


def test_what_is_missing_is_told() -> None:
    dropped = event(7, "dropped", first=1, last=7, count=7, reason="not-kept")
    with stub(VM, sse(dropped, DELETED)) as server, Client(server.url) as client:
        (found,) = client.vm("vm_1").events(follow=True, after=0)
    assert found["detail"]["count"] == 7


def test_a_token_that_is_revoked_ends_it() -> None:
    revoked = sse(event(None, "end", reason="unauthenticated"))
    with stub(VM, revoked) as server, Client(server.url) as client, pytest.raises(subpage.Unauthenticated):
        list(client.vm("vm_1").events(follow=True))


def test_a_refusal_is_raised() -> None:
    missing = problem(404, "not-found")
    with stub(VM, missing) as server, Client(server.url) as client, pytest.raises(subpage.NotFound):
        list(client.vm("vm_1").events(follow=True))


def test_latest_is_a_number_from_the_start() -> None:
    page = Answer(document={"events": [], "last": 41, "next": None})
    quiet = sse(b":\nid: 41\n\n", cut=1000)
    with stub(VM, page, quiet, sse(event(42), DELETED)) as server, Client(server.url) as client:
        assert [found["id"] for found in client.vm("vm_1").events(follow=True, after="latest")] == [42]
        assert asked(server) == [None, "41", "41"]


def test_the_log_up_to_now_ends_by_itself() -> None:
    lines = b"".join(json.dumps({"id": number, "kind": "x", "detail": {}}).encode() + b"\n" for number in (1, 2))
    with stub(VM, Answer(body=lines)) as server, Client(server.url) as client:
        assert [found["id"] for found in client.vm("vm_1").events(kinds=["a", "b"])] == [1, 2]
        assert "kinds=a%2Cb" in server.requests[-1][1]
