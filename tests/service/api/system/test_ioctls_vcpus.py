"""KVM_CREATE_VM and KVM_CREATE_VCPU: machines that grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support.ioctls import PROFILES, enable, ioctl, region, set_access

MakeVm = Callable[..., str]


@pytest.fixture
def create_vm(client: ContractClient) -> Iterator[Callable[..., str]]:
    made: list[str] = []

    def create(profile: str, **members: Any) -> str:
        reply = client.post("/v1/ioctls/KVM_CREATE_VM", params={"profile": profile}, json={"arg": 0, **members})
        assert reply.json()["return"] >= 0, reply.text
        made.append(reply.headers["Location"])
        return made[-1]

    yield create
    for url in made:
        assert client.delete(url).status_code == 204


@pytest.mark.parametrize("profile", PROFILES)
def test_a_new_machine_has_no_vcpus_until_they_are_made(
    client: ContractClient, create_vm: Callable[..., str], profile: str
) -> None:
    url = create_vm(profile)
    assert client.get(url).json()["vcpus"] == []
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(0, 0, 0, MIB)).short == 0
    refused = client.post(f"{url}/accesses", json={"gpa": 0})
    assert (refused.status_code, refused.json()["field"]) == (422, "vcpu")
    assert client.get(f"{url}/vcpus/0/vmcs").status_code == 404
    descriptors = [ioctl(client, url, "KVM_CREATE_VCPU", arg=vcpu).returns for vcpu in (1, 0, 200)]
    assert len(set(descriptors)) == 3 and min(descriptors) >= 0
    assert [vcpu["id"] for vcpu in client.get(url).json()["vcpus"]] == [1, 0, 200]
    for vcpu in (0, 1, 200):
        assert client.post(f"{url}/accesses", json={"gpa": 0, "vcpu": vcpu}).json()["landed"] is True
        assert client.get(f"{url}/vcpus/{vcpu}/vmcs").status_code == 200
    assert client.post(f"{url}/accesses", json={"gpa": 0, "vcpu": 2}).status_code == 422


@pytest.mark.parametrize(("profile", "ids"), list(zip(PROFILES, (1023, 4096), strict=True)))
def test_ids(client: ContractClient, create_vm: Callable[..., str], profile: str, ids: int) -> None:
    url = create_vm(profile)
    for vcpu in (ids, 0xFFFF_FFFF, (1 << 32) - 1):
        assert ioctl(client, url, "KVM_CREATE_VCPU", arg=vcpu).errno == "EINVAL"
    assert ioctl(client, url, "KVM_CREATE_VCPU", arg=ids - 1).returns >= 0
    assert ioctl(client, url, "KVM_CREATE_VCPU", arg=ids - 1).errno == "EEXIST"
    assert ioctl(client, url, "KVM_CREATE_VCPU", arg=1 << 32).returns >= 0, "the kernel looks at 32 bits"
    assert ioctl(client, url, "KVM_CREATE_VCPU", arg=0).errno == "EEXIST"


@pytest.mark.parametrize("profile", PROFILES)
def test_room(client: ContractClient, create_vm: Callable[..., str], make_vm: MakeVm, profile: str) -> None:
    url = create_vm(profile, max_vcpus=2)
    assert [ioctl(client, url, "KVM_CREATE_VCPU", arg=vcpu).errno for vcpu in (0, 1, 2, 1)] == [
        None,
        None,
        "EINVAL",
        "EEXIST",
    ]
    most = ioctl(client, url, "KVM_CHECK_EXTENSION", arg=66).returns
    assert most == (288 if profile == "kvm-2019" else 2)
    full = make_vm(profile=profile, vcpus=2)
    assert [ioctl(client, full, "KVM_CREATE_VCPU", arg=vcpu).errno for vcpu in (1, 2)] == ["EEXIST", "EINVAL"]
    assert client.post("/v1/ioctls/KVM_CREATE_VM", json={"max_vcpus": 0}).status_code == 422


@pytest.mark.parametrize(("profile", "most"), list(zip(PROFILES, (288, 1024), strict=True)))
def test_as_many_as_the_capability_says(
    client: ContractClient, create_vm: Callable[..., str], profile: str, most: int
) -> None:
    url = create_vm(profile)
    assert ioctl(client, url, "KVM_CHECK_EXTENSION", arg=66).returns == most

    def memory() -> int:
        return int(client.get(f"{url}/counters").json()["counters"]["memory_bytes"])

    before = memory()
    assert [ioctl(client, url, "KVM_CREATE_VCPU", arg=vcpu).errno for vcpu in range(20)] == [None] * 20
    assert client.get(f"{url}/counters").json()["counters"]["memory_bytes"] - before == 19 * 4096, (
        "the first record was there"
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_a_vcpu_made_after_spp_obeys_it(client: ContractClient, create_vm: Callable[..., str], profile: str) -> None:
    """In 2019 hardware would walk physical address 0 for it; here it gets what its siblings have."""
    url = create_vm(profile, host={"nested": False})
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(0, 0, 0, MIB)).short == 0
    assert enable(client, url, profile).short == 0
    assert set_access(client, url, profile, 5, [1]).short == 1
    for vcpu in (0, 1):
        assert ioctl(client, url, "KVM_CREATE_VCPU", arg=vcpu).returns >= 0
        assert client.get(f"{url}/vcpus/{vcpu}/vmcs").json()["sppt_pointer"] != "0x0"
        assert client.post(f"{url}/accesses", json={"gpa": 0x5000, "vcpu": vcpu}).json()["landed"] is True
        assert client.post(f"{url}/accesses", json={"gpa": 0x5080, "vcpu": vcpu}).json()["landed"] is False


@pytest.mark.parametrize("profile", PROFILES)
def test_a_vcpu_made_after_dirty_tracking_has_its_page_log(
    client: ContractClient, create_vm: Callable[..., str], profile: str
) -> None:
    url = create_vm(profile)
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(0, 0, 0, MIB)).short == 0
    tracking = {"tracking": "page", "method": "pml"}
    assert client.put(f"{url}/dirty", json=tracking).status_code == 200
    assert ioctl(client, url, "KVM_CREATE_VCPU", arg=3).returns >= 0
    assert client.post(f"{url}/accesses", json={"gpa": 0x5000, "vcpu": 3}).json()["landed"] is True
    dirty = client.get(f"{url}/dirty").json()
    assert [page["gfn"] for page in dirty["pages"]] == ["0x5"]
