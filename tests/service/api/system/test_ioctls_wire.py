"""The wire format of the binary ABI: what a call is, at which level, and what comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.client import ContractClient
from tests.support.http import OCTETS
from tests.support.ioctls import CAP_X86_SPP, PROFILES, enable_cap, ioctl

MakeVm = Callable[..., str]


def test_api_version_is_twelve_and_takes_no_argument(client: ContractClient) -> None:
    assert ioctl(client, "/v1", "KVM_GET_API_VERSION").returns == 12
    assert ioctl(client, "/v1", "KVM_GET_API_VERSION", arg=1).errno == "EINVAL"


def test_a_call_without_a_body_takes_its_argument_from_the_query(client: ContractClient) -> None:
    reply = client.post("/v1/ioctls/KVM_CHECK_EXTENSION", params={"profile": "kvm-latest", "arg": str(CAP_X86_SPP)})
    assert reply.json() == {"return": 512, "errno": None, "data": None, "memory": []}
    reply = client.post("/v1/ioctls/KVM_GET_API_VERSION")
    assert reply.json()["return"] == 12


def test_octets_carry_the_bytes_and_headers_what_was_returned(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile="kvm-latest", spp=False)
    good, bad = enable_cap(CAP_X86_SPP), enable_cap(CAP_X86_SPP, 1)
    reply = client.post(f"{url}/ioctls/KVM_ENABLE_CAP", content=good, headers=OCTETS)
    assert (reply.status_code, reply.content, reply.headers["X-KVM-Return"]) == (200, good, "0")
    assert "X-KVM-Errno" not in reply.headers
    reply = client.post(f"{url}/ioctls/KVM_ENABLE_CAP", content=bad, headers=OCTETS)
    assert (reply.content, reply.headers["X-KVM-Return"], reply.headers["X-KVM-Errno"]) == (bad, "-1", "EINVAL")
    reply = client.post(f"{url}/ioctls/KVM_ENABLE_CAP", content=good, headers={**OCTETS, "Accept": "application/json"})
    assert reply.json() == {"return": 0, "errno": None, "data": good.hex(), "memory": []}


def test_octets_take_a_scalar_from_the_query(client: ContractClient) -> None:
    reply = client.post("/v1/ioctls/KVM_CHECK_EXTENSION", params={"arg": "3"}, content=b"", headers=OCTETS)
    assert reply.headers["X-KVM-Return"] == "1"


@pytest.mark.parametrize(("level", "errno"), [("system", "EINVAL"), ("vm", "ENOTTY"), ("vcpu", "EINVAL")])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_known_ioctl_at_the_wrong_level(
    client: ContractClient, make_vm: MakeVm, level: str, errno: str, profile: str
) -> None:
    url = make_vm(profile=profile, spp=False)
    place = {"system": "/v1", "vm": url, "vcpu": f"{url}/vcpus/0"}[level]
    wrong = "KVM_GET_API_VERSION" if level != "system" else "KVM_ENABLE_CAP"
    answer = ioctl(client, place, wrong)
    assert (answer.returns, answer.errno) == (-1, errno)


@pytest.mark.parametrize("path", ["/v1/ioctls/KVM_FLY", "{vm}/ioctls/KVM_FLY", "{vm}/vcpus/0/ioctls/KVM_FLY"])
def test_an_unknown_name_is_not_found(client: ContractClient, vm: str, path: str) -> None:
    reply = client.post(path.format(vm=vm), json={})
    assert (reply.status_code, reply.json()["field"], reply.json()["value"]) == (404, "name", "KVM_FLY")


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/vms/vm_none/ioctls/KVM_ENABLE_CAP", "vm"), ("{vm}/vcpus/9/ioctls/KVM_ENABLE_CAP", "vcpu")]
)
def test_an_unknown_machine_or_vcpu_is_not_found(client: ContractClient, vm: str, path: str, field: str) -> None:
    reply = client.post(path.format(vm=vm), json={})
    assert (reply.status_code, reply.json()["field"]) == (404, field)


def test_null_and_short_arguments_fault(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile="kvm-latest", spp=False)
    whole = enable_cap(CAP_X86_SPP)
    for data in (None, b"", whole[:-1]):
        assert ioctl(client, url, "KVM_ENABLE_CAP", data).errno == "EFAULT"
    assert ioctl(client, url, "KVM_ENABLE_CAP", whole).returns == 0


def test_an_argument_may_point_into_the_memory(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile="kvm-latest", spp=False)
    segment = {"addr": "0x7000", "data": (b"before" + enable_cap(CAP_X86_SPP)).hex()}
    answer = client.post(f"{url}/ioctls/KVM_ENABLE_CAP", json={"arg": "0x7006", "memory": [segment]}).json()
    assert answer == {"return": 0, "errno": None, "data": None, "memory": [segment]}
    for arg in ("0x7007", "0x6fff", "0x8000"):
        assert ioctl(client, url, "KVM_ENABLE_CAP", arg=arg, memory=[segment]).errno == "EFAULT"


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"data": "0"}, "data"),
        ({"data": "0x00"}, "data"),
        ({"data": 5}, "data"),
        ({"arg": -1}, "arg"),
        ({"arg": str(1 << 64)}, "arg"),
        ({"memory": [{"addr": 0, "data": "00"}, {"addr": 0, "data": "01"}]}, "memory[1].addr"),
        ({"memory": [{"addr": 8, "data": "00"}, {"addr": 0, "data": "00" * 9}]}, "memory[0].addr"),
        ({"memory": [{"addr": (1 << 64) - 1, "data": "0000"}]}, "memory[0].addr"),
        ({"host": {"vendor": "intel"}}, "host"),
        ({"max_vcpus": 1}, "max_vcpus"),
        ({"max_vcpus": 0}, "max_vcpus"),
        ({"more": 1}, "more"),
    ],
)
def test_what_is_no_call_is_refused(client: ContractClient, vm: str, members: dict[str, object], field: str) -> None:
    reply = client.post(f"{vm}/ioctls/KVM_ENABLE_CAP", json=members)
    assert (reply.status_code, reply.json()["field"]) == (422, field)


def test_bodies_of_other_forms_are_refused(client: ContractClient, vm: str) -> None:
    url = f"{vm}/ioctls/KVM_ENABLE_CAP"
    assert client.post(url, content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post(url, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post(url, json={}, headers={"Accept": "text/plain"}).status_code == 406
    reply = client.post(url, json={}, params={"arg": "1"})
    assert (reply.status_code, reply.json()["field"]) == (422, "arg")
    reply = client.post(url, json={}, params={"profile": "kvm-2019"})
    assert (reply.status_code, reply.json()["field"]) == (422, "profile")
    reply = client.post("/v1/ioctls/KVM_GET_API_VERSION", params={"profile": "kvm-1999"})
    assert (reply.status_code, reply.json()["field"]) == (422, "profile")


@pytest.mark.parametrize("profile", PROFILES)
def test_create_vm_makes_a_machine_of_the_profile_and_host(client: ContractClient, profile: str) -> None:
    body = {"arg": 0, "host": {"vendor": "amd", "spp": False}}
    reply = client.post("/v1/ioctls/KVM_CREATE_VM", params={"profile": profile}, json=body)
    told = reply.json()
    assert told["return"] >= 3
    assert reply.headers["Location"] == f"/v1/vms/{told['vm']}"
    made = client.get(reply.headers["Location"]).json()
    assert (made["profile"], made["host"]["vendor"], made["host"]["spp"], made["spp"]) == (profile, "amd", False, False)
    assert client.delete(reply.headers["Location"]).status_code == 204


def test_create_vm_refuses_other_machine_types_and_a_host_that_cannot_be(client: ContractClient) -> None:
    before = client.get("/v1/vms").json()
    refused = client.post("/v1/ioctls/KVM_CREATE_VM", json={"arg": 1})
    assert (refused.json()["errno"], "vm" in refused.json(), "Location" in refused.headers) == ("EINVAL", False, False)
    body = {"host": {"vmx_capabilities": {"nonsense": 1}}}
    assert client.post("/v1/ioctls/KVM_CREATE_VM", json=body).status_code == 422
    assert client.get("/v1/vms").json() == before


@pytest.mark.parametrize(
    ("cap", "values"),
    [
        (CAP_X86_SPP, (0, 512)),
        (3, (1, 1)),
        (9, (240, 1024)),
        (10, (509, 32764)),
        (16, (1, 1)),
        (66, (288, (1024, 1))),
        (81, (1, 1)),
        (98, (1, 1)),
        (118, (2, 2)),
        (128, (1023, 4096)),
        (0xFFFF, (0, 0)),
    ],
)
def test_check_extension_at_both_levels(
    client: ContractClient, make_vm: MakeVm, cap: int, values: tuple[int, int | tuple[int, int]]
) -> None:
    for profile, both in zip(PROFILES, values, strict=True):
        value, of_vm = both if isinstance(both, tuple) else (both, both)
        body = {"arg": cap, "host": {"vendor": "amd"}}
        reply = client.post("/v1/ioctls/KVM_CHECK_EXTENSION", params={"profile": profile}, json=body)
        assert reply.json()["return"] == value
        url = make_vm(profile=profile, spp=False, host={"ept": False})
        assert ioctl(client, url, "KVM_CHECK_EXTENSION", arg=cap).returns == of_vm
