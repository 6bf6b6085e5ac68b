"""KVM_SET_USER_MEMORY_REGION: the kernel's rules, and the same slots over REST."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support.ioctls import FULL, PROFILES, enable, get_access, ioctl, maps_of, region, set_access

MakeVm = Callable[..., str]
SET_REGION = "KVM_SET_USER_MEMORY_REGION"
HOST = 0x7F00_0000_0000
LOG_DIRTY, READ_ONLY = 1, 2
SMM = 1 << 16
OLD, NEW = PROFILES


def slots(client: ContractClient, url: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = client.get(f"{url}/memory-slots").json()["memory_slots"]
    return listed


def put_region(client: ContractClient, url: str, *args: int) -> int | str:
    return ioctl(client, url, SET_REGION, region(*args)).short


@pytest.fixture(params=PROFILES)
def bare(request: pytest.FixtureRequest, make_vm: MakeVm) -> str:
    """A machine with slot 0, 1 MiB at 1 MiB."""
    slot = {"slot": 0, "gpa": MIB, "size": MIB}
    return make_vm(profile=request.param, spp=False, memory_slots=[slot])


REFUSED = [
    ("unaligned size", (1, 0, 4 * MIB, 0x1001), "EINVAL"),
    ("unaligned gpa", (1, 0, 4 * MIB + 1, 0x1000), "EINVAL"),
    ("unaligned host address", (1, 0, 4 * MIB, 0x1000, HOST + 8), "EINVAL"),
    ("host address beyond user memory", (1, 0, 4 * MIB, 0x2000, (1 << 47) - 0x2000), "EINVAL"),
    ("unknown flag", (1, 4, 4 * MIB, 0x1000), "EINVAL"),
    ("highest flag", (1, 1 << 31, 4 * MIB, 0x1000), "EINVAL"),
    ("address space 2", (2 << 16, 0, 4 * MIB, 0x1000), "EINVAL"),
    ("address space 0xffff", (0xFFFF << 16, 0, 4 * MIB, 0x1000), "EINVAL"),
    ("wraps around", (1, 0, (1 << 64) - 0x1000, 0x2000), "EINVAL"),
    ("ends at 2^64", (1, 0, (1 << 64) - 0x1000, 0x1000), "EINVAL"),
    ("too many pages", (1, 0, 0, 0x1000 << 31, 0), "EINVAL"),
    ("beyond the guest's addresses", (1, 0, (1 << 46) - 0x1000, 0x2000), "EINVAL"),
    ("same place", (1, 0, MIB, MIB), "EEXIST"),
    ("last page", (1, 0, 2 * MIB - 0x1000, MIB), "EEXIST"),
    ("first page", (1, 0, 0, MIB + 0x1000), "EEXIST"),
    ("deleting what is not", (1, 0, 0, 0), "EINVAL"),
    ("resizing", (0, 0, MIB, 2 * MIB, 0), "EINVAL"),
    ("another host address", (0, 0, MIB, MIB, HOST), "EINVAL"),
    ("made read-only", (0, READ_ONLY, MIB, MIB, 0), "EINVAL"),
    ("resizing is found before the overlap", (2, 0, MIB, 2 * MIB, HOST), "EINVAL"),
]


@pytest.mark.parametrize(("args", "errno"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(client: ContractClient, bare: str, args: tuple[int, ...], errno: str) -> None:
    assert put_region(client, bare, 2, 0, 8 * MIB, MIB) == 0
    before = slots(client, bare)
    assert put_region(client, bare, *args) == errno
    assert slots(client, bare) == before


def test_bytes_that_cannot_be_read_fault(client: ContractClient, bare: str) -> None:
    whole = region(1, 0, 4 * MIB, MIB)
    for data in (None, b"", whole[:31]):
        assert ioctl(client, bare, SET_REGION, data).errno == "EFAULT"
    assert ioctl(client, bare, SET_REGION, whole + b"more").short == 0


@pytest.mark.parametrize(("profile", "last"), [(OLD, 508), (NEW, 32763)])
def test_slot_numbers(client: ContractClient, make_vm: MakeVm, profile: str, last: int) -> None:
    url = make_vm(profile=profile, spp=False, memory_slots=[])
    for space in (0, SMM):
        assert put_region(client, url, space | last, 0, 0, MIB) == 0
        assert put_region(client, url, space | last + 1, 0, MIB, MIB) == "EINVAL"
    body = {"gpa": 4 * MIB, "size": MIB}
    assert client.put(f"{url}/memory-slots/{last}", json={**body, "gpa": 0}).status_code == 200
    assert client.put(f"{url}/memory-slots/{last + 1}", json=body).status_code == 422


def test_neighbours_do_not_overlap(client: ContractClient, bare: str) -> None:
    assert put_region(client, bare, 1, 0, 0, MIB) == 0
    assert put_region(client, bare, 2, 0, 2 * MIB, MIB) == 0
    assert [slot["slot"] for slot in slots(client, bare)] == [0, 1, 2]


def test_flags_alone_may_change(client: ContractClient, bare: str) -> None:
    assert put_region(client, bare, 0, LOG_DIRTY, MIB, MIB, 0) == 0
    assert slots(client, bare)[0]["log_dirty"] is True
    assert put_region(client, bare, 0, LOG_DIRTY, MIB, MIB, 0) == 0, "nothing to change"
    assert put_region(client, bare, 0, 0, MIB, MIB, 0) == 0
    assert slots(client, bare)[0]["log_dirty"] is False
    assert put_region(client, bare, 1, READ_ONLY | LOG_DIRTY, 4 * MIB, MIB) == 0
    shown = slots(client, bare)[1]
    assert (shown["read_only"], shown["log_dirty"], shown["userspace_addr"]) == (True, True, hex(HOST))
    assert put_region(client, bare, 1, LOG_DIRTY, 4 * MIB, MIB) == "EINVAL"
    assert put_region(client, bare, 1, READ_ONLY, 8 * MIB, MIB) == 0, "moving changes flags on the way"
    assert (slots(client, bare)[1]["gpa"], slots(client, bare)[1]["log_dirty"]) == (hex(8 * MIB), False)


def test_a_size_of_zero_deletes(client: ContractClient, bare: str) -> None:
    assert put_region(client, bare, 0, 0, 0x5000, 0, HOST) == 0
    assert slots(client, bare) == []
    assert put_region(client, bare, 0, 0, 0, 0) == "EINVAL"


def test_the_address_spaces_are_apart(client: ContractClient, bare: str) -> None:
    """The same number and the same pages may be used in both; each is deleted by itself."""
    assert put_region(client, bare, SMM, 0, MIB, 2 * MIB) == 0
    assert put_region(client, bare, SMM | 1, 0, 2 * MIB, MIB) == "EEXIST"
    assert [(slot["slot"], slot["address_space"], slot["size"]) for slot in slots(client, bare)] == [
        (0, 0, hex(MIB)),
        (0, 1, hex(2 * MIB)),
    ]
    assert put_region(client, bare, SMM, 0, 8 * MIB, 2 * MIB) == 0
    one = client.get(f"{bare}/memory-slots/0", params={"address_space": 1})
    assert (one.json()["gpa"], one.json()["address_space"]) == (hex(8 * MIB), 1)
    assert put_region(client, bare, 0, 0, 0, 0) == 0
    assert [slot["address_space"] for slot in slots(client, bare)] == [1]
    assert client.get(f"{bare}/memory-slots/0").status_code == 404
    assert put_region(client, bare, SMM, 0, 0, 0) == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_memory_of_system_management_mode_is_out_of_reach(
    client: ContractClient, make_vm: MakeVm, profile: str
) -> None:
    """GET and SET look in address space 0 only, as accesses outside of it do."""
    url = make_vm(profile=profile, memory_slots=[{"slot": 0, "address_space": 1, "gpa": 0, "size": MIB}])
    assert get_access(client, url, profile, 0).errno == "EFAULT"
    assert set_access(client, url, profile, 0, [0]).errno == "EFAULT"
    told = client.post(f"{url}/accesses", json={"gpa": 0}).json()
    assert told["resolution"] == "mmio"
    assert client.get(f"{url}/memory", params={"gpa": 0, "size": 1}).status_code == 422
    assert client.put(f"{url}/vcpus/0/smm", json={"smm": True}).status_code == 200
    assert client.post(f"{url}/accesses", json={"gpa": 0, "data": "5a" * 8}).json()["resolution"] == "completed"
    assert client.post(f"{url}/accesses", json={"gpa": 0, "access": "read"}).json()["data"] == "5a" * 8
    walked = client.get(f"{url}/walk", params={"gpa": hex(MIB)}).json()
    assert walked["then"]["sentence"].startswith("MMIO: no memory slot of address space 1 holds GFN 0x100;")
    assert get_access(client, url, profile, 0).errno == "EFAULT"


@pytest.mark.parametrize("profile", PROFILES)
def test_maps_follow_the_slot(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    """Flags keep them, moving takes them along by offset, deleting frees them (kvm-spp 2.4)."""
    url = make_vm(profile=profile, spp=False, memory_slots=[])
    assert put_region(client, url, 3, 0, MIB, MIB) == 0
    assert enable(client, url, profile).short == 0
    assert set_access(client, url, profile, 256 + 7, [0x70]).short == 1
    assert put_region(client, url, 3, LOG_DIRTY, MIB, MIB) == 0
    assert maps_of(get_access(client, url, profile, 256 + 7).data, 1) == [0x70]
    assert put_region(client, url, 3, LOG_DIRTY, 4 * MIB, MIB) == 0
    assert maps_of(get_access(client, url, profile, 1024 + 7).data, 1) == [0x70]
    assert get_access(client, url, profile, 256 + 7).errno == "EFAULT"
    assert put_region(client, url, 3, 0, 0, 0) == 0
    assert client.get(f"{url}/spp").json() == {"active": True}, "deleting a slot never switches SPP off"
    assert put_region(client, url, 3, 0, 4 * MIB, MIB) == 0
    assert maps_of(get_access(client, url, profile, 1024 + 7).data, 1) == [FULL]


# ---- over REST


def test_rest_and_ioctl_show_the_same_slots(client: ContractClient, bare: str) -> None:
    assert put_region(client, bare, 1, 0, 4 * MIB, MIB) == 0
    reply = client.put(f"{bare}/memory-slots/1", json={"gpa": 8 * MIB, "size": MIB, "log_dirty": True})
    assert (reply.status_code, reply.json()["userspace_addr"]) == (200, hex(HOST)), "moved, at its host address"
    assert put_region(client, bare, 1, 0, 8 * MIB, MIB) == 0
    assert client.get(f"{bare}/memory-slots/1").json()["log_dirty"] is False


def test_rest_names_the_address_space_in_body_or_query(client: ContractClient, bare: str) -> None:
    body = {"gpa": MIB, "size": MIB}
    made = client.put(f"{bare}/memory-slots/0", json={**body, "address_space": 1})
    assert made.status_code == 201 and made.headers["Location"].endswith("/memory-slots/0?address_space=1")
    assert client.get(made.headers["Location"]).json() == made.json()
    moved = client.put(f"{bare}/memory-slots/0", params={"address_space": 1}, json={**body, "gpa": 0})
    assert (moved.status_code, moved.json()["gpa"], moved.json()["address_space"]) == (200, "0x0", 1)
    mixed = client.put(f"{bare}/memory-slots/0", params={"address_space": 0}, json={**body, "address_space": 1})
    assert (mixed.status_code, mixed.json()["field"]) == (422, "address_space")
    beyond = client.put(f"{bare}/memory-slots/0", json={**body, "address_space": 2})
    assert (beyond.status_code, beyond.json()["field"]) == (422, "address_space")
    assert client.delete(f"{bare}/memory-slots/0", params={"address_space": 1}).status_code == 204
    assert client.delete(f"{bare}/memory-slots/0", params={"address_space": 1}).status_code == 404
    assert [slot["gpa"] for slot in slots(client, bare)] == [hex(MIB)]


def test_a_machine_may_be_made_with_the_same_number_in_both_spaces(client: ContractClient, make_vm: MakeVm) -> None:
    both = [{"slot": 0, "gpa": 0, "size": MIB}, {"slot": 0, "gpa": 0, "size": MIB, "address_space": 1}]
    assert len(client.get(make_vm(memory_slots=both)).json()["memory_slots"]) == 2
    assert client.post("/v1/vms", json={"memory_slots": [both[1], both[1]]}).status_code == 422
