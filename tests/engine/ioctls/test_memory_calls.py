"""KVM_SET_USER_MEMORY_REGION2, how many pages the MMU may keep, and memory of address space 1."""

from __future__ import annotations

import struct

import pytest

from engine.abi import VCPU, VM, Call, Reply, UserBuffer, UserMemory
from engine.arch.kvm_vcpu_structs import EVENT_SMM, EVENTS
from engine.ioctls import IOCTLS, Target
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from tests.engine.builders import MIB, PROFILES, access, machine, round_trip


def call(vm: VirtualMachine, name: str, data: bytes | None = None, arg: int = 0) -> Reply:
    return IOCTLS.perform(Target(vm.config.profile, vm.config.host, vm), Call(name, VM, UserBuffer.of(data), arg))


def region2(slot: int, flags: int, gpa: int, size: int, address: int = 0, rest: bytes = b"") -> bytes:
    return (struct.pack("<IIQQQ", slot, flags, gpa, size, address) + rest).ljust(160, b"\0")


def test_a_region_of_the_second_form() -> None:
    vm = machine("kvm-latest", slots=(), spp=False)
    given = region2(3, 1, MIB, 2 * MIB, 0x7F00_0000_0000)
    assert call(vm, "KVM_SET_USER_MEMORY_REGION2", given) == Reply(0)
    assert vm.slots() == (SlotSpec(3, MIB, 2 * MIB, log_dirty=True, userspace_addr=0x7F00_0000_0000),)
    assert call(vm, "KVM_SET_USER_MEMORY_REGION2", region2(3, 1, MIB, MIB)).errno == "EINVAL"
    assert call(vm, "KVM_SET_USER_MEMORY_REGION2", region2(4, 0, MIB, MIB)).errno == "EEXIST"
    assert call(vm, "KVM_SET_USER_MEMORY_REGION2", given[:-1]).errno == "EFAULT"
    assert call(vm, "KVM_SET_USER_MEMORY_REGION2", region2(4, 4, 8 * MIB, MIB)).errno == "EINVAL", "no guest_memfd here"
    ignored = region2(4, 0, 8 * MIB, MIB, rest=bytes([255]) * 128)
    assert call(vm, "KVM_SET_USER_MEMORY_REGION2", ignored) == Reply(0)
    assert call(vm, "KVM_SET_USER_MEMORY_REGION2", region2(3, 0, 0, 0)) == Reply(0)
    assert [slot.slot for slot in vm.slots()] == [4]


def test_2019_does_not_know_it() -> None:
    vm = machine("kvm-2019", slots=(), spp=False)
    assert call(vm, "KVM_SET_USER_MEMORY_REGION2", region2(0, 0, 0, MIB)).errno == "ENOTTY"
    assert vm.slots() == ()


@pytest.mark.parametrize("profile", PROFILES)
def test_pages_of_the_mmu(profile: str) -> None:
    vm = machine(profile, slots=(), spp=False)
    for count in (0, 63):
        assert call(vm, "KVM_SET_NR_MMU_PAGES", arg=count).errno == "EINVAL"

    def told(of: VirtualMachine) -> Reply:
        return call(of, "KVM_GET_NR_MMU_PAGES")

    if profile == "kvm-latest":
        assert told(vm).errno == "ENOTTY"
    else:
        assert told(vm) == Reply(0)
        vm.set_slot(SlotSpec(0, 0, 4 * MIB))
        assert told(vm) == Reply(64)
        vm.set_slot(SlotSpec(1, 8 * MIB, 1024 * MIB))
        assert told(vm) == Reply((256 + 1) * 1024 * 20 // 1000)
    assert call(vm, "KVM_SET_NR_MMU_PAGES", arg=64) == Reply(0)
    assert vm.memory_slots.wanted_mmu_pages == round_trip(vm).memory_slots.wanted_mmu_pages == 64
    assert call(vm, "KVM_SET_NR_MMU_PAGES", arg=1 << 63 | 100) == Reply(0)
    assert round_trip(vm).memory_slots.wanted_mmu_pages == 1 << 63 | 100
    assert profile == "kvm-latest" or told(vm) == Reply(100), "32 bits are returned"


@pytest.mark.parametrize("profile", PROFILES)
def test_capability(profile: str) -> None:
    vm = machine(profile, spp=False)
    for number in (2, 14, 50, 55):
        assert call(vm, "KVM_CHECK_EXTENSION", arg=number) == Reply(1)


@pytest.mark.parametrize("profile", PROFILES)
def test_memory_and_log_of_address_space_1(profile: str) -> None:
    """A slot of space 1, a vCPU put in SMM as a restored guest is, and the log of what it wrote there."""
    vm = machine(profile, spp=False)
    smram = struct.pack("<IIQQQ", 1 << 16, 1, 0, 0x80000, 0x7F00_0000_0000)
    assert call(vm, "KVM_SET_USER_MEMORY_REGION", smram) == Reply(0)
    events = bytearray(EVENTS.size)
    EVENTS.put(events, "flags", EVENT_SMM)
    EVENTS.put(events, "smi_smm", 1)
    target = Target(profile, vm.config.host, vm, 0)
    assert IOCTLS.perform(target, Call("KVM_SET_VCPU_EVENTS", VCPU, UserBuffer.of(bytes(events)), 0)) == Reply(0)
    assert access(vm, 0x3000)[-1] == "completed"
    assert access(vm, 0x80000) == ["mmio"]
    bitmap, log = UserMemory([(0x9000, bytearray(16))]), UserBuffer.of(struct.pack("<IIQ", 1 << 16, 0, 0x9000))
    assert IOCTLS.perform(target, Call("KVM_GET_DIRTY_LOG", VM, log, memory=bitmap)) == Reply(0)
    assert bitmap.read(0x9000, 16) == b"\x08" + bytes(15)
