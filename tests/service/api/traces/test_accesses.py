"""Single accesses, explanations and counters over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.client import ContractClient
from tests.support.http import access


@pytest.fixture
def guarded(vm: str, client: ContractClient) -> str:
    """A VM whose sub-page 1 of page 2 is protected."""
    client.post(f"{vm}/protections", json={"name": "p", "objects": [{"name": "guarded", "gpa": "0x2080", "size": 128}]})
    return vm


def test_a_write_lands(guarded: str, client: ContractClient) -> None:
    found = access(client, guarded, gpa="0x2000", data="0102030405060708")
    assert found["allowed"] and found["landed"] and found["resolution"] == "completed" and found["run"] is None
    assert client.get(f"{guarded}/memory?gpa=0x2000&size=8").content == bytes(range(1, 9))
    read = access(client, guarded, gpa="0x2000", size=4, access="read")
    assert read["data"] == "01020304" and read["allowed"]


@pytest.mark.parametrize(
    ("on_violation", "lands"), [("skip", False), ("stop", False), ("allow", True), ("grant", True)]
)
def test_a_violation(guarded: str, client: ContractClient, on_violation: str, lands: bool) -> None:
    found = access(
        client, guarded, gpa=0x20F8, size=8, data="ff" * 8, gva="0xffff888000002080", on_violation=on_violation
    )
    assert found["landed"] is lands
    assert found["allowed"] is (on_violation == "grant")
    last = found["exits"][-1]
    assert last["reason"] == 48 and last["gpa"] == "0x20f8" and last["gva"] == "0xffff888000002080"
    assert last["subpages"] == last["denied"] == "0x2" and last["objects"] == ["guarded"]
    assert client.get(f"{guarded}/memory?gpa=0x20f8&size=8").content == (b"\xff" * 8 if lands else bytes(8))
    assert found["run"]["name"] == "KVM_EXIT_SPP" and found["run"]["spp"]["addr"] == "0x20f8"
    granted = client.get(f"{guarded}/subpages?gfn=2&layer=granted").json()["access"][0]
    assert granted == ("0x2" if on_violation == "grant" else "0x0")


def test_mmio(vm: str, client: ContractClient) -> None:
    found = access(client, vm, gpa="0xfee00000", size=4)
    assert found["resolution"] == "mmio" and found["run"]["name"] == "KVM_EXIT_MMIO" and found["run"]["spp"] is None


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({}, "gpa"),
        ({"gpa": -1}, "gpa"),
        ({"gpa": "0xffffffffffffffff"}, "gpa"),
        ({"gpa": 0, "size": 0}, "size"),
        ({"gpa": 0, "size": 65536}, "size"),
        ({"gpa": 0, "access": 3}, "access"),
        ({"gpa": 0, "access": "modify"}, "access"),
        ({"gpa": 0, "access": True}, "access"),
        ({"gpa": 0, "vcpu": 9}, "vcpu"),
        ({"gpa": 0, "data": "0"}, "data"),
        ({"gpa": 0, "data": "zz"}, "data"),
        ({"gpa": 0, "data": "00"}, "data"),
        ({"gpa": 0, "access": "read", "data": "00" * 8}, "data"),
        ({"gpa": 0, "on_violation": "panic"}, "on_violation"),
        ({"gpa": 0, "kind": 5}, "kind"),
        ({"gpa": 0, "kind": "paging-read", "access": "write"}, "kind"),
        ({"gpa": 0, "kind": "shadow-stack", "access": "execute"}, "kind"),
        ({"gpa": 0, "linear": 16}, "linear"),
        ({"gpa": 0, "linear": "user"}, "linear"),
        ({"gpa": 0, "kind": 3, "linear": 0}, "linear"),
        ({"gva": 0, "kind": "paging-read"}, "kind"),
        ({"gva": 0, "linear": "valid,user"}, "linear"),
        ({"gva": 1 << 64}, "gva"),
    ],
)
def test_refused(vm: str, client: ContractClient, members: dict[str, Any], field: str) -> None:
    reply = client.post(f"{vm}/accesses", json=members)
    assert reply.status_code == 422, reply.text
    assert reply.json()["field"] == field


def test_walk_explains_and_changes_nothing(guarded: str, client: ContractClient) -> None:
    before = client.get(f"{guarded}/counters").json()
    missing = client.get(f"{guarded}/walk?gpa=0x2080").json()
    assert missing["outcome"] == "ept_violation" and missing["reason"] == 48 and missing["sentence"]
    assert client.get(f"{guarded}/counters").json() == before
    access(client, guarded, gpa="0x2080")
    refused = client.get(f"{guarded}/walk?gpa=0x2080&access=write&size=8&vcpu=0").json()
    assert refused["denied"] == refused["subpages"] == "0x2" and refused["sppt"][-1]["level"] == 1
    assert refused["ept"][-1]["fields"]["spp"] == "0x1"
    allowed = client.get(f"{guarded}/walk?gpa=0x2080&access=read").json()
    assert allowed["outcome"] == "allowed" and allowed["reason"] is None and allowed["access"] == 0


def test_walk_tells_what_the_processor_finds_and_how_it_ends(vm: str, client: ContractClient) -> None:
    """As the README has it: a fresh machine, one protection, and nothing has run yet."""
    protection = {"name": "paths", "objects": [{"name": "modprobe_path", "gpa": "0x5c6a0", "size": 256}]}
    client.post(f"{vm}/protections", json=protection)
    told = client.get(f"{vm}/walk?gpa=0x5c6a0&access=write&size=8").json()
    assert told["outcome"] == "ept_violation" and told["reason"] == 48 and told["denied"] == "0x0"
    assert told["sentence"].startswith("not mapped: PML4E at 0x") and "KVM maps the page" in told["sentence"]
    then = told["then"]
    assert then["resolution"] == "violation" and then["denied"] == "0x2000"
    assert then["sentence"].startswith("denied: sub-page 13 of SPPL1E at 0x") and then["sppt"][-1]["level"] == 1
    assert [row["resolution"] for row in then["exits"]] == ["armed", "violation"]
    assert then["exits"][-1]["objects"] == ["modprobe_path"]
    access(client, vm, gpa="0x5c6a0")
    assert client.get(f"{vm}/walk?gpa=0x5c6a0&access=write&size=8").json()["sentence"] == then["sentence"]
    free = client.get(f"{vm}/walk?gpa=0x7000").json()
    assert free["outcome"] == "ept_violation" and free["then"]["resolution"] == "completed"
    assert free["then"]["sentence"].startswith("allowed") and free["then"]["ept"][-1]["level"] == 1
    nowhere = client.get(f"{vm}/walk?gpa=0x40000000").json()["then"]
    assert nowhere["resolution"] == "mmio" and "no memory slot" in nowhere["sentence"] and len(nowhere["exits"]) == 1


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "gpa"),
        ("gpa=0&access=3", "access"),
        ("gpa=0&size=0", "size"),
        ("gpa=0&vcpu=5", "vcpu"),
        ("gpa=0xffffffffffffffff", "gpa"),
        ("gpa=0&vpcu=1", "vpcu"),
    ],
)
def test_walk_refused(vm: str, client: ContractClient, query: str, field: str) -> None:
    reply = client.get(f"{vm}/walk?{query}")
    assert reply.status_code == 422 and reply.json()["field"] == field


def test_counters(guarded: str, client: ContractClient) -> None:
    access(client, guarded, gpa="0x2080")
    counters = client.get(f"{guarded}/counters").json()["counters"]
    assert counters["violations"] == 1 and counters["writes"] == 1 and counters["exits_ept_violation"] >= 1


def test_profiles_say_where_the_guest_is(make_vm: Callable[..., str], client: ContractClient) -> None:
    for profile, advanced, reason in (("kvm-2019", True, 28), ("kvm-latest", False, 29)):
        vm = make_vm(profile=profile)
        client.put(f"{vm}/subpages?gfn=2", json={"access": [0]})
        run = access(client, vm, gpa="0x2080")["run"]
        assert run["rip_advanced"] is advanced and run["exit_reason"] == reason
