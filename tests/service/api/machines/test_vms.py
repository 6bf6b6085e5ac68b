"""Virtual machines over HTTP."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.server import running

SLOT = {"slot": 0, "gpa": 0, "size": "0x100000"}


def test_create_read_delete(client: ContractClient) -> None:
    reply = client.post("/v1/vms", json={"name": "guest", "memory_slots": [SLOT], "spp": True})
    assert reply.status_code == 201
    document = reply.json()
    assert re.fullmatch(r"vm_[0-9a-f]{16}", document["id"])
    assert reply.headers["Location"] == f"/v1/vms/{document['id']}"
    assert document["memory_slots"] == [
        {
            "slot": 0,
            "address_space": 0,
            "gpa": "0x0",
            "size": "0x100000",
            "read_only": False,
            "log_dirty": False,
            "host_page_size": 4096,
            "userspace_addr": "0x0",
            "backing": None,
        }
    ]
    assert document["spp"] is True and document["profile"] == "kvm-2019" and document["revision"] == 1
    assert document["vcpus"] == [{"id": 0, "vp_index": None, "cpuid": []}]

    again = client.get(reply.headers["Location"])
    assert again.json() == document and again.headers["ETag"] == reply.headers["ETag"]
    assert client.get(reply.headers["Location"], headers={"If-None-Match": again.headers["ETag"]}).status_code == 304

    assert client.delete(reply.headers["Location"]).status_code == 204
    for gone in (client.get, client.delete):
        assert gone(reply.headers["Location"]).status_code == 404


def test_defaults(client: ContractClient) -> None:
    document = client.post("/v1/vms", json={}).json()
    assert document["spp"] is False and document["memory_slots"] == [] and document["maxphyaddr"] == 46
    assert document["host"]["vendor"] == "intel" and document["translation_cache"] == "off"
    client.delete(f"/v1/vms/{document['id']}")


def test_everything_that_can_be_said_is_told_back(client: ContractClient) -> None:
    leaf = {"function": "0x40000000", "index": "0x0", "eax": "0x1", "ebx": "0x0", "ecx": "0x0", "edx": "0xffffffff"}
    wanted = {
        "name": "a long label",
        "profile": "kvm-latest",
        "vcpus": [{"id": 0, "vp_index": None, "cpuid": [leaf]}, {"id": 7, "vp_index": 3, "cpuid": []}],
        "maxphyaddr": 40,
        "host": {"vendor": "intel", "nested": False, "vmx_capabilities": {"ept_vpid_cap": "0xf0106334141"}},
        "require_match": False,
    }
    document = client.post("/v1/vms", json=wanted).json()
    for name, value in wanted.items():
        if name == "host":
            assert isinstance(value, dict) and value.items() <= document["host"].items()
        else:
            assert document[name] == value
    client.delete(f"/v1/vms/{document['id']}")


def test_vcpus_as_a_count(client: ContractClient) -> None:
    document = client.post("/v1/vms", json={"vcpus": 3}).json()
    assert [vcpu["id"] for vcpu in document["vcpus"]] == [0, 1, 2]
    client.delete(f"/v1/vms/{document['id']}")


def test_ids_differ(make_vm: Callable[..., str]) -> None:
    assert len({make_vm() for _ in range(5)}) == 5


def test_list_in_pages(make_vm: Callable[..., str], client: ContractClient) -> None:
    made = [make_vm(name=f"page {n}") for n in range(5)]
    seen: list[str] = []
    url = "/v1/vms?limit=2"
    while url:
        page = client.get(url).json()
        assert len(page["vms"]) <= 2
        seen += [vm["id"] for vm in page["vms"]]
        url = page["next"]
    assert [f"/v1/vms/{vm}" for vm in seen if f"/v1/vms/{vm}" in made] == made
    assert len(set(seen)) == len(seen)


def test_a_page_is_stable_while_vms_come_and_go(make_vm: Callable[..., str], client: ContractClient) -> None:
    made = [make_vm() for _ in range(3)]
    first = client.get("/v1/vms?limit=1000").json()
    assert first["next"] is None
    cursor = client.get(f"/v1/vms?limit={len(first['vms']) - 1}").json()["next"]
    client.delete(made[0])
    later = make_vm()
    rest = [f"/v1/vms/{vm['id']}" for vm in client.get(cursor).json()["vms"]]
    assert rest == [made[2], later]


@pytest.mark.parametrize(
    "query", ["cursor=abc", "cursor=", "cursor=AAAAAAAAAAAAAAAA", "limit=0", "limit=1001", "limit=x"]
)
def test_bad_pages(client: ContractClient, query: str) -> None:
    reply = client.get(f"/v1/vms?{query}")
    assert reply.status_code == 422 and reply.json()["field"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"nmae": "x"}, "nmae"),
        ({"name": 3}, "name"),
        ({"profile": "kvm-2020"}, "profile"),
        ({"vcpus": 0}, "vcpus"),
        ({"vcpus": True}, "vcpus"),
        ({"vcpus": []}, "vcpus"),
        ({"vcpus": [{"id": -1}]}, "vcpus[0].id"),
        ({"vcpus": [{"id": 0}, {"id": 0}]}, "vcpus"),
        ({"vcpus": [{"id": 0, "colour": 1}]}, "vcpus[0].colour"),
        ({"maxphyaddr": 60}, "maxphyaddr"),
        ({"maxphyaddr": 46.0}, "maxphyaddr"),
        ({"host": {"vendor": "via"}}, "host.vendor"),
        ({"host": {"vmx_capabilities": {"nonsense": 1}}}, "host.vmx_capabilities"),
        ({"host": {"vmx_capabilities": {"ept_vpid_cap": "0x1ffffffffffffffff"}}}, "host.vmx_capabilities.ept_vpid_cap"),
        ({"spp": "yes"}, "spp"),
        ({"memory_slots": [{"gpa": 0, "size": 4096}]}, "memory_slots[0].slot"),
        ({"memory_slots": [SLOT, {"slot": 1, "gpa": "0xff000", "size": 4096}]}, "memory_slots[1].gpa"),
        ({"memory_slots": [SLOT, {"slot": 0, "gpa": "0x200000", "size": 4096}]}, "memory_slots[1].slot"),
        ({"memory_slots": [{"slot": 0, "gpa": 1, "size": 4096}]}, "memory_slots[0].gpa"),
        ({"memory_slots": [{"slot": 0, "gpa": 0, "size": 0}]}, "memory_slots[0].size"),
        ({"memory_slots": [{"slot": 0, "gpa": 0, "size": -4096}]}, "memory_slots[0].size"),
        ({"memory_slots": [{"slot": 0, "gpa": "0x3ffffffff000", "size": 8192}]}, "memory_slots[0].gpa"),
    ],
)
def test_refused(client: ContractClient, document: dict[str, Any], field: str) -> None:
    before = client.get("/v1/vms?limit=1000").json()
    reply = client.post("/v1/vms", json=document)
    assert reply.status_code == 422, reply.text
    problem = reply.json()
    assert problem["field"] == field and problem["rule"]
    assert client.get("/v1/vms?limit=1000").json() == before


def test_hosts_of_nesting_are_told_back(make_vm: Callable[..., str], client: ContractClient) -> None:
    leaf = {"function": "0x4000000a", "index": "0x0", "eax": "0xa0101", "ebx": "0x0", "ecx": "0x0", "edx": "0x0"}
    host = {
        "evmcs": True,
        "hyperv": {"cpuid": [leaf], "fail_allocation": False},
        "nested_evmcs": False,
        "smt": False,
        "vmx_capabilities": {"IA32_VMX_MISC": "0x65"},
    }
    told = client.get(make_vm(host=host)).json()["host"]
    assert host.items() <= told.items()


@pytest.mark.parametrize("host", [{"vendor": "amd"}, {"ept": False}, {"spp": False}])
def test_spp_needs_a_host_that_has_it(client: ContractClient, host: dict[str, Any]) -> None:
    reply = client.post("/v1/vms", json={"host": host, "spp": True})
    assert reply.status_code == 409 and reply.json()["code"] == "unsupported"


def test_several_faults_are_all_told(client: ContractClient) -> None:
    problem = client.post("/v1/vms", json={"nmae": "x", "maxphyaddr": "wide"}).json()
    assert {fault["field"] for fault in problem["errors"]} == {"nmae", "maxphyaddr"}


def test_as_many_vms_as_the_limit() -> None:
    with running(Settings(warm_up=False, max_vms=2)) as service:
        client = service.client
        made = [client.post("/v1/vms", json={}).headers["Location"] for _ in range(2)]
        reply = client.post("/v1/vms", json={})
        assert reply.status_code == 429
        assert reply.json()["field"] == "max_vms" and reply.headers["Retry-After"]
        client.delete(made[0])
        assert client.post("/v1/vms", json={}).status_code == 201


def test_every_change_counts_as_a_revision(vm: str, client: ContractClient) -> None:
    before = client.get(vm)
    client.put(f"{vm}/subpages?gfn=1", json={"access": [0]})
    client.put(f"{vm}/subpages?gfn=1", json={"access": ["nonsense"]})
    after = client.get(vm)
    assert after.json()["revision"] == before.json()["revision"] + 1
    assert after.headers["ETag"] != before.headers["ETag"]


def test_delete_only_what_was_read(vm: str, client: ContractClient) -> None:
    tag = client.get(vm).headers["ETag"]
    client.put(f"{vm}/subpages?gfn=1", json={"access": [0]})
    assert client.delete(vm, headers={"If-Match": tag}).status_code == 412
    assert client.delete(vm, headers={"If-Match": f"W/{client.get(vm).headers['ETag']}"}).status_code == 412
    assert client.delete(vm, headers={"If-Match": f'"other", {client.get(vm).headers["ETag"]}'}).status_code == 204
