"""Clones over HTTP: a second policy beside the first, in both stores."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.security.tokens import MemoryTokens, TokenScope, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.bodies import ndjson, table
from tests.support.http import key, map_of, new_vm, replayed, set_map, store
from tests.support.server import Running, running
from tests.support.stores import serving

PROTECTION = {"name": "text", "objects": [{"name": "entry", "gpa": "0x2000", "size": 200}]}


@pytest.fixture(params=["memory", "sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory" if request.param == "memory" else f"sqlite:///{tmp_path}/clones.db"


@pytest.fixture
def started(place: str) -> Iterator[Running]:
    with serving(place) as service:
        yield service


def filled(client: ContractClient, **members: Any) -> str:
    vm = new_vm(client, name="first", vcpus=2, **members)
    store(client, vm, 0x1000, b"as it was")
    assert set_map(client, vm, 5, 0x0F) == 204
    assert client.post(f"{vm}/protections", json=PROTECTION).status_code == 201
    return vm


def clone_of(client: ContractClient, vm: str, **members: Any) -> str:
    reply = client.post(f"{vm}:clone", json=members)
    assert reply.status_code == 201, reply.text
    return str(reply.headers["Location"])


def contents(client: ContractClient, vm: str) -> tuple[bytes, int, list[dict[str, Any]]]:
    memory = client.get(f"{vm}/memory?gpa=0x1000&size=9", headers={"Accept": "application/octet-stream"}).content
    return memory, map_of(client, vm, 5), client.get(f"{vm}/protections").json()["protections"]


def used(service: Running) -> int:
    return int(service.app.state.registry._memory.used)


def test_a_clone_is_the_same_under_another_name(started: Running) -> None:
    client = started.client
    vm = filled(client)
    reply = client.post(f"{vm}:clone", json={"name": "second"})
    made, origin = reply.json(), client.get(vm).json()
    assert made["id"] != origin["id"] and made["name"] == "second" and made["revision"] == 1
    apart = ("id", "name", "revision", "created")
    assert {**made, **dict.fromkeys(apart)} == {**origin, **dict.fromkeys(apart)}
    assert client.get(reply.headers["Location"]).headers["ETag"] == reply.headers["ETag"]
    assert contents(client, f"/v1/vms/{made['id']}") == contents(client, vm)
    assert client.get(clone_of(client, vm)).json()["name"] == "first"
    event = client.get(f"/v1/vms/{made['id']}/events").json()["events"][0]
    assert event["id"] == 1 and event["detail"]["change"] == "created" and event["detail"]["origin"] == origin["id"]


def test_neither_sees_what_the_other_does(started: Running) -> None:
    client = started.client
    vm = filled(client)
    clone = clone_of(client, vm)
    then = contents(client, vm)
    store(client, vm, 0x1000, b"different")
    set_map(client, vm, 5, 1)
    client.delete(f"{vm}/protections/text")
    assert contents(client, clone) == then
    now = contents(client, vm)
    store(client, clone, 0x1000, b"elsewhere")
    set_map(client, clone, 5, 2)
    result = replayed(client, clone, ndjson(table(gpa=[0x2000, 0x9000])))
    assert result["violations"] == 1 and result["by_object"]["entry"]["violations"] == 1
    assert contents(client, vm) == now and contents(client, clone)[:2] == (b"elsewhere", 2)
    assert not client.get(f"{vm}/traces").json()["traces"]


def test_a_clone_outlives_its_origin_and_the_process(place: str) -> None:
    with serving(place) as service:
        vm = filled(service.client)
        then = contents(service.client, vm)
        clones = [clone_of(service.client, vm), clone_of(service.client, vm)]
        set_map(service.client, clones[1], 5, 3)
        assert service.client.delete(vm).status_code == 204
        assert contents(service.client, clones[0]) == then
        if place == "memory":
            return
    with serving(place) as service:
        assert contents(service.client, clones[0]) == then and map_of(service.client, clones[1], 5) == 3
        assert set_map(service.client, clones[0], 5, 4) == 204
        assert map_of(service.client, clone_of(service.client, clones[0]), 5) == 4


def test_every_clone_counts_whole_and_gives_it_back(started: Running) -> None:
    client = started.client
    vm = filled(client)
    alone = used(started)
    clones = [clone_of(client, vm) for _ in range(3)]
    assert used(started) == 4 * alone
    set_map(client, clones[0], 9, 1)
    for one in (vm, *clones):
        client.delete(one)
    client.post("/v1/vms", json={})
    assert used(started) < alone


def test_limits_are_those_of_a_creation() -> None:
    with running(Settings(warm_up=False, max_vms=2, max_memory_bytes=1 << 20)) as service:
        vm = new_vm(service.client)
        store(service.client, vm, 0, b"\xff" * (600 << 10))
        refused = service.client.post(f"{vm}:clone", json={})
        assert refused.status_code == 429 and refused.json()["limit"] == "max_memory_bytes"
        before = used(service)
        service.client.delete(vm)
        vm = new_vm(service.client)
        clone_of(service.client, vm)
        refused = service.client.post(f"{vm}:clone", json={})
        assert refused.status_code == 429 and refused.json()["limit"] == "max_vms"
        assert used(service) < before


def test_the_machine_of_a_neighbour_is_none() -> None:
    tokens = MemoryTokens()
    given = {}
    callers: tuple[tuple[str, TokenScope], ...] = (("red", "write"), ("blue", "write"), ("red", "read"))
    for tenant, scope in callers:
        record, token = mint(f"{tenant} {scope}", tenant=tenant, scope=scope, now=datetime.now(UTC))
        tokens.add(record)
        given[tenant, scope] = {"Authorization": f"Bearer {token}"}
    with running(Settings(warm_up=False), tokens) as service:
        own = given["red", "write"]
        vm = service.client.post("/v1/vms", json={}, headers=own).headers["Location"]
        for headers, status in ((given["blue", "write"], 404), (given["red", "read"], 403), (own, 201)):
            assert service.client.post(f"{vm}:clone", json={}, headers=headers).status_code == status
        assert len(service.client.get("/v1/vms", headers=own).json()["vms"]) == 2
        assert not service.client.get("/v1/vms", headers=given["blue", "write"]).json()["vms"]


def test_a_clone_is_made_once_under_a_key(client: ContractClient, vm: str) -> None:
    first = client.post(f"{vm}:clone", json={"name": "once"}, headers=key("clone-1"))
    again = client.post(f"{vm}:clone", json={"name": "once"}, headers=key("clone-1"))
    assert first.status_code == again.status_code == 201 and again.json() == first.json()
    names = [item["name"] for item in client.get("/v1/vms?limit=1000").json()["vms"]]
    assert names.count("once") == 1
    client.delete(first.headers["Location"])


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [({"name": 3}, 422, "name"), ({"name": "x" * 201}, 422, "name"), ({"vcpus": 2}, 422, "vcpus"), ([], 422, "body")],
)
def test_refused(client: ContractClient, vm: str, body: Any, status: int, field: str) -> None:
    reply = client.post(f"{vm}:clone", json=body)
    assert reply.status_code == status and reply.json()["field"] == field


def test_of_no_machine(client: ContractClient) -> None:
    reply = client.post("/v1/vms/vm_0000000000000000:clone", json={})
    assert reply.status_code == 404 and reply.json()["field"] == "vm"
