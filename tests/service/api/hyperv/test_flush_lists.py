"""Flush lists over HTTP where linear addresses end: what is required, what KVM drops, and whose width counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.state.profiles import KVM_LATEST, PROFILES
from tests.contract.client import ContractClient
from tests.engine.hyperv.flush_machine import words
from tests.engine.hyperv.guests import CPUID, CR4
from tests.service.api.hyperv.flush_vm import FlushVm
from tests.support.guests import leaves

MakeVm = Callable[..., str]
SPACE = 0x1000
HIGH = 0xFFFF_8000_0000_0000
ACROSS = 0xFFFF_7FFF_FFFF_F001  # the page before HIGH, and one more
WIDE = 1 << 48 | 0x7F00_0000_1000
LA57 = 1 << 12


def flush(vm: FlushVm, entry: int, processors: int = 1) -> dict[str, list[str]]:
    """What a list with one entry did to the one VP that it changed or should have, by linear address."""
    done = vm.call(1 << 32 | 3, words(SPACE, 0, processors, entry).hex())
    assert done["result"]["value"] == hex(1 << 32)
    (found,) = (vp for vp in done["vps"] if vp["targeted"])
    return {
        name: sorted(item["address"] for item in found[name] if item["kind"] == "combined")
        for name in ("required", "dropped", "over_flushed", "left")
    }


def remember(vm: FlushVm, linear: int, vcpu: int = 0, cr3: int = SPACE) -> None:
    vm.put(f"vcpus/{vcpu}/vmcs", cr3=hex(cr3))
    body = {"gva": hex(linear), "size": 8, "access": "read", "vcpu": vcpu}
    reply = vm.client.post(f"{vm.url}/accesses", json=body).json()
    assert reply["allowed"], reply


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("policy", ["kvm", "tlfs"])
def test_addresses_are_ignored_and_not_ranges(
    client: ContractClient, make_vm: MakeVm, profile: str, policy: str
) -> None:
    vm = FlushVm(client, make_vm, profile=profile, flush_policy=policy)
    for linear in (HIGH, 0xFFFF_FFFF_FFFF_F000, 0):
        vm.map_page(SPACE, linear, 12, False)
        remember(vm, linear)
    heard = policy == "tlfs" or profile == KVM_LATEST
    assert flush(vm, ACROSS) == {
        "required": [hex(HIGH)],
        "dropped": [hex(HIGH)] if heard else [],
        "over_flushed": [],
        "left": [] if heard else [hex(HIGH)],
    }
    wrapped = ["0x0"] if policy == "kvm" else []
    assert flush(vm, 0xFFFF_FFFF_FFFF_FFFE) == {
        "required": ["0xfffffffffffff000"],
        "dropped": [*wrapped, "0xfffffffffffff000"],
        "over_flushed": wrapped,
        "left": [],
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_a_vcpu_with_57_bits_beside_one_with_48(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    vm = FlushVm(client, make_vm, profile=profile)
    refused: Any = client.put(f"{vm.url}/vcpus/1/vmcs", json={"cr4": hex(CR4 | LA57)})
    assert (refused.status_code, refused.json()["field"]) == (422, "cr4")
    entries = [*leaves(CPUID), {"function": "0x7", "flags": "0x1", "ecx": "0x10000"}]
    assert client.put(f"{vm.url}/vcpus/1/cpuid", json={"entries": entries}).status_code == 200
    vm.put("vcpus/1/vmcs", cr4=hex(CR4 | LA57))
    top = 0x80000
    assert vm.store(top + 8, words(SPACE | 0x67))
    remember(vm, WIDE, vcpu=1, cr3=top)
    # by VP 0, which has 48 bits
    done = vm.call(1 << 32 | 3, words(top, 0, 2, WIDE).hex())
    (found,) = (vp for vp in done["vps"] if vp["targeted"])
    assert [item["address"] for item in found["required"]] == [hex(WIDE)]
    assert found["required"] == found["dropped"] and not found["left"]
    # and INVVPID of an address of 57 bits there: by CR4 in 5.3, by the host in 7.1
    body = {"type": 0, "vpid": 1, "linear_address": hex(WIDE)}
    by = [client.post(f"{vm.url}/vcpus/{vcpu}/invvpid", json=body).json()["result"] for vcpu in (0, 1)]
    assert by == ["VMsucceed" if profile == KVM_LATEST else "VMfail", "VMsucceed"]
