"""Calls that the tests of several rooms make, each answered as it should be unless its reply is returned."""

from __future__ import annotations

from typing import Any

import httpx2

from service.settings import MIB
from tests.support.bodies import Body

OCTETS = {"Content-Type": "application/octet-stream"}


def new_vm(client: httpx2.Client, **members: Any) -> str:
    """The URL of a new VM: 16 MiB of RAM at 0 and SPP enabled, unless told otherwise."""
    document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": 16 * MIB}], "spp": True, **members}
    reply = client.post("/v1/vms", json=document)
    assert reply.status_code == 201, reply.text
    return str(reply.headers["Location"])


def set_map(client: httpx2.Client, vm: str, gfn: int, word: int) -> int:
    """The status of setting the map of a page."""
    return client.put(f"{vm}/subpages", params={"gfn": gfn, "npages": 1}, json={"access": [word]}).status_code


def map_of(client: httpx2.Client, vm: str, gfn: int) -> int:
    return int(client.get(f"{vm}/subpages", params={"gfn": gfn, "npages": 1}).json()["access"][0], 16)


def store(client: httpx2.Client, vm: str, gpa: int, data: bytes) -> None:
    """Put bytes into guest memory, past every protection."""
    reply = client.put(f"{vm}/memory", params={"gpa": hex(gpa)}, content=data, headers=OCTETS)
    assert reply.status_code == 204, reply.text


def access(client: httpx2.Client, vm: str, **members: Any) -> dict[str, Any]:
    """What came of a single access."""
    reply = client.post(f"{vm}/accesses", json=members)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def replay(client: httpx2.Client, vm: str, body: Body, query: str = "") -> httpx2.Response:
    """The reply to a trace, whatever it is."""
    joined = "&".join(filter(None, (body.query, query)))
    return client.post(f"{vm}/traces?{joined}", content=body.content, headers=body.headers)


def replayed(client: httpx2.Client, vm: str, body: Body, query: str = "") -> dict[str, Any]:
    """The result of a trace that is taken."""
    return done(replay(client, vm, body, query))


def done(reply: httpx2.Response) -> dict[str, Any]:
    """The result of a trace that was taken."""
    assert reply.status_code == 201, reply.text
    found: dict[str, Any] = reply.json()
    return found


def key(text: str, **headers: str) -> dict[str, str]:
    """The headers of a call that is carried out once."""
    return {"Idempotency-Key": text, **headers}
