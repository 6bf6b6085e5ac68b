"""Linear addresses of 57 bits: which machines have them, and what goes by the host's width and what by a vCPU's."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch.hyperv_cpuid import CpuidEntry
from engine.errors import InvalidValue
from engine.machine import VirtualMachine
from engine.machine.linear_width import host_width
from engine.machine.vcpu_operations import InstructionResult
from engine.state.config import VcpuConfig, VmConfig
from engine.state.profiles import KVM_2019, PROFILES
from engine.trace.single import AccessRequest
from tests.engine.builders import machine, round_trip, store_word
from tests.engine.hyperv.flush_machine import words
from tests.engine.hyperv.guests import CPUID, CR3, CR4, TABLES, call, hyperv_guest

LA57 = 1 << 12
LEAF_7 = CpuidEntry(7, flags=1, ecx=1 << 16)
WIDE_CPUID = (*CPUID, LEAF_7)
WIDE = 1 << 48 | 0x7F00_0000_1000  # only a vCPU with CR4.LA57 can use it
PML5 = TABLES + 0x8000
WIDER = 1 << 47
by_profile = pytest.mark.parametrize("profile", PROFILES)


def width_of(vm: VirtualMachine) -> int:
    now = vm.state.current
    return host_width(now.config, now.snapshot.machine, now.nested)


def guest(profile: str, **config: Any) -> VirtualMachine:
    """Two vCPUs on one host: 1 has 57 bits and remembers the translation of WIDE, 0 has 48."""
    vm = hyperv_guest((0, 2), profile=profile, cpuid=CPUID, **config)
    vm.nested.set_cpuid(1, WIDE_CPUID)
    store_word(vm, PML5 + 8, CR3 | 0x67)
    vm.vcpus.set_vmcs(1, {"cr3": PML5, "cr4": CR4 | LA57})
    remember(vm)
    return vm


def remember(vm: VirtualMachine) -> None:
    assert vm.access(AccessRequest(gpa=None, size=8, access=0, vcpu=1, gva=WIDE)).data is not None


@by_profile
@pytest.mark.parametrize("policy", ["kvm", "tlfs"])
def test_a_list_goes_by_the_width_of_the_host(profile: str, policy: str) -> None:
    vm = guest(profile, flush_policy=policy)
    for caller, target in ((0, 2), (1, 2)):
        report = call(vm, caller, words(PML5, 0, 1 << target, WIDE), rcx=1 << 32 | 3)
        (effect,) = report.vps
        assert [(entry.address, entry.kind) for entry in effect.required] == [(WIDE, "combined")]
        assert effect.required == effect.dropped and not effect.left
        remember(vm)


@by_profile
def test_what_waits_goes_by_the_width_of_the_host(profile: str) -> None:
    """The queue of a vCPU of 48 bits has an address of 57."""
    vm = guest(profile)
    vm.hyperv.set_activity(1, "halted")
    report = call(vm, 0, words(PML5, 0, 4, WIDE), rcx=1 << 32 | 3)
    assert [len(effect.left) for effect in report.vps] == [1]
    vm.vcpus.set_vmcs(1, {"cr4": CR4})
    vm.access(AccessRequest(gpa=0x5000, size=8, access=0, vcpu=1))
    assert [entry.address for entry in vm.vcpus.tlb(1) if entry.kind == "combined"] == []


@by_profile
def test_invvpid_goes_by_cr4_or_the_host(profile: str) -> None:
    failed = InstructionResult("VMfail", vm_instruction_error=28)
    plain = machine(profile, vcpus=(0, 1))
    assert plain.vcpus.invvpid(0, 0, 1, WIDER) == failed
    vm = guest(profile)
    by_vcpu = profile == KVM_2019
    assert (vm.vcpus.invvpid(0, 0, 1, WIDER) == failed) == by_vcpu
    assert vm.vcpus.invvpid(1, 0, 1, WIDER).result == "VMsucceed"
    for vcpu in (0, 1):
        assert vm.vcpus.invvpid(vcpu, 0, 1, 1 << 56) == failed
        assert vm.vcpus.invvpid(vcpu, 1, 1, 1 << 63).result == "VMsucceed"


@by_profile
def test_a_host_has_what_a_vcpu_has(profile: str) -> None:
    assert width_of(hyperv_guest(profile=profile)) == 48
    born = VmConfig(profile=profile, vcpus=(VcpuConfig(0), VcpuConfig(1, cpuid=({"function": 7, "ecx": 1 << 16},))))
    vm = VirtualMachine.create(born)
    assert width_of(vm) == 57
    vm.nested.set_cpuid(1, CPUID)
    assert width_of(vm) == width_of(round_trip(vm)) == 57
    vm = hyperv_guest(profile=profile)
    vm.nested.set_cpuid(1, WIDE_CPUID)
    assert width_of(vm) == width_of(round_trip(vm)) == 57
    # without any CPUID
    vm = machine(profile, vcpus=(0, 1))
    vm.vcpus.set_vmcs(1, {"cr4": CR4 | LA57})
    assert width_of(vm) == 57


@by_profile
def test_cr4_la57_needs_cpuid(profile: str) -> None:
    vm = hyperv_guest(profile=profile)
    before = vm.vcpus.vmcs(1)
    with pytest.raises(InvalidValue, match="LA57") as caught:
        vm.vcpus.set_vmcs(1, {"cr3": 0x7000, "cr4": CR4 | LA57})
    assert (caught.value.field, caught.value.value) == ("cr4", CR4 | LA57)
    assert vm.vcpus.vmcs(1) == before
    vm.nested.set_cpuid(1, WIDE_CPUID)
    vm.vcpus.set_vmcs(1, {"cr4": CR4 | LA57})
    assert vm.vcpus.vmcs(1)["cr4"] == CR4 | LA57
