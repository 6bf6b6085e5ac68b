"""A list of machines reads their heads: those that are not in memory stay out of it."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from service.settings import MIB
from service.storage.database import connect
from service.storage.urls import StoreUrl
from tests.contract.client import ContractClient
from tests.support.http import new_vm, set_map
from tests.support.server import Running
from tests.support.stores import serving


def loaded(service: Running) -> list[str]:
    return [entry.id for entry in service.app.state.registry.all() if entry.loaded is not None]


def listing(client: ContractClient, limit: int = 100) -> list[dict[str, Any]]:
    found, url = [], f"/v1/vms?limit={limit}"
    while url:
        page = client.get(url).json()
        found += page["vms"]
        url = page["next"]
    return found


def made(client: ContractClient) -> list[str]:
    """Machines that differ in everything that is shown."""
    vms = [
        new_vm(client, name="plain"),
        new_vm(client, name="later", profile="kvm-latest", spp=False, require_match=True),
        new_vm(client, vcpus=[{"id": 2, "vp_index": 9, "cpuid": [{"function": "0x1"}]}], host={"fail_allocation": 7}),
        new_vm(client, vcpus=3, host={"hyperv": {"cpuid": []}}, translation_cache="model", flush_policy="tlfs"),
    ]
    client.put(f"{vms[0]}/memory-slots/5", json={"gpa": 1 << 40, "size": MIB, "read_only": True})
    client.put(f"{vms[3]}/vcpus/1/cpuid", json={"entries": [{"function": "0x40000000"}]})
    set_map(client, vms[0], 1, 0)
    return vms


def test_listing_loads_nothing(store_url: str) -> None:
    with serving(store_url) as service:
        vms = made(service.client)
        before = [service.client.get(vm).json() for vm in vms]
        assert listing(service.client) == before
    with serving(store_url) as service:
        client = service.client
        assert listing(client) == before and listing(client, limit=3) == before
        assert loaded(service) == []
        # One in memory among the others, and changed there.
        assert set_map(client, vms[0], 1, 3) == 204
        now = listing(client)
        assert loaded(service) == [before[0]["id"]]
        assert now == [client.get(vm).json() for vm in vms]
        assert now[0]["revision"] == before[0]["revision"] + 1 and now[1:] == before[1:]
        client.delete(vms[1], headers={"If-Match": client.get(vms[1]).headers["ETag"]})
        assert [vm["id"] for vm in listing(client)] == [vm["id"] for vm in (before[0], *before[2:])]


def test_machines_of_a_release_before(store_url: str) -> None:
    """Their heads do not say all that is shown: they are read whole, once."""
    with serving(store_url) as service:
        vms = made(service.client)
        before = [service.client.get(vm).json() for vm in vms]
    engine = connect(StoreUrl.parse(store_url))
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        for number, text in connection.execute(sa.text("SELECT number, head FROM vms")).all():
            head = json.loads(text)
            del head["outline"]
            update = sa.text("UPDATE vms SET head = :head WHERE number = :number")
            connection.execute(update, {"head": json.dumps(head), "number": number})
    engine.dispose()
    with serving(store_url, max_loaded_vms=2) as service:
        assert listing(service.client) == before
        assert len(loaded(service)) == 2
        assert set_map(service.client, vms[0], 1, 3) == 204
    with serving(store_url) as service:
        assert listing(service.client)[0]["revision"] == before[0]["revision"] + 1
        assert before[0]["id"] not in loaded(service) and len(loaded(service)) == 3


def test_a_machine_whose_last_change_is_in_doubt(store_url: str) -> None:
    with serving(store_url) as service:
        vm = new_vm(service.client)
        before = listing(service.client)
        (entry,) = service.app.state.registry.all()
        entry.doubtful = True
        assert listing(service.client) == before and not entry.doubtful
        assert service.client.get(vm).json() == before[0]
