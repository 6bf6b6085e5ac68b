"""Capabilities per VM as resources, and the flags and control bits of the series' second patch (kvm-spp 1.1)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.client import ContractClient
from tests.support.ioctls import PROFILES

MakeVm = Callable[..., str]
SPP = 1 << 23
NAMES = ("x86-spp", "182", "KVM_CAP_X86_SPP")


@pytest.mark.parametrize(("profile", "value"), list(zip(PROFILES, (0, 512), strict=True)))
def test_spp_is_switched_on_for_good(client: ContractClient, make_vm: MakeVm, profile: str, value: int) -> None:
    url = make_vm(profile=profile, spp=False)
    off = {"capability": 182, "name": NAMES[0], "available": value, "enabled": False, "result": {}}
    for name in NAMES:
        assert client.get(f"{url}/capabilities/{name}").json() == off
    tag = client.get(f"{url}/capabilities/182").headers["ETag"]
    assert client.put(f"{url}/capabilities/182", json={"enabled": False}).json() == off
    reply = client.put(f"{url}/capabilities/182", json={"enabled": True}, headers={"If-Match": tag})
    assert reply.json() == {**off, "enabled": True}
    assert client.get(f"{url}/spp").json() == {"active": True}
    assert client.put(f"{url}/capabilities/182", json={"enabled": True}).status_code == 200
    assert client.put(f"{url}/capabilities/182", json={"enabled": True}, headers={"If-Match": tag}).status_code == 412
    refused = client.put(f"{url}/capabilities/182", json={"enabled": False})
    assert (refused.status_code, refused.json()["field"]) == (409, "enabled")
    assert client.get(f"{url}/capabilities/182", headers={"If-None-Match": reply.headers["ETag"]}).status_code == 304


def test_a_host_that_lacks_it(client: ContractClient, make_vm: MakeVm) -> None:
    url = make_vm(profile="kvm-latest", spp=False, host={"ept": False})
    assert client.put(f"{url}/capabilities/182", json={"enabled": True}).status_code == 409
    assert client.get(f"{url}/capabilities/182").json()["available"] == 512, (
        "KVM_CHECK_EXTENSION does not look at the host"
    )


@pytest.mark.parametrize("cap", ["KVM_CAP_USER_MEMORY", "183", "0xb6", "SPP"])
def test_others_are_not_found(client: ContractClient, vm: str, cap: str) -> None:
    for reply in (
        client.get(f"{vm}/capabilities/{cap}"),
        client.put(f"{vm}/capabilities/{cap}", json={"enabled": True}),
    ):
        assert (reply.status_code, reply.json()["field"], reply.json()["value"]) == (404, "cap", cap)


def test_control_bit_and_pointer(client: ContractClient, make_vm: MakeVm) -> None:
    """2019 sets the control for every vCPU at its birth, later kernels when SPP comes on; the pointer comes then."""
    for profile, at_birth in zip(PROFILES, (SPP, 0), strict=True):
        url = make_vm(profile=profile, spp=False, vcpus=2)
        for n in (0, 1):
            fields = client.get(f"{url}/vcpus/{n}/vmcs").json()
            assert int(fields["secondary_controls"], 16) & SPP == at_birth
            assert fields["sppt_pointer"] == "0x0"
        assert client.put(f"{url}/capabilities/182", json={"enabled": True}).status_code == 200
        for n in (0, 1):
            fields = client.get(f"{url}/vcpus/{n}/vmcs").json()
            assert int(fields["secondary_controls"], 16) & SPP
            pointer = int(fields["sppt_pointer"], 16)
            assert pointer and pointer & 0xFFF == 0


@pytest.mark.parametrize("host", [{}, {"spp": False}, {"ept": False}])
def test_the_msr_says_whether_the_control_may_be_set(
    client: ContractClient, make_vm: MakeVm, host: dict[str, bool]
) -> None:
    url = make_vm(spp=False, host=host)
    msrs = {msr["index"]: int(msr["value"], 16) for msr in client.get(f"{url}/vcpus/0/msrs").json()["msrs"]}
    assert msrs["0x48b"] >> 55 & 1 == (not host)
