"""Dirty tracking over HTTP: switching, looking, two-step harvests, KVM's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.settings import MIB
from tests.contract.client import ContractClient

PROFILES = ("kvm-2019", "kvm-latest")


def track(client: ContractClient, vm: str, tracking: str, method: str = "write-protect") -> None:
    reply = client.put(f"{vm}/dirty", json={"tracking": tracking, "method": method})
    assert reply.status_code == 200 and reply.json() == {"tracking": tracking, "method": method}, reply.text


def write(client: ContractClient, vm: str, *gpas: int, size: int = 8, **query: str) -> dict[str, Any]:
    accesses = [{"gpa": gpa, "size": size} for gpa in gpas]
    reply = client.post(f"{vm}/traces", params=query, json={"accesses": accesses})
    assert reply.status_code == 201, reply.text
    found: dict[str, Any] = reply.json()
    return found


def harvest(client: ContractClient, vm: str, *, acknowledge: bool = True) -> dict[str, Any]:
    reply = client.post(f"{vm}/dirty:harvest")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    if acknowledge:
        done = client.post(f"{vm}/dirty:acknowledge", json={"harvest": found["harvest"]})
        assert done.json() == {"harvest": found["harvest"], "repeated": False}
    return found


def pages(found: dict[str, Any]) -> dict[int, int]:
    return {int(page["gfn"], 16): int(page["written"], 16) for page in found["pages"]}


@pytest.mark.parametrize("profile", PROFILES)
def test_which_sub_pages_were_written(make_vm: Callable[..., str], client: ContractClient, profile: str) -> None:
    vm = make_vm(profile=profile)
    track(client, vm, "subpage")
    result = write(client, vm, 0x2000, 0x2084, 0x20FC, 0x5F80, include="all")
    assert result["violations"] == result["page_granular_violations"] == 0
    assert "dirty-logged" in [record["resolution"] for record in result["exit_records"]]
    found = harvest(client, vm)
    # 0x20fc + 8 lies in the sub-pages 1 and 2.
    assert pages(found) == {2: 0b111, 5: 1 << 31}
    assert (found["harvest"], found["npages"], found["next"]) == (1, 2, None)
    assert (found["dirty_bytes_page_granular"], found["dirty_bytes_subpage"]) == (8192, 4 * 128)
    assert harvest(client, vm)["pages"] == []
    write(client, vm, 0x2000)
    assert pages(harvest(client, vm)) == {2: 1}
    assert client.get(f"{vm}/counters").json()["counters"]["dirty_harvests"] == 3


@pytest.mark.parametrize("method", ["write-protect", "pml"])
@pytest.mark.parametrize("profile", PROFILES)
def test_whole_pages(make_vm: Callable[..., str], client: ContractClient, profile: str, method: str) -> None:
    vm = make_vm(profile=profile)
    client.put(f"{vm}/subpages?gfn=3", json={"access": ["0x1"]})
    track(client, vm, "page", method)
    assert write(client, vm, 0x2000, 0x3000, 0x4010, 0x3080)["violations"] == 1
    write(client, vm, 0x9080)
    found = harvest(client, vm)
    assert pages(found) == dict.fromkeys((2, 3, 4, 9), 0xFFFF_FFFF)
    assert found["dirty_bytes_page_granular"] == found["dirty_bytes_subpage"] == 4 * 4096
    assert write(client, vm, 0x3080, 0x3100)["violations"] == 2
    assert harvest(client, vm)["pages"] == []
    write(client, vm, 0x3000)
    assert pages(harvest(client, vm)) == {3: 0xFFFF_FFFF}


def test_a_lost_reply_loses_nothing(vm: str, client: ContractClient) -> None:
    track(client, vm, "subpage")
    write(client, vm, 0x2000)
    lost = harvest(client, vm, acknowledge=False)
    write(client, vm, 0x2000, 0x3000)
    assert client.get(f"{vm}/dirty").json()["outstanding"] == lost["harvest"]
    assert harvest(client, vm, acknowledge=False) == lost
    assert client.get(f"{vm}/dirty/harvests/{lost['harvest']}").json() == lost
    for repeated in (False, True):
        reply = client.post(f"{vm}/dirty:acknowledge", json={"harvest": lost["harvest"]})
        assert reply.status_code == 200 and reply.json()["repeated"] is repeated
    assert client.get(f"{vm}/dirty/harvests/{lost['harvest']}").status_code == 404
    following = harvest(client, vm)
    assert following["harvest"] == lost["harvest"] + 1 and pages(following) == {2: 1, 3: 1}
    # An old acknowledgement that arrives late touches nothing.
    write(client, vm, 0x4000)
    harvest(client, vm, acknowledge=False)
    assert client.post(f"{vm}/dirty:acknowledge", json={"harvest": 1}).json()["repeated"] is True
    assert pages(harvest(client, vm)) == {4: 1}


@pytest.mark.parametrize("number", [0, -1, 2, 1 << 70])
def test_no_harvest_has_that_number(vm: str, client: ContractClient, number: int) -> None:
    track(client, vm, "page")
    harvest(client, vm)
    reply = client.post(f"{vm}/dirty:acknowledge", json={"harvest": number})
    assert reply.status_code == 404 and reply.json()["field"] == "harvest"


@pytest.mark.parametrize("wrong", [{}, {"harvest": "1"}, {"harvest": None}, {"harvest": 1, "x": 2}])
def test_acknowledgements_refused(vm: str, client: ContractClient, wrong: dict[str, Any]) -> None:
    assert client.post(f"{vm}/dirty:acknowledge", json=wrong).status_code == 422


def test_long_harvests_come_in_pages(vm: str, client: ContractClient) -> None:
    track(client, vm, "subpage")
    write(client, vm, *range(0, 50 * 4096, 4096))
    first = client.post(f"{vm}/dirty:harvest?limit=20").json()
    write(client, vm, *range(60 * 4096, 70 * 4096, 4096))
    found, url = pages(first), first["next"]
    while url:
        page = client.get(url).json()
        assert page["npages"] == 50 and page["dirty_bytes_subpage"] == 50 * 128
        found |= pages(page)
        url = page["next"]
    assert found == dict.fromkeys(range(50), 1)
    assert client.post(f"{vm}/dirty:harvest?limit=0").status_code == 422
    assert client.get(f"{vm}/dirty/harvests/1?cursor=x").json()["field"] == "cursor"


def test_looking_takes_nothing(make_vm: Callable[..., str], client: ContractClient) -> None:
    slots = [{"slot": 0, "gpa": 0, "size": MIB}, {"slot": 1, "gpa": 4 * MIB, "size": MIB, "log_dirty": True}]
    vm = make_vm(memory_slots=slots)
    track(client, vm, "subpage", "pml")
    write(client, vm, 0x1000, 0x3080, 4 * MIB, 4 * MIB + 0x5000)
    every = [("0x1", "0x1", False), ("0x3", "0x2", False), ("0x400", "0x1", True), ("0x405", "0x1", True)]

    def look(query: str = "") -> list[tuple[str, str, bool]]:
        found: list[tuple[str, str, bool]] = []
        url = f"{vm}/dirty?limit=1{query}"
        while url:
            page = client.get(url).json()
            found += [(item["gfn"], item["written"], item["logged"]) for item in page["pages"]]
            url = page["next"]
        return found

    for _ in range(2):
        assert look() == every
    assert look("&slot=1") == every[2:]
    assert look("&gfn=3&npages=0x3fe") == every[1:3]
    assert look("&gfn=0x401") == every[3:]
    assert client.get(f"{vm}/dirty?slot=7").status_code == 404
    for wrong in ("gfn=0&npages=0", "gfn=0x10000000000", "npages=0x10000000000"):
        assert client.get(f"{vm}/dirty?{wrong}").json()["field"] == "gfn", wrong
    assert pages(harvest(client, vm)) == {1: 1, 3: 2, 0x400: 1, 0x405: 1}
    assert [item[0] for item in look()] == ["0x400", "0x405"]


def log(client: ContractClient, vm: str, slot: int) -> set[int]:
    reply = client.post(f"{vm}/dirty:get-log", json={"slot": slot})
    assert reply.status_code == 200, reply.text
    bitmap = int.from_bytes(bytes.fromhex(reply.json()["bitmap"]), "little")
    assert bitmap.bit_count() == reply.json()["npages"]
    return {number for number in range(bitmap.bit_length()) if bitmap >> number & 1}


@pytest.mark.parametrize("method", ["write-protect", "pml"])
@pytest.mark.parametrize("profile", PROFILES)
def test_kvm_log_of_a_slot(make_vm: Callable[..., str], client: ContractClient, profile: str, method: str) -> None:
    slots = [{"slot": 3, "gpa": 0x3000, "size": 70 * 4096}]
    vm = make_vm(profile=profile, memory_slots=slots)
    track(client, vm, "off", method)
    write(client, vm, 0x3000, 0x5000)
    assert client.post(f"{vm}/dirty:get-log", json={"slot": 3}).status_code == 404
    given = {"gpa": 0x3000, "size": 70 * 4096, "log_dirty": True}
    assert client.put(f"{vm}/memory-slots/3", json=given).json()["log_dirty"] is True
    reply = client.post(f"{vm}/dirty:get-log", json={"slot": 3})
    assert reply.json() == {"slot": 3, "bitmap": "00" * 16, "npages": 0}
    write(client, vm, 0x4000, 0x4800, 0x3000 + 69 * 4096)
    assert log(client, vm, 3) == {1, 69}
    assert log(client, vm, 3) == set()
    client.put(f"{vm}/memory", params={"gpa": "0x5ff8"}, content=bytes(16), headers={"Content-Type": OCTETS})
    assert log(client, vm, 3) == {2, 3}
    write(client, vm, 0x4000)
    assert log(client, vm, 3) == {1}
    write(client, vm, 0x4000)
    client.put(f"{vm}/memory-slots/3", json={**given, "log_dirty": False})
    client.put(f"{vm}/memory-slots/3", json=given)
    assert log(client, vm, 3) == set()


OCTETS = "application/octet-stream"


# What each KVM's own log says of a page that a policy protects in part.
@pytest.mark.parametrize(
    ("profile", "method", "gpa", "logged"),
    [
        ("kvm-2019", "write-protect", 0x2000, False),
        ("kvm-2019", "write-protect", 0x2080, False),
        ("kvm-latest", "write-protect", 0x2000, True),
        ("kvm-latest", "write-protect", 0x2080, True),
        ("kvm-2019", "pml", 0x2000, True),
        ("kvm-2019", "pml", 0x2080, False),
        ("kvm-latest", "pml", 0x2000, True),
        ("kvm-latest", "pml", 0x2080, False),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_kvm_log_of_a_protected_page(
    make_vm: Callable[..., str],
    client: ContractClient,
    profile: str,
    method: str,
    gpa: int,
    logged: bool,
    mapped: bool,
) -> None:
    vm = make_vm(profile=profile, memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    client.put(f"{vm}/subpages?gfn=2", json={"access": ["0x1"]})
    if mapped:
        write(client, vm, 0x2000)
    track(client, vm, "off", method)
    client.put(f"{vm}/memory-slots/0", json={"gpa": 0, "size": MIB, "log_dirty": True})
    for _ in range(2):
        result = write(client, vm, gpa)
        assert result["violations"] == (gpa != 0x2000)
        assert log(client, vm, 0) == ({2} if logged else set())


@pytest.mark.parametrize("tracking", ["page", "subpage"])
@pytest.mark.parametrize("profile", PROFILES)
def test_what_lands_is_dirty_and_what_does_not_is_not(
    make_vm: Callable[..., str], client: ContractClient, profile: str, tracking: str
) -> None:
    vm = make_vm(profile=profile)
    client.put(f"{vm}/subpages?gfn=2&npages=4", json={"access": ["0x0"] * 4})
    track(client, vm, tracking)
    whole = 0xFFFF_FFFF
    write(client, vm, 0x2000)
    write(client, vm, 0x3080, on_violation="allow")
    write(client, vm, 0x4100, on_violation="grant")
    assert write(client, vm, 0x5000, on_violation="stop")["stopped_at"] == 0
    client.put(f"{vm}/memory", params={"gpa": "0x6ffc"}, content=bytes(8), headers={"Content-Type": OCTETS})
    single = {"gpa": "0x2000", "size": 4, "data": "00112233", "on_violation": "skip"}
    assert client.post(f"{vm}/accesses", json=single).json()["allowed"] is False
    found = pages(harvest(client, vm))
    exact = {3: 2, 4: 4, 6: 1 << 31, 7: 1}
    assert found == (exact if tracking == "subpage" else dict.fromkeys(exact, whole))


def test_written_follows_its_slot_and_a_harvest_stays(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    track(client, vm, "subpage")
    write(client, vm, 0x2000)
    held = harvest(client, vm, acknowledge=False)
    write(client, vm, 0x3080)
    client.put(f"{vm}/memory-slots/0", json={"gpa": 8 * MIB, "size": MIB})
    assert client.get(f"{vm}/dirty").json()["pages"] == [{"gfn": "0x803", "written": "0x2", "logged": False}]
    client.delete(f"{vm}/memory-slots/0")
    assert client.get(f"{vm}/dirty").json()["pages"] == []
    assert harvest(client, vm) == held
    client.put(f"{vm}/memory-slots/0", json={"gpa": 0, "size": MIB})
    assert harvest(client, vm)["pages"] == []


def test_switching_off_forgets(vm: str, client: ContractClient) -> None:
    track(client, vm, "subpage")
    write(client, vm, 0x2000)
    held = harvest(client, vm, acknowledge=False)
    write(client, vm, 0x3000)
    track(client, vm, "off")
    assert client.get(f"{vm}/dirty").json()["pages"] == []
    assert harvest(client, vm) == held
    reply = client.post(f"{vm}/dirty:harvest")
    assert reply.status_code == 409 and reply.json()["field"] == "tracking"
    before = client.get(f"{vm}/counters").json()["counters"]
    write(client, vm, 0x3000, 0x2000, 0x9000)
    after = client.get(f"{vm}/counters").json()["counters"]
    assert after["dirty_faults"] == before["dirty_faults"]


def test_what_cannot_be_tracked(make_vm: Callable[..., str], client: ContractClient) -> None:
    plain = make_vm(spp=False)
    reply = client.put(f"{plain}/dirty", json={"tracking": "subpage"})
    assert reply.status_code == 409 and reply.json()["type"].endswith("spp-not-enabled")
    track(client, plain, "page")
    write(client, plain, 0x2000)
    assert pages(harvest(client, plain)) == {2: 0xFFFF_FFFF}
    for name, value in (("procbased_ctls2", "0x7ddffff00000000"), ("ept_vpid_cap", "0xf01061341c1")):
        lacking = make_vm(host={"vmx_capabilities": {name: value}})
        reply = client.put(f"{lacking}/dirty", json={"tracking": "page", "method": "pml"})
        assert reply.status_code == 409 and reply.json()["field"] == "method", reply.text
    used = make_vm()
    secondary = int(client.get(f"{used}/vcpus/0/vmcs").json()["secondary_controls"], 16)
    client.put(f"{used}/vcpus/0/vmcs", json={"secondary_controls": hex(secondary | 1 << 17)})
    reply = client.put(f"{used}/dirty", json={"tracking": "page", "method": "pml"})
    assert reply.status_code == 409
    for wrong in ({"tracking": "yes"}, {}, {"tracking": "page", "method": "dirty-ring"}):
        assert client.put(f"{used}/dirty", json=wrong).status_code == 422
    strict = make_vm(require_match=True)
    assert client.put(f"{strict}/dirty", json={"tracking": "page"}).status_code == 428
    tag = client.get(strict).headers["ETag"]
    assert client.put(f"{strict}/dirty", json={"tracking": "page"}, headers={"If-Match": tag}).status_code == 200


def test_a_full_log_is_emptied(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(vcpus=2)
    track(client, vm, "page", "pml")
    accesses = [{"gpa": gfn * 4096, "size": 8, "vcpu": gfn % 2} for gfn in range(1100)]
    assert client.post(f"{vm}/traces", json={"accesses": accesses}).status_code == 201
    assert client.get(f"{vm}/counters").json()["counters"]["exits_pml_full"] == 2
    assert client.get(f"{vm}/dirty").json()["npages"] == 1100
    assert client.post(f"{vm}/dirty:harvest").json()["npages"] == 1100
