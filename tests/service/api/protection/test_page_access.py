"""Page access and the write bitmap over HTTP, paired as KVMI pairs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.client import ContractClient
from tests.support.http import access

ALL = "0xffffffff"
PROFILES = ("kvm-2019", "kvm-latest")


def patch(client: ContractClient, vm: str, *entries: dict[str, Any], mode: str | None = None) -> Any:
    return client.patch(f"{vm}/page-access", json={"entries": list(entries), **({"mode": mode} if mode else {})})


def read(client: ContractClient, vm: str, gfn: int, npages: int = 1) -> list[tuple[str, str]]:
    reply = client.get(f"{vm}/page-access?gfn={gfn}&npages={npages}")
    assert reply.status_code == 200, reply.text
    return [(page["access"], page["write_bitmap"]) for page in reply.json()["pages"]]


# What an entry makes of a page that was as `before` says.
PAIRS: list[tuple[dict[str, Any], dict[str, Any], tuple[str, str]]] = [
    ({}, {"write_bitmap": ALL}, ("rwx", ALL)),
    ({}, {"write_bitmap": "0xfffffffe"}, ("r-x", "0xfffffffe")),
    ({}, {"write_bitmap": 0}, ("r-x", "0x0")),
    ({}, {"access": "r-x"}, ("r-x", "0x0")),
    ({}, {"access": 5}, ("r-x", "0x0")),
    ({}, {"access": "rwx"}, ("rwx", ALL)),
    ({}, {"access": "rw"}, ("rw-", ALL)),
    ({}, {"access": "x"}, ("--x", "0x0")),
    ({}, {"access": ""}, ("---", "0x0")),
    ({}, {"access": "r", "write_bitmap": "0x3"}, ("r--", "0x3")),
    ({}, {"access": 7, "write_bitmap": ALL}, ("rwx", ALL)),
    ({"write_bitmap": "0x3"}, {"access": "r-x"}, ("r-x", "0x3")),
    ({"write_bitmap": "0x3"}, {"access": "r"}, ("r--", "0x3")),
    ({"write_bitmap": "0x3"}, {"access": "rwx"}, ("rwx", ALL)),
    ({"write_bitmap": "0x3"}, {"write_bitmap": ALL}, ("rwx", ALL)),
    ({"access": "r"}, {"write_bitmap": ALL}, ("rw-", ALL)),
    ({"access": "r"}, {"write_bitmap": "0x1"}, ("r--", "0x1")),
    ({"access": "x"}, {"write_bitmap": "0x1"}, ("--x", "0x1")),
]


@pytest.mark.parametrize(("before", "entry", "expected"), PAIRS)
def test_pairing(
    vm: str, client: ContractClient, before: dict[str, Any], entry: dict[str, Any], expected: tuple[str, str]
) -> None:
    if before:
        assert patch(client, vm, {"gfn": 2, **before}).status_code == 200
    reply = patch(client, vm, {"gfn": "0x2", **entry})
    assert reply.json() == {"results": [{"gfn": "0x2", "result": "applied", "error": None}]}
    assert read(client, vm, 1, 3) == [("rwx", ALL), expected, ("rwx", ALL)]
    assert client.get(f"{vm}/subpages?gfn=2&layer=set").json()["access"] == [expected[1]]


@pytest.mark.parametrize(
    ("before", "entry", "field"),
    [
        ({}, {}, "access"),
        ({}, {"access": "rwx", "write_bitmap": 0}, "write_bitmap"),
        ({}, {"access": "r", "write_bitmap": ALL}, "write_bitmap"),
        ({}, {"access": "w"}, "access"),
        ({}, {"access": "wx", "write_bitmap": ALL}, "access"),
        ({"access": "x"}, {"write_bitmap": ALL}, "access"),
        ({}, {"access": 2}, "access"),
    ],
)
def test_entries_refused(
    vm: str, client: ContractClient, before: dict[str, Any], entry: dict[str, Any], field: str
) -> None:
    if before:
        patch(client, vm, {"gfn": 2, **before})
    was = read(client, vm, 2)
    reply = patch(client, vm, {"gfn": 1, "access": "r"}, {"gfn": 2, **entry})
    assert reply.status_code == 422 and reply.json()["field"] == f"entries[1].{field}", reply.text
    assert read(client, vm, 1) == [("rwx", ALL)] and read(client, vm, 2) == was


def test_modes(vm: str, client: ContractClient) -> None:
    batch = [{"gfn": 1, "access": "r"}, {"gfn": 0x9000, "access": "r"}, {"gfn": 2, "access": "r"}]
    reply = patch(client, vm, *batch)
    assert reply.status_code == 422 and reply.json()["field"] == "entries[1].gfn"
    assert read(client, vm, 1, 2) == [("rwx", ALL)] * 2
    reply = patch(client, vm, *batch, mode="stop-at-first")
    assert [item["result"] for item in reply.json()["results"]] == ["applied", "refused", "not-tried"]
    error = reply.json()["results"][1]["error"]
    assert (error["field"], error["value"], error["errno"]) == ("gfn", "0x9000", "EFAULT")
    assert read(client, vm, 1, 2) == [("r--", "0x0"), ("rwx", ALL)]
    reply = patch(client, vm, *batch, mode="apply-all")
    assert [item["result"] for item in reply.json()["results"]] == ["applied", "refused", "applied"]
    assert read(client, vm, 1, 2) == [("r--", "0x0")] * 2


def test_a_batch_is_done_in_order_and_has_a_limit(vm: str, client: ContractClient) -> None:
    reply = patch(client, vm, {"gfn": 1, "access": "r"}, {"gfn": 1, "write_bitmap": "0x7"})
    assert reply.status_code == 200 and read(client, vm, 1) == [("r--", "0x7")]
    assert patch(client, vm, *[{"gfn": n % 4096, "access": "r"} for n in range(4096)]).status_code == 200
    assert patch(client, vm, *[{"gfn": 1, "access": "r"}] * 4097).status_code == 422
    assert patch(client, vm).status_code == 422
    assert client.get(f"{vm}/page-access?gfn=0&npages=4097").json()["field"] == "npages"
    assert client.get(f"{vm}/page-access?gfn=0x1000").json()["field"] == "gfn"


@pytest.mark.parametrize("wrong", ["xr", "rwxx", "R", 8, -1, 1.5, True, ["r"]])
def test_access_is_letters_or_bits(vm: str, client: ContractClient, wrong: Any) -> None:
    assert patch(client, vm, {"gfn": 1, "access": wrong}).status_code == 422


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize(
    ("rights", "bitmap", "allowed"),
    [
        ("rwx", None, {"read", "write", "execute"}),
        ("rw-", None, {"read", "write"}),
        ("r-x", None, {"read", "execute"}),
        ("r--", "0x1", {"read", "write"}),
        ("r--", "0xfffffffe", {"read"}),
        ("--x", "0x1", {"execute"}),
        ("---", None, set()),
    ],
)
def test_what_the_guest_may(
    make_vm: Callable[..., str],
    client: ContractClient,
    profile: str,
    touched: bool,
    rights: str,
    bitmap: str | None,
    allowed: set[str],
) -> None:
    vm = make_vm(profile=profile)
    if touched:
        access(client, vm, gpa=0x2000)
    entry = {"gfn": 2, "access": rights} | ({"write_bitmap": bitmap} if bitmap else {})
    assert patch(client, vm, entry).status_code == 200
    for kind in ("read", "write", "execute"):
        for _ in range(2):
            found = access(client, vm, gpa=0x2000, access=kind)
            assert found["allowed"] == (kind in allowed), kind
            if kind not in allowed:
                assert found["resolution"] == "violation" and found["exits"][-1]["reason"] == 48
                assert (found["run"] is None) == (kind != "write")
    assert patch(client, vm, {"gfn": 2, "access": "rwx"}).status_code == 200
    assert all(access(client, vm, gpa=0x2000, access=kind)["allowed"] for kind in ("read", "write", "execute"))
    assert all(access(client, vm, gpa=0x3000, access=kind)["allowed"] for kind in ("read", "write", "execute"))


def test_what_a_tool_answers(vm: str, client: ContractClient) -> None:
    patch(client, vm, {"gfn": 2, "access": ""})
    assert access(client, vm, gpa=0x2000, access="read", on_violation="grant")["allowed"] is False
    # A page without read is not eligible for sub-page permissions: a grant opens nothing.
    granted = access(client, vm, gpa=0x2000, access="write", on_violation="grant", data="00112233445566aa")
    assert granted["allowed"] is False
    assert client.get(f"{vm}/memory?gpa=0x2000&size=8").content == bytes(8)
    assert read(client, vm, 2) == [("---", "0x0")]
    landed = access(client, vm, gpa=0x2000, access="write", on_violation="allow", data="00112233445566aa")
    assert landed["allowed"] is False
    assert client.get(f"{vm}/memory?gpa=0x2000&size=8").content.hex() == "00112233445566aa"


def test_violations_of_a_replay(vm: str, client: ContractClient) -> None:
    patch(client, vm, {"gfn": 2, "access": "r"})
    rows = [{"gpa": 0x2000, "size": 8, "access": kind} for kind in (0, 1, 2, 0, 2)]
    result = client.post(f"{vm}/traces", json={"accesses": rows}).json()
    assert result["violations"] == result["page_granular_violations"] == 3
    assert [item["access"] for item in result["exit_records"]] == [1, 2, 2]


def test_it_stands_beside_protections(vm: str, client: ContractClient) -> None:
    objects = [{"name": "table", "gpa": "0x2080", "size": 128}]
    client.post(f"{vm}/protections", json={"name": "kernel", "objects": objects})
    assert read(client, vm, 2) == [("rwx", ALL)]
    patch(client, vm, {"gfn": 2, "write_bitmap": "0x2"})
    assert client.get(f"{vm}/subpages?gfn=2").json()["access"] == ["0x0"]
    patch(client, vm, {"gfn": 2, "access": "rwx"})
    assert client.get(f"{vm}/subpages?gfn=2").json()["access"] == ["0xfffffffd"]
    client.delete(f"{vm}/protections/kernel")
    assert client.get(f"{vm}/subpages?gfn=2").json()["access"] == [ALL]


@pytest.mark.parametrize("profile", PROFILES)
def test_it_follows_its_slot(make_vm: Callable[..., str], client: ContractClient, profile: str) -> None:
    slot = {"gpa": 0, "size": 1 << 20}
    vm = make_vm(profile=profile, memory_slots=[{"slot": 0, **slot}])
    patch(client, vm, {"gfn": 2, "access": "r"})
    client.put(f"{vm}/memory-slots/0", json={**slot, "gpa": 8 << 20})
    assert read(client, vm, 0x802) == [("r--", "0x0")]
    assert access(client, vm, gpa=0x80_2000, access="execute")["allowed"] is False
    client.delete(f"{vm}/memory-slots/0")
    client.put(f"{vm}/memory-slots/0", json={**slot, "gpa": 8 << 20})
    assert read(client, vm, 0x802) == [("rwx", ALL)]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("host", [{}, {"spp": False}, {"vendor": "amd"}, {"ept": False}])
def test_without_spp_it_is_of_whole_pages(
    make_vm: Callable[..., str], client: ContractClient, profile: str, host: dict[str, Any]
) -> None:
    vm = make_vm(spp=False, profile=profile, host=host)
    assert read(client, vm, 2) == [("rwx", ALL)]
    assert patch(client, vm, {"gfn": 2, "access": "r"}).status_code == 200
    assert read(client, vm, 2) == [("r--", "0x0")]
    for kind in ("write", "execute"):
        found = access(client, vm, gpa=0x2000, access=kind)
        assert (found["allowed"], found["resolution"], found["run"]) == (False, "violation", None)
    assert access(client, vm, gpa=0x2000, access="read")["allowed"]
    problem = patch(client, vm, {"gfn": 3, "access": "r"}, {"gfn": 2, "write_bitmap": 1}).json()
    assert (problem["status"], problem["code"]) == (409, "spp-not-enabled")
    assert problem["field"] == "entries[1].write_bitmap" and read(client, vm, 3) == [("rwx", ALL)]
    reply = patch(client, vm, {"gfn": 2, "write_bitmap": 1}, {"gfn": 2, "write_bitmap": ALL}, mode="apply-all")
    assert [item["result"] for item in reply.json()["results"]] == ["refused", "applied"]
    assert reply.json()["results"][0]["error"]["errno"] == "EOPNOTSUPP"
    assert access(client, vm, gpa=0x2000)["allowed"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("spp", [False, True])
def test_it_holds_for_what_kvm_emulates(
    make_vm: Callable[..., str], client: ContractClient, profile: str, spp: bool
) -> None:
    vm = make_vm(spp=spp, profile=profile)
    patch(client, vm, {"gfn": 2, "access": ""})
    for kind in ("read", "write", "execute"):
        assert access(client, vm, gpa=0x2000, access=kind, source="emulated")["resolution"] == "violation"
    assert access(client, vm, gpa=0x2000, access="read", source="host")["allowed"]
    rows = [{"gpa": 0x2000, "size": 8, "access": kind, "source": 1} for kind in (0, 1, 2)]
    assert client.post(f"{vm}/traces", json={"accesses": rows}).json()["violations"] == 3


def test_it_needs_what_the_host_has(make_vm: Callable[..., str], client: ContractClient) -> None:
    without = make_vm(host={"vmx_capabilities": {"ept_vpid_cap": "0xf0106334140"}})
    reply = patch(client, without, {"gfn": 2, "access": "x"})
    assert reply.status_code == 422 and "execute-only" in reply.json()["rule"]
    assert patch(client, without, {"gfn": 2, "access": ""}).status_code == 200
    strict = make_vm(require_match=True)
    assert patch(client, strict, {"gfn": 2, "access": "r"}).status_code == 428


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("entry", [{"access": "r"}, {"access": "rw"}, {"access": "x"}, {"write_bitmap": "0x0"}])
def test_huge_pages_are_mapped_small(
    make_vm: Callable[..., str], client: ContractClient, profile: str, entry: dict[str, Any]
) -> None:
    slot = {"slot": 0, "gpa": 0, "size": 4 << 20, "host_page_size": 2 << 20}
    vm = make_vm(profile=profile, memory_slots=[slot])
    for first in (True, False):
        if first:
            access(client, vm, gpa=0x3000)
        patch(client, vm, {"gfn": 2, **entry})
        kind = "execute" if entry.get("access") in ("r", "rw") else "write"
        assert access(client, vm, gpa=0x2000, access=kind)["allowed"] is False
        assert access(client, vm, gpa=0x3000, access=kind)["allowed"] is True
        assert client.get(f"{vm}/walk?gpa=0x2000&access=read").json()["ept"][-1]["level"] == 1 or "x" in entry.values()
        patch(client, vm, {"gfn": 2, "access": "rwx"})
