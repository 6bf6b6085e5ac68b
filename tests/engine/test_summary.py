"""What a list shows of a machine is in its head, and is what the machine itself says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

from engine.arch.hyperv_cpuid import CpuidEntry
from engine.errors import OutOfMemory
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.machine.summary import Summary, summary_from_head
from engine.state.config import HostConfig, VcpuConfig, VmConfig

SLOTS = (SlotSpec(0, 0, 1 << 22), SlotSpec(3, 1 << 32, 1 << 16, read_only=True))
LEAF = CpuidEntry(0x1, eax=0x806EC, ecx=1 << 5)


def from_head(vm: VirtualMachine) -> Summary | None:
    return summary_from_head(json.loads(json.dumps(vm.head())))


def nothing(vm: VirtualMachine) -> None:
    """As created."""


def give_cpuid(vm: VirtualMachine) -> None:
    vm.nested.set_cpuid(4, (LEAF,))


def enable(vm: VirtualMachine) -> None:
    vm.delete_slot(3)
    vm.enable_spp()


def move_a_slot(vm: VirtualMachine) -> None:
    vm.set_slot(SlotSpec(3, 2 << 32, 1 << 16, read_only=True))


@pytest.mark.parametrize("change", [nothing, give_cpuid, enable, move_a_slot])
def test_the_head_has_it(change: Callable[[VirtualMachine], None]) -> None:
    config = VmConfig(
        name="listed",
        vcpus=(VcpuConfig(1), VcpuConfig(4, 7, (asdict(CpuidEntry(0x40000000, ebx=1)),))),
        host=HostConfig(fail_allocation=9, vmx_capabilities={"ept_vpid_cap": 0xF0106734141}),
    )
    vm = VirtualMachine.create(config, SLOTS)
    change(vm)
    summary = from_head(vm)
    assert summary is not None and summary == vm.summary()
    assert summary.spp_active is vm.spp_active is (change is enable)
    assert summary.slots == vm.slots() and summary.identities == tuple(vm.nested.identities())
    assert summary.failing == vm.allocations.failing == (8 if change is enable else 9)
    assert summary.config == vm.config


def test_an_allocation_that_failed_is_not_shown_any_more() -> None:
    vm = VirtualMachine.create(VmConfig(host=HostConfig(fail_allocation=1)), SLOTS)
    with pytest.raises(OutOfMemory):
        vm.enable_spp()
    summary = from_head(vm)
    assert summary is not None and summary.failing is None and not summary.spp_active


def test_a_head_from_before() -> None:
    head = VirtualMachine.create(VmConfig(), SLOTS).head()
    del head["outline"]
    assert summary_from_head(head) is None
