"""What ioctls change survives: vCPUs that were made, slots of both address spaces, the allocation that is to fail."""

from __future__ import annotations

import json

import pytest

from engine.errors import InvalidValue, OutOfMemory
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import HostConfig
from tests.engine.builders import MIB, PROFILES, machine, refused


def again(vm: VirtualMachine) -> VirtualMachine:
    """The machine that its durable form describes."""
    blocks = {(array, block): data for array, block, data in vm.blocks_since(None)}
    return VirtualMachine.restore(json.loads(json.dumps(vm.head())), blocks)


@pytest.mark.parametrize("profile", PROFILES)
def test_vcpus(profile: str) -> None:
    vm = machine(profile, vcpus=(), vcpu_room=3)
    assert vm.config.vcpus == ()
    vm.create_vcpu(7)
    back = again(vm)
    assert [item.id for item in back.config.vcpus] == [7]
    back.create_vcpu(2)
    assert [back.config.vcpu_position(vcpu) for vcpu in (7, 2)] == [0, 1]
    with refused(back, InvalidValue, "vcpu", 7, "must be a new id", "EEXIST"):
        back.create_vcpu(7)
    back.create_vcpu(0)
    with refused(back, InvalidValue, "vcpu", 1, "room for 3", "EINVAL"):
        back.create_vcpu(1)


@pytest.mark.parametrize("profile", PROFILES)
def test_slots(profile: str) -> None:
    vm = machine(profile)
    smm = SlotSpec(0, 0, MIB, address_space=1, userspace_addr=0x7000)
    logged = SlotSpec(5, 8 * MIB, MIB, log_dirty=True, read_only=True)
    for spec in (smm, logged):
        vm.set_slot(spec)
    back = again(vm)
    assert back.slots() == vm.slots()
    assert [spec.key for spec in back.slots()] == [0, 5, 1 << 16]


def test_the_allocation_that_fails() -> None:
    vm = machine(spp=False, host=HostConfig(fail_allocation=3))
    vm.allocations.make_buffer()
    assert again(vm).allocations.failing == vm.allocations.failing == 2
    with pytest.raises(OutOfMemory, match="made to fail") as caught:
        vm.allocations.make_bitmaps(2)
    assert (caught.value.field, caught.value.errno) == ("host.fail_allocation", "ENOMEM")
    assert again(vm).allocations.failing is None
    vm.allocations.make_bitmaps(100)


def test_an_allocation_that_fails_later_lets_spp_come_on() -> None:
    vm = machine(spp=False, host=HostConfig(fail_allocation=2))
    vm.enable_spp()
    assert (vm.spp_active, vm.allocations.failing) == (True, 1)
    vm.enable_spp()
    assert vm.allocations.failing == 1, "nothing is allocated a second time"
