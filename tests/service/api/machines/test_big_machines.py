"""Machines whose description is large: the event loop goes on while they are rendered, and pages stay bounded."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from service.api.machines import vms
from service.api.machines.vms import Vm
from tests.contract.client import ContractClient

LEAVES = [{"function": hex(number), "eax": "0x1"} for number in range(100)]


def created(client: ContractClient, vcpus: int) -> str:
    document = {"vcpus": [{"id": number, "vp_index": number + 1, "cpuid": LEAVES} for number in range(vcpus)]}
    reply = client.post("/v1/vms", json=document)
    assert reply.status_code == 201, reply.text[:500]
    return str(reply.headers["Location"])


def test_a_machine_is_rendered_as_its_model_says(client: ContractClient) -> None:
    host = {"hyperv": {"cpuid": [{"function": "0x40000000"}]}, "vmx_capabilities": {"IA32_VMX_BASIC": "0x1"}}
    slots = [{"slot": 0, "gpa": 0, "size": 4096}]
    reply = client.post("/v1/vms", json={"vcpus": 2, "memory_slots": slots, "host": host, "name": 'a"\\é\u2028'})
    shown = reply.json()
    assert Vm.model_validate_json(reply.content).model_dump(mode="json") == shown
    url = reply.headers["Location"]
    assert client.get(url).json() == shown and client.get(url).headers["ETag"] == reply.headers["ETag"]
    assert shown in client.get("/v1/vms?limit=1000").json()["vms"]
    client.delete(url)


def test_a_tag_is_of_the_state(client: ContractClient, vm: str) -> None:
    before = client.get(vm).headers["ETag"]
    assert client.get(vm).headers["ETag"] == before
    client.put(f"{vm}/subpages", params={"gfn": 0}, json={"access": [0]})
    after = client.get(vm).headers["ETag"]
    assert after != before
    assert client.delete(vm, headers={"If-Match": before}).status_code == 412
    assert client.delete(vm, headers={"If-Match": after}).status_code == 204


def test_big_machines_are_rendered_off_the_loop(client: ContractClient, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[bool] = []
    render = vms._rendered

    def watched(shown: Any) -> bytes:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            places.append(False)
        else:
            places.append(True)
        return render(shown)

    monkeypatch.setattr(vms, "_rendered", watched)
    small, big = created(client, 1), created(client, 4)
    assert places == [True, False]
    client.get(small), client.get(big)
    assert places[2:] == [True, False]
    tag = client.get(big).headers["ETag"]
    seen = len(places)
    assert client.get(big, headers={"If-None-Match": tag}).status_code == 304
    assert client.delete(big, headers={"If-Match": tag}).status_code == 204
    assert len(places) == seen  # tags are compared without rendering
    client.delete(small)


def test_a_page_ends_where_it_is_large(client: ContractClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [created(client, 2) for _ in range(3)]
    monkeypatch.setattr(vms, "_PAGE_BYTES", 10_000)
    found: list[str] = []
    follow: str | None = "/v1/vms?limit=50"
    pages = 0
    while follow is not None:
        page = client.get(follow)
        assert len(page.content) < 10_000 + 50_000
        found += [f"/v1/vms/{item['id']}" for item in json.loads(page.content)["vms"]]
        follow, pages = page.json()["next"], pages + 1
    assert [url for url in found if url in made] == made and len(found) == len(set(found)) and pages >= 3
    for url in made:
        client.delete(url)
