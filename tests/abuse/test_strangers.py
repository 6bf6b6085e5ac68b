"""Who may is decided before anything of a machine is read: an id that is another's is like one that never was."""

from __future__ import annotations

import httpx2
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from service.settings import MIB
from tests.abuse.conftest import Begin
from tests.abuse.process import Service
from tests.support.http import OCTETS, new_vm
from tests.support.waiting import until

_NEVER = "/v1/vms/vm_0000000000000000"
_LARGE = 48 * MIB

# (method, path below the machine): every kind of route that looks at a machine.
_CALLS = [
    ("GET", ""),
    ("GET", "/subpages?gfn=0&npages=1"),
    ("GET", "/events"),
    ("GET", "/events?after=latest"),
    ("GET", "/traces"),
    ("GET", "/traces/tr_0000000000000000/exits"),
    ("GET", "/counters"),
    ("GET", "/nothing-of-the-kind"),
    ("DELETE", ""),
    ("PUT", "/spp"),
    ("POST", "/traces"),
    ("POST", "/accesses"),
    ("POST", "/ioctls/KVM_GET_API_VERSION"),
    ("POST", "/vcpus/0/ioctls/KVM_GET_API_VERSION"),
]


def frames_in_memory(admin: httpx2.Client) -> float:
    """4 KiB frames of machines that are loaded, over all tenants."""
    lines = admin.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("subpage_frames{"))


@pytest.fixture
def stored(tenants: Begin) -> tuple[Service, str, httpx2.Client, httpx2.Client]:
    """A machine of blue that is in the store and not in memory: its URL, a client of red, and an admin of green."""
    service, _, blue = tenants()
    vm = new_vm(blue, memory_slots=[{"slot": 0, "gpa": 0, "size": 64 * MIB}])
    body = b"\x5a" * _LARGE
    assert blue.put(f"{vm}/memory?gpa=0&size={_LARGE}", content=body, headers=OCTETS).status_code in (200, 204)
    service.kill()
    again, red, _ = tenants()
    admin = again.client(again.token("green", "admin")[1])
    until(lambda: admin.get("/metrics").status_code == 200)
    return again, vm, red, admin


def test_nothing_is_loaded_for_strangers_and_other_tenants(
    stored: tuple[Service, str, httpx2.Client, httpx2.Client],
) -> None:
    service, vm, red, admin = stored
    stranger = service.client(None)
    before = service.peak()
    for method, path in _CALLS:
        for key in ({}, {"Idempotency-Key": f"{method}{len(path)}"}):
            assert stranger.request(method, vm + path, headers=key).status_code in (401, 404, 405), path
            reply = red.request(method, vm + path, headers=key)
            like = red.request(method, _NEVER + path, headers={name: value + "x" for name, value in key.items()})
            assert reply.status_code == like.status_code and reply.status_code in (404, 405, 415, 422), path
            told, expected = reply.json(), like.json()
            assert {**told, "detail": "", "instance": "", "value": ""} == {
                **expected,
                "detail": "",
                "instance": "",
                "value": "",
            }
    for headers in ({}, dict(red.headers)):
        given = {name: value for name, value in headers.items() if name == "authorization"}
        socket = f"{service.url.replace('http', 'ws')}{vm}/introspection"
        with pytest.raises(InvalidStatus) as refused, connect(socket, additional_headers=given):
            pass
        assert refused.value.response.status_code == (404 if headers else 401)
    assert frames_in_memory(admin) == 0
    assert service.peak() - before < _LARGE / 2
    stranger.close()
    admin.close()


def test_an_answer_that_is_kept_needs_no_machine(tenants: Begin) -> None:
    """A call under a key that was answered before is answered again from what is kept."""
    service, red, _ = tenants()
    vm = new_vm(red)
    key = {"Idempotency-Key": "once"}
    access = {"gpa": 0, "access": "write"}
    given = red.post(f"{vm}/accesses", json=access, headers=key)
    assert given.status_code in (200, 201), given.text
    token = red.headers["Authorization"]
    service.kill()
    again, _, _ = tenants()
    admin = again.client(again.token("green", "admin")[1])
    until(lambda: admin.get("/metrics").status_code == 200)
    same = again.client(None)
    same.headers["Authorization"] = token
    reply = same.post(f"{vm}/accesses", json=access, headers=key)
    assert reply.headers["Idempotency-Replayed"] == "true" and reply.json() == given.json()
    assert frames_in_memory(admin) == 0
    assert same.get(vm).status_code == 200 and frames_in_memory(admin) > 0
    same.close()
    admin.close()
