"""The fourteen scenarios of kvm-spp 7, over HTTP and the binary ABI, in both profiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.settings import MIB
from tests.contract.client import ContractClient
from tests.service.api.system.kvm_guest import STRIDE, VALUE, Guest
from tests.support.ioctls import (
    FULL,
    PAGES,
    PROFILES,
    enable,
    get_access,
    ioctl,
    maps_of,
    region,
    set_access,
    subpage,
)

MakeVm = Callable[..., str]
RAM = [{"slot": 0, "gpa": 0, "size": 4 * MIB}]
OLD, NEW = PROFILES


@pytest.fixture(params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(make_vm: MakeVm, profile: str) -> str:
    """A machine with 4 MiB of RAM and SPP on."""
    return make_vm(profile=profile, memory_slots=RAM)


def access(client: ContractClient, url: str, gpa: int, how: str = "write", **members: Any) -> dict[str, Any]:
    data = {"data": VALUE} if how == "write" else {}
    reply = client.post(f"{url}/accesses", json={"gpa": gpa, "size": 4, "access": how, **data, **members})
    assert reply.status_code == 200, reply.text
    outcome: dict[str, Any] = reply.json()
    return outcome


def lands(client: ContractClient, url: str, gpa: int, **members: Any) -> bool:
    return bool(access(client, url, gpa, **members)["landed"])


def misses(client: ContractClient, url: str) -> int:
    return int(client.get(f"{url}/counters").json()["counters"]["exits_spp_miss"])


def happens(client: ContractClient, url: str, event: str, gfn: int) -> None:
    """Something that the host does to a page."""
    reply = client.post(f"{url}/host-memory", json={"event": event, "gfn": gfn, "npages": 1})
    assert reply.status_code == 200, reply.text


def test_1_nothing_works_before_init(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile, spp=False, memory_slots=RAM)
    assert get_access(client, url, profile, 1).errno == "ENODEV"
    assert set_access(client, url, profile, 1, [0]).errno == "ENODEV"


def test_2_init_twice_and_full_access_by_default(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile, spp=False, memory_slots=RAM)
    assert [enable(client, url, profile).short for _ in range(2)] == [0, 0]
    for gfn in (0, 1, 1023):
        assert maps_of(get_access(client, url, profile, gfn).data, 1) == [FULL]


def test_3_a_denied_page(client: ContractClient, url: str, profile: str) -> None:
    page = 5 << 12
    assert set_access(client, url, profile, 5, [0]).short == 1
    assert maps_of(get_access(client, url, profile, 5).data, 1) == [0]
    for how in ("read", "execute"):
        outcome = access(client, url, page, how)
        assert (outcome["allowed"], outcome["run"]) == (True, None)
    for i in range(32):
        run = access(client, url, page + i * STRIDE)["run"]
        assert (run["name"], run["spp"]["addr"]) == ("KVM_EXIT_SPP", hex(page + i * STRIDE))
    assert client.get(f"{url}/memory", params={"gpa": page, "size": 4096}).content == bytes(4096)


def test_4_a_page_given_back(client: ContractClient, url: str, profile: str) -> None:
    page = 5 << 12
    assert set_access(client, url, profile, 5, [0]).short == 1
    assert not lands(client, url, page)
    assert set_access(client, url, profile, 5, [FULL]).short == 1
    assert all(access(client, url, page + i * STRIDE)["run"] is None for i in range(32))
    data = client.get(f"{url}/memory", params={"gpa": page, "size": 4096}).content
    assert data == (bytes.fromhex(VALUE) + bytes(124)) * 32


def test_5_four_sub_pages(client: ContractClient, url: str, profile: str) -> None:
    page = 6 << 12
    assert set_access(client, url, profile, 6, [0xF]).short == 1
    assert [lands(client, url, page + i * STRIDE) for i in range(32)] == [True] * 4 + [False] * 28
    assert lands(client, url, page + 511, size=1, data="99")
    assert not lands(client, url, page + 512, size=1, data="99")
    assert not lands(client, url, page + 511, size=2, data="9999"), "over the boundary: nothing lands"


def test_6_a_page_that_was_never_touched(client: ContractClient, url: str, profile: str) -> None:
    assert set_access(client, url, profile, 7, [0, 0]).short == 2
    assert not lands(client, url, 7 << 12), "the first store is denied"
    outcome = access(client, url, 8 << 12, "read")
    assert (outcome["allowed"], outcome["run"]) == (True, None)
    leaf = int(client.get(f"{url}/ept/1/{8 << 12}").json()["raw"], 16)
    assert leaf >> 61 & 1 and not leaf >> 1 & 1, "the read armed it"


def test_7_limits(client: ContractClient, url: str, profile: str) -> None:
    most = PAGES[profile]
    for call in ("KVM_SUBPAGES_GET_ACCESS", "KVM_SUBPAGES_SET_ACCESS"):
        none = ioctl(client, url, call, subpage(profile, 1, [], npages=0)).short
        assert none == ("EINVAL" if profile == OLD else 0)
        assert ioctl(client, url, call, subpage(profile, 1, [0] * most)).short == most
        assert ioctl(client, url, call, subpage(profile, 1, [0] * (most + 1))).short == "EINVAL"
    if profile == NEW:
        assert ioctl(client, url, "KVM_SUBPAGES_SET_ACCESS", subpage(profile, 1, [0], flags=1)).short == "EINVAL"


def test_8_a_range_with_a_hole(client: ContractClient, url: str, profile: str) -> None:
    assert get_access(client, url, profile, 1022, 3).errno == "EFAULT"
    assert set_access(client, url, profile, 1022, [1, 2, 3]).errno == "EFAULT"
    assert maps_of(get_access(client, url, profile, 1022, 2).data, 2) == [1, 2]
    assert access(client, url, 1022 << 12, "read")["allowed"]
    again = set_access(client, url, profile, 1022, [4, 5, 6]).short
    assert again == (0 if profile == OLD else "EFAULT"), "2019 forgets to fail once a page was mapped"
    assert maps_of(get_access(client, url, profile, 1022, 2).data, 2) == [4, 5]


def test_9_a_huge_page(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    """2019 enforces nothing until the host splits it; later SET makes room for small mappings, and enforces at once."""
    ram = [{"slot": 0, "gpa": 0, "size": 4 * MIB, "host_page_size": 2 * MIB}]
    url = make_vm(profile=profile, memory_slots=ram)
    assert lands(client, url, 5 << 12), "the first touch maps 2 MByte"
    assert set_access(client, url, profile, 5, [0]).short == 1
    assert maps_of(get_access(client, url, profile, 5).data, 1) == [0]
    assert lands(client, url, 5 << 12) is (profile == OLD)
    happens(client, url, "split", 5)
    assert not lands(client, url, 5 << 12)
    for gfn in (4, 6, 511):
        assert all(lands(client, url, (gfn << 12) + i * STRIDE) for i in (0, 31)), "neighbours stay writable"


def test_10_skip_or_retry(client: ContractClient, url: str, profile: str) -> None:
    assert set_access(client, url, profile, 5, [0]).short == 1
    guest = Guest(client, url, 5 << 12)
    assert guest.run() == guest.run() == "KVM_EXIT_SPP"
    first, second = (int(run["spp"]["addr"], 16) for run in guest.exits)
    assert second - first == (STRIDE if profile == OLD else 0)
    assert set_access(client, url, profile, 5, [FULL]).short == 1
    assert guest.run() == "KVM_EXIT_IO"
    data = client.get(f"{url}/memory", params={"gpa": 5 << 12, "size": 4}).content
    assert data.hex() == ("00000000" if profile == OLD else VALUE), "what was skipped is gone, what was kept lands"


def test_11_swapped_out_and_deleted(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile, spp=False, memory_slots=[])
    ram = region(0, 0, 0, 4 * MIB)
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", ram).short == 0
    assert enable(client, url, profile).short == 0
    assert set_access(client, url, profile, 5, [0]).short == 1
    assert not lands(client, url, 5 << 12)
    for event in ("unmap", "migrate", "remap-read-only", "remap-writable"):
        happens(client, url, event, 5)
        assert not lands(client, url, 5 << 12), f"still denied after {event}"
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(0, 0, 0, 0)).short == 0
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", ram).short == 0
    assert lands(client, url, 5 << 12), "the protection went with the slot"


def test_12_two_vcpus(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    url = make_vm(profile=profile, memory_slots=RAM, vcpus=2)
    for vcpu in (0, 1):
        assert lands(client, url, 5 << 12, vcpu=vcpu)
    assert set_access(client, url, profile, 5, [0]).short == 1
    for vcpu in (1, 0):
        assert not lands(client, url, 5 << 12, vcpu=vcpu)
    assert set_access(client, url, profile, 5, [1]).short == 1
    for vcpu in (0, 1):
        assert lands(client, url, 5 << 12, vcpu=vcpu)
        assert not lands(client, url, (5 << 12) + STRIDE, vcpu=vcpu)


def test_13_misses(client: ContractClient, make_vm: MakeVm) -> None:
    """Later, one internal miss fills the region for good; in 2019 the vectors are there when the page is armed."""
    for profile, wanted in ((OLD, 0), (NEW, 1)):
        url = make_vm(profile=profile, memory_slots=RAM)
        for first in range(0, 512, PAGES[profile]):
            assert set_access(client, url, profile, first, [1] * PAGES[profile]).short == PAGES[profile]
        before = misses(client, url)
        outcome = access(client, url, 77 << 12)
        assert (outcome["landed"], outcome["run"]) == (True, None)
        assert misses(client, url) - before == wanted
        assert lands(client, url, 78 << 12) and lands(client, url, 77 << 12)
        assert not lands(client, url, (400 << 12) + STRIDE)
        assert misses(client, url) - before == wanted


@pytest.mark.parametrize(
    ("host", "old", "new"),
    [({"nested": True}, 0, "EPERM"), ({"nested": False, "ept": False}, "EINVAL", "ENODEV")],
    ids=["nested", "no EPT"],
)
def test_14_hosts(
    client: ContractClient, make_vm: MakeVm, host: dict[str, bool], old: int | str, new: int | str
) -> None:
    for profile, wanted in ((OLD, old), (NEW, new)):
        url = make_vm(profile=profile, spp=False, memory_slots=RAM, host=host)
        assert enable(client, url, profile).short == wanted
