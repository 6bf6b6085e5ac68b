"""Both versions of the series' selftest, x86_64/spp_test.c (kvm-spp 7), with what they never assert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.contract.client import ContractClient
from tests.service.api.system.kvm_guest import STRIDE, VALUE, Guest
from tests.support.ioctls import FULL, enable, get_access, ioctl, maps_of, region, set_access, subpage

MakeVm = Callable[..., str]
PAGE = 0x1000_0000
GFN = PAGE >> 12
SLOT, PAGES, VCPU = 1, 16, 1
HOST = 0x7F12_3450_0000
OLD, NEW = "kvm-2019", "kvm-latest"
EXIT_SPP = {OLD: 28, NEW: 29}


@pytest.fixture
def start(client: ContractClient) -> Iterator[Callable[[str], str]]:
    """Rows 1 and 2: a machine made through the binary ABI, with the test's slot and vCPU."""
    made: list[str] = []

    def create(profile: str) -> str:
        reply = client.post("/v1/ioctls/KVM_CREATE_VM", params={"profile": profile}, json={"arg": 0})
        url = reply.headers["Location"]
        made.append(url)
        answer = ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(SLOT, 0, PAGE, PAGES << 12, HOST))
        assert answer.short == 0
        assert ioctl(client, url, "KVM_CREATE_VCPU", arg=VCPU).returns >= 0
        return str(url)

    yield create
    for url in made:
        assert client.delete(url).status_code == 204


def protect(client: ContractClient, url: str, profile: str) -> None:
    """Rows 3 to 5: switch SPP on, deny the whole page, read the map back."""
    assert enable(client, url, profile).short == 0
    assert set_access(client, url, profile, GFN, [0]).short == 1
    answer = get_access(client, url, profile, GFN)
    assert answer.short == 1
    assert maps_of(answer.data, 1) == [0]


def memory(client: ContractClient, url: str) -> list[str]:
    """The four bytes that each of the 32 stores would write."""
    data = client.get(f"{url}/memory", params={"gpa": PAGE, "size": 4096}).content
    return [data[i * STRIDE : i * STRIDE + 4].hex() for i in range(32)]


def addresses(exits: list[dict[str, Any]]) -> list[int]:
    return [int(run["spp"]["addr"], 16) for run in exits]


STORES = [PAGE + i * STRIDE for i in range(32)]


def test_selftest_of_2019(client: ContractClient, start: Callable[[str], str]) -> None:
    url = start(OLD)
    protect(client, url, OLD)
    guest = Guest(client, url, PAGE, loops=2, vcpu=VCPU)
    for _ in range(32):
        assert guest.run() == "KVM_EXIT_SPP"
    assert addresses(guest.exits) == STORES
    assert {run["exit_reason"] for run in guest.exits} == {EXIT_SPP[OLD]}
    assert guest.run() == "KVM_EXIT_IO", "each store was skipped by KVM itself"
    assert memory(client, url) == ["00000000"] * 32
    # The test forgets npages: EINVAL, which it does not look at, so that the page stays as it was.
    assert ioctl(client, url, "KVM_SUBPAGES_SET_ACCESS", subpage(OLD, GFN, [FULL], npages=0)).short == "EINVAL"
    assert guest.run() == "KVM_EXIT_SPP"
    assert addresses(guest.exits)[32:] == STORES[:1]
    # What it meant to do.
    assert set_access(client, url, OLD, GFN, [FULL]).short == 1
    assert guest.run() == "KVM_EXIT_IO"
    assert memory(client, url) == ["00000000"] + [VALUE] * 31


def test_selftest_of_the_later_series(client: ContractClient, start: Callable[[str], str]) -> None:
    url = start(NEW)
    protect(client, url, NEW)
    guest = Guest(client, url, PAGE, loops=2, vcpu=VCPU)
    for _ in range(32):
        at = guest.rip
        assert guest.run() == "KVM_EXIT_SPP"
        assert guest.rip == at, "the store is still to come"
        guest.skip()
    assert addresses(guest.exits) == STORES
    assert {run["exit_reason"] for run in guest.exits} == {EXIT_SPP[NEW]}
    assert guest.run() == "KVM_EXIT_IO"
    assert memory(client, url) == ["00000000"] * 32
    assert set_access(client, url, NEW, GFN, [FULL]).short == 1
    assert guest.run() == "KVM_EXIT_IO", "all 32 stores of the second loop land"
    assert len(guest.exits) == 32
    assert memory(client, url) == [VALUE] * 32


def test_a_later_exit_that_nobody_handles_comes_again(client: ContractClient, start: Callable[[str], str]) -> None:
    url = start(NEW)
    protect(client, url, NEW)
    guest = Guest(client, url, PAGE, vcpu=VCPU)
    assert [guest.run() for _ in range(5)] == ["KVM_EXIT_SPP"] * 5
    assert addresses(guest.exits) == [PAGE] * 5
    assert set_access(client, url, NEW, GFN, [1]).short == 1
    assert guest.run() == "KVM_EXIT_SPP"
    assert addresses(guest.exits)[5:] == [PAGE + STRIDE], "the first store landed, the second is refused"
    assert memory(client, url)[0] == VALUE
