"""Host memory events over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support.http import access

PROFILES = ("kvm-2019", "kvm-latest")
EVENTS = (
    "unmap",
    "migrate",
    "remap-read-only",
    "remap-writable",
    "write-protect",
    "age",
    "split",
    "collapse",
    "shrink",
    "zap",
)


def happen(client: ContractClient, vm: str, **event: Any) -> dict[str, Any]:
    reply = client.post(f"{vm}/host-memory", json=event)
    assert reply.status_code == 200, reply.text
    done: dict[str, Any] = reply.json()
    return done


def write(client: ContractClient, vm: str, gpa: int) -> str:
    return str(access(client, vm, gpa=hex(gpa))["resolution"])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("event", EVENTS)
def test_page_stays_protected_after_every_event(
    make_vm: Callable[..., str], client: ContractClient, profile: str, event: str
) -> None:
    vm = make_vm(profile=profile)
    client.put(f"{vm}/subpages?gfn=0x205&npages=1", json={"access": ["0x0000000f"]})
    assert [write(client, vm, 0x20_5000), write(client, vm, 0x20_5200)] == ["completed", "violation"]
    done = happen(client, vm, event=event, gfn="0x200", npages=16)
    assert (done["event"], done["gfn"], done["npages"]) == (event, "0x200", 16)
    unprotected = profile == "kvm-2019" and event == "collapse"
    assert write(client, vm, 0x20_5200) == ("completed" if unprotected else "violation")
    assert write(client, vm, 0x20_5000) == "completed"


def test_reply_says_what_it_did_to_the_tables(vm: str, client: ContractClient) -> None:
    write(client, vm, 0x5000)
    assert happen(client, vm, event="unmap", gfn=0, npages=1024) == {
        "event": "unmap",
        "gfn": "0x0",
        "npages": 1024,
        "leaves_changed": 1,
        "frames_freed": 0,
    }
    assert happen(client, vm, event="zap") == {
        "event": "zap",
        "gfn": None,
        "npages": None,
        "leaves_changed": None,
        "frames_freed": 3,
    }
    assert happen(client, vm, event="age", gfn="5")["npages"] == 1


def test_write_through_a_large_page_says_that_nothing_enforced_the_bitmap(
    make_vm: Callable[..., str], client: ContractClient
) -> None:
    slots = [{"slot": 0, "gpa": 0, "size": 4 * MIB, "host_page_size": 2 * MIB}]
    vm = make_vm(memory_slots=slots)
    client.put(f"{vm}/subpages?gfn=5&npages=1", json={"access": ["0x0"]})
    reply = client.post(f"{vm}/accesses", json={"gpa": "0x5000"}).json()
    assert (reply["allowed"], reply["landed"], reply["unenforced"]) == (True, True, True)
    accesses = [{"gpa": 0x5000}, {"gpa": 0x6000}, {"gpa": 0x5080}]
    result = client.post(f"{vm}/traces", json={"accesses": accesses}).json()
    assert (result["violations"], result["unenforced_writes"]) == (0, 2)
    happen(client, vm, event="split", gfn=5)
    reply = client.post(f"{vm}/accesses", json={"gpa": "0x5000"}).json()
    assert (reply["resolution"], reply["unenforced"]) == ("violation", False)
    assert client.get(f"{vm}/counters").json()["counters"]["unenforced_writes"] == 3


REFUSED = [
    ({"event": "melt", "gfn": 5}, "event"),
    ({"event": "unmap"}, "gfn"),
    ({"event": "zap", "npages": 3}, "gfn"),
    ({"event": "unmap", "gfn": 5, "npages": 0}, "npages"),
    ({"event": "unmap", "gfn": 5, "npages": 1 << 21}, "npages"),
    ({"event": "unmap", "gfn": 1 << 20}, "gfn"),
    ({"event": "unmap", "gfn": 5, "pages": 2}, "pages"),
    ({"gfn": 5}, "event"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED)
def test_refused(vm: str, client: ContractClient, body: dict[str, Any], field: str) -> None:
    before = client.get(f"{vm}/counters").json()
    reply = client.post(f"{vm}/host-memory", json=body)
    assert reply.status_code == 422, reply.text
    problem = reply.json()
    assert field in (problem.get("field"), *(error.get("field") for error in problem.get("errors", ())))
    assert client.get(f"{vm}/counters").json() == before


def test_unknown_vm(client: ContractClient) -> None:
    assert client.post("/v1/vms/vm_0000000000000000/host-memory", json={"event": "zap"}).status_code == 404
