"""KVM_INIT_SPP, KVM_ENABLE_CAP, GET_ACCESS and SET_ACCESS: every row of kvm-spp 2.5, and the structures of 1.3."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support.http import access
from tests.support.ioctls import (
    CAP_X86_SPP,
    FULL,
    PAGES,
    PROFILES,
    enable,
    enable_cap,
    get_access,
    ioctl,
    maps_of,
    region,
    set_access,
    subpage,
)

MakeVm = Callable[..., str]
GET, SET = "KVM_SUBPAGES_GET_ACCESS", "KVM_SUBPAGES_SET_ACCESS"
OLD, NEW = PROFILES


def touch(client: ContractClient, url: str, gpa: int, **members: Any) -> dict[str, Any]:
    """One access; a read unless told otherwise."""
    return access(client, url, **{"gpa": gpa, "access": "read", "size": 4, **members})


def store(client: ContractClient, url: str, gpa: int) -> bool:
    """A store of 4 bytes; whether it landed."""
    return bool(touch(client, url, gpa, access="write", data="99000000")["landed"])


# ---- switching SPP on

SWITCHING = [
    ("no nesting", {"nested": False}, 0, 0),
    ("amd", {"vendor": "amd", "nested": False}, "EINVAL", "ENODEV"),
    ("no EPT", {"ept": False, "nested": False}, "EINVAL", "ENODEV"),
    ("no SPP", {"spp": False, "nested": False}, "EINVAL", "ENODEV"),
    ("nested", {"nested": True}, 0, "EPERM"),
    ("nested comes before support", {"nested": True, "ept": False}, "EINVAL", "EPERM"),
    ("no memory", {"nested": False, "fail_allocation": 1}, "ENOMEM", "ENOMEM"),
    ("no memory for the second slot", {"nested": False, "fail_allocation": 2}, "ENOMEM", "ENOMEM"),
    ("memory for all slots", {"nested": False, "fail_allocation": 3}, 0, 0),
    ("support comes before memory", {"nested": False, "ept": False, "fail_allocation": 1}, "EINVAL", "ENODEV"),
]
TWO_SLOTS = [{"slot": 0, "gpa": 0, "size": MIB}, {"slot": 0, "address_space": 1, "gpa": 0, "size": MIB}]


@pytest.mark.parametrize(("host", "old", "new"), [row[1:] for row in SWITCHING], ids=[row[0] for row in SWITCHING])
def test_switching_on(
    client: ContractClient, make_vm: MakeVm, host: dict[str, Any], old: int | str, new: int | str
) -> None:
    for profile, wanted in ((OLD, old), (NEW, new)):
        url = make_vm(profile=profile, spp=False, host=host, memory_slots=TWO_SLOTS)
        assert enable(client, url, profile).short == wanted
        assert client.get(f"{url}/spp").json()["active"] is (wanted == 0)


@pytest.mark.parametrize("profile", PROFILES)
def test_switching_on_twice_keeps_the_maps(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile, spp=False)
    assert enable(client, url, profile).short == 0
    assert set_access(client, url, profile, 5, [7]).short == 1
    assert enable(client, url, profile).short == 0
    assert maps_of(get_access(client, url, profile, 5).data, 1) == [7]


@pytest.mark.parametrize("profile", PROFILES)
def test_an_allocation_fails_once(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile, spp=False, host={"nested": False, "fail_allocation": 1})
    assert client.get(url).json()["host"]["fail_allocation"] == 1
    assert enable(client, url, profile).short == "ENOMEM"
    assert client.get(url).json()["host"]["fail_allocation"] is None
    assert enable(client, url, profile).short == 0


def test_over_rest_a_failed_allocation_is_a_conflict(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(spp=False, host={"fail_allocation": 1})
    reply = client.put(f"{url}/spp", json={"active": True})
    assert (reply.status_code, reply.json()["code"]) == (409, "out-of-memory")
    assert client.put(f"{url}/spp", json={"active": True}).status_code == 200
    reply = client.post("/v1/vms", json={"memory_slots": TWO_SLOTS, "spp": True, "host": {"fail_allocation": 2}})
    assert (reply.status_code, reply.json()["code"]) == (409, "out-of-memory")
    assert client.post("/v1/vms", json={"host": {"fail_allocation": 0}}).status_code == 422


def test_init_ignores_its_argument_and_is_unknown_later(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile=OLD, spp=False)
    assert ioctl(client, url, "KVM_INIT_SPP", b"\x01\x02").short == 0
    assert ioctl(client, url, "KVM_INIT_SPP", arg=77).short == 0
    later = make_vm(profile=NEW, spp=False)
    assert ioctl(client, later, "KVM_INIT_SPP").errno == "ENOTTY"
    assert client.get(f"{later}/spp").json() == {"active": False}


def test_enable_cap_is_exact(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile=NEW, spp=False, host={"nested": True})
    assert ioctl(client, url, "KVM_ENABLE_CAP", enable_cap(CAP_X86_SPP, 1)).errno == "EINVAL", "flags come first"
    assert ioctl(client, url, "KVM_ENABLE_CAP", enable_cap(CAP_X86_SPP)).errno == "EPERM"
    url = make_vm(profile=NEW, spp=False)
    assert ioctl(client, url, "KVM_ENABLE_CAP", enable_cap(4711)).errno == "EINVAL"
    assert ioctl(client, url, "KVM_ENABLE_CAP", enable_cap(CAP_X86_SPP, 0, 1, 2, 3, 4)).short == 0, "args are ignored"
    old = make_vm(profile=OLD, spp=False)
    assert ioctl(client, old, "KVM_ENABLE_CAP", enable_cap(CAP_X86_SPP)).errno == "EINVAL", "the era has none"


# ---- GET and SET: what is refused


@pytest.mark.parametrize("call", [GET, SET])
@pytest.mark.parametrize("profile", PROFILES)
def test_before_switching_on_nothing_is_looked_at(
    client: ContractClient, make_vm: MakeVm, profile: str, call: str
) -> None:
    url = make_vm(profile=profile, spp=False)
    for data in (None, b"", subpage(profile, 0, [0]), subpage(profile, 0, [], npages=9999)):
        assert ioctl(client, url, call, data).errno == "ENODEV"


LENGTHS = [
    ("none", 0, "EINVAL", 0),
    ("one", 1, 1, 1),
    ("64", 64, 64, 64),
    ("65", 65, "EINVAL", 65),
    ("512", 512, "EINVAL", 512),
    ("513", 513, "EINVAL", "EINVAL"),
    ("2^32 - 1", (1 << 32) - 1, "EINVAL", "EINVAL"),
]


@pytest.mark.parametrize("call", [GET, SET])
@pytest.mark.parametrize(("npages", "old", "new"), [row[1:] for row in LENGTHS], ids=[row[0] for row in LENGTHS])
def test_pages_of_one_call(
    client: ContractClient, make_vm: MakeVm, call: str, npages: int, old: int | str, new: int | str
) -> None:
    for profile, wanted in ((OLD, old), (NEW, new)):
        url = make_vm(profile=profile)
        data = subpage(profile, 1, [0] * min(npages, 512), npages=npages)
        assert ioctl(client, url, call, data).short == wanted


def test_the_old_count_has_64_bits(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile=OLD)
    data = subpage(OLD, 1, [0], npages=(1 << 32) + 1)
    assert ioctl(client, url, SET, data).errno == ioctl(client, url, GET, data).errno == "EINVAL"


@pytest.mark.parametrize("call", [GET, SET])
def test_flags_are_refused_before_an_empty_range(client: ContractClient, make_vm: MakeVm, call: str) -> None:
    url = make_vm(profile=NEW)
    for flags in (1, 1 << 31):
        assert ioctl(client, url, call, subpage(NEW, 1, [0], flags=flags)).errno == "EINVAL"
        assert ioctl(client, url, call, subpage(NEW, 1, [], flags=flags)).errno == "EINVAL"


@pytest.mark.parametrize("call", [GET, SET])
@pytest.mark.parametrize("profile", PROFILES)
def test_what_cannot_be_read_faults(client: ContractClient, make_vm: MakeVm, profile: str, call: str) -> None:
    url = make_vm(profile=profile)
    whole = subpage(profile, 1, [3, 5])
    needed = 272 if profile == OLD else 24
    assert len(whole) == needed
    for data in (None, b"", whole[:15], whole[: needed - 1]):
        assert ioctl(client, url, call, data).errno == "EFAULT"
    assert ioctl(client, url, call, whole).short == 2
    assert client.get(f"{url}/subpages", params={"gfn": 1, "npages": 2}).json()["access"] == (
        ["0x3", "0x5"] if call == SET else [hex(FULL)] * 2
    )


def test_old_faults_come_before_the_count_and_later_ones_after(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile=OLD)
    assert ioctl(client, url, GET, subpage(OLD, 1, [0], npages=65)[:271]).errno == "EFAULT"
    url = make_vm(profile=NEW)
    assert ioctl(client, url, GET, subpage(NEW, 1, [], npages=513)).errno == "EINVAL"
    assert ioctl(client, url, GET, subpage(NEW, 1, [], npages=512)).errno == "EFAULT"
    assert ioctl(client, url, GET, subpage(NEW, 1 << 40, [], npages=0)).short == 0


@pytest.mark.parametrize("call", [GET, SET])
def test_later_calls_allocate_a_buffer(client: ContractClient, make_vm: MakeVm, call: str) -> None:
    for profile, wanted in ((OLD, 1), (NEW, "ENOMEM")):
        url = make_vm(profile=profile, host={"nested": False, "fail_allocation": 2})
        data = subpage(profile, 1, [0])
        assert ioctl(client, url, call, data).short == wanted
        assert ioctl(client, url, call, data).short == 1
    url = make_vm(profile=NEW, host={"nested": False, "fail_allocation": 2})
    assert ioctl(client, url, call, subpage(NEW, 1, [], npages=0)).short == 0, "an empty range needs none"
    assert ioctl(client, url, call, subpage(NEW, 1, [], npages=1)).errno == "ENOMEM", "before the maps are read"


# ---- GET and SET: what they do


@pytest.mark.parametrize("profile", PROFILES)
def test_set_returns_the_pages_and_get_what_was_set(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile)
    maps = [0, 0xDEAD_BEEF, FULL, 1] * (PAGES[profile] // 4)
    data = subpage(profile, 0x10, maps)
    answer = ioctl(client, url, SET, data)
    assert (answer.short, answer.data) == (len(maps), data), "SET leaves the caller's memory alone"
    answer = get_access(client, url, profile, 0x10, len(maps))
    assert (answer.short, answer.data) == (len(maps), data)
    window = client.get(f"{url}/subpages", params={"gfn": 0x10, "npages": len(maps)}).json()
    assert [int(word, 16) for word in window["access"]] == maps


@pytest.mark.parametrize("profile", PROFILES)
def test_get_leaves_what_it_does_not_fill(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile)
    assert set_access(client, url, profile, 4, [0x0F0F_0F0F]).short == 1
    data = subpage(profile, 4, [1, 2, 3], npages=1) + b"beyond"
    answer = ioctl(client, url, GET, data)
    assert answer.data == data[:16] + struct.pack("<I", 0x0F0F_0F0F) + data[20:]


@pytest.mark.parametrize("profile", PROFILES)
def test_get_to_memory_that_cannot_be_written_faults(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile)
    data = subpage(profile, 4, [1])
    answer = ioctl(client, url, GET, data, read_only=True)
    assert (answer.short, answer.data) == ("EFAULT", data)
    assert ioctl(client, url, SET, data, read_only=True).short == 1


HOLES = [
    ("first page has no slot", 256, 1),
    ("far beyond", 1 << 40, 1),
    ("last page number there is", (1 << 64) - 1, 2),
    ("beyond what a kernel's page number holds", 1 << 52, 2),
]


@pytest.mark.parametrize(("gfn", "npages"), [row[1:] for row in HOLES], ids=[row[0] for row in HOLES])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_range_without_any_slot(client: ContractClient, make_vm: MakeVm, profile: str, gfn: int, npages: int) -> None:
    url = make_vm(profile=profile, memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    assert ioctl(client, url, SET, subpage(profile, gfn, [0] * npages)).errno == "EFAULT"
    data = subpage(profile, gfn, [5] * npages)
    answer = ioctl(client, url, GET, data)
    assert (answer.errno, answer.data) == ("EFAULT", data)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_range_over_two_slots_goes_on_in_the_second(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    slots = [{"slot": 3, "gpa": 0, "size": MIB}, {"slot": 1, "gpa": MIB, "size": MIB}]
    url = make_vm(profile=profile, memory_slots=slots)
    assert set_access(client, url, profile, 254, [1, 2, 3, 4]).short == 4
    assert maps_of(get_access(client, url, profile, 254, 4).data, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("profile", PROFILES)
def test_get_over_a_hole(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    """In 2019 the maps before the hole come out and the rest is as it was copied in; later nothing comes out."""
    url = make_vm(profile=profile, memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    assert set_access(client, url, profile, 254, [0xA, 0xB]).short == 2
    data = subpage(profile, 254, [1, 2, 3, 4])
    answer = ioctl(client, url, GET, data)
    assert answer.errno == "EFAULT"
    assert maps_of(answer.data, 4) == ([0xA, 0xB, 3, 4] if profile == OLD else [1, 2, 3, 4])


@pytest.mark.parametrize("mapped", [(), (254,), (255,), (254, 255)])
def test_old_set_over_a_hole_applies_the_pages_before(
    client: ContractClient, make_vm: MakeVm, mapped: tuple[int, ...]
) -> None:
    url = make_vm(profile=OLD, memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    for gfn in mapped:
        assert store(client, url, gfn << 12)
    answer = ioctl(client, url, SET, subpage(OLD, 254, [0, 0, 0]))
    assert answer.short == (0 if mapped else "EFAULT"), "it forgets to fail once a page was mapped"
    assert maps_of(get_access(client, url, OLD, 254, 2).data, 2) == [0, 0]
    assert not store(client, url, 254 << 12) and not store(client, url, 255 << 12)


@pytest.mark.parametrize("mapped", [True, False])
def test_later_set_over_a_hole_stores_the_maps_before_and_touches_no_mapping(
    client: ContractClient, make_vm: MakeVm, mapped: bool
) -> None:
    url = make_vm(profile=NEW, memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    if mapped:
        assert store(client, url, 254 << 12)
        before = client.get(f"{url}/ept/1/{254 << 12}").json()
    assert ioctl(client, url, SET, subpage(NEW, 254, [0, 0, 0])).errno == "EFAULT"
    assert maps_of(get_access(client, url, NEW, 254, 2).data, 2) == [0, 0]
    if mapped:
        assert client.get(f"{url}/ept/1/{254 << 12}").json() == before
    assert store(client, url, 254 << 12) is mapped, "what could be written stays so until it is mapped anew"
    assert not store(client, url, 255 << 12)


def test_later_set_over_a_hole_invalidates_the_regions_all_the_same(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile=NEW, memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    assert set_access(client, url, NEW, 8, [1]).short == 1
    assert store(client, url, 8 << 12)
    gpa = 8 << 12
    assert client.get(f"{url}/sppt/2/{gpa}").json()["raw"][-1] == "1"
    assert ioctl(client, url, SET, subpage(NEW, 254, [0, 0, 0])).errno == "EFAULT"
    entry = client.get(f"{url}/sppt/2/{gpa}").json()["raw"]
    assert entry[-1] == "0" and int(entry, 16) != 0, "its address stays"
    assert store(client, url, gpa)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_slot_made_after_switching_on_has_full_access(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    """The series of 2019 crashes here, and the later ones leave a slot that cannot be protected."""
    url = make_vm(profile=profile, memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(1, 0, MIB, MIB)).short == 0
    assert maps_of(get_access(client, url, profile, 254, 4).data, 4) == [FULL] * 4
    assert store(client, url, 257 << 12)
    assert set_access(client, url, profile, 256, [0]).short == 1
    assert not store(client, url, 256 << 12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), call=st.sampled_from([GET, SET, "KVM_SET_USER_MEMORY_REGION", "KVM_ENABLE_CAP"]))
def test_no_bytes_break_it(client: ContractClient, data: bytes, call: str) -> None:
    for profile in PROFILES:
        url = client.post("/v1/vms", json={"profile": profile, "spp": True}).headers["Location"]
        answer = ioctl(client, url, call, data, read_only=bool(len(data) & 1))
        assert answer.data is not None and len(answer.data) == len(data)
        assert client.delete(url).status_code == 204
