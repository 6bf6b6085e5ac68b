"""What a program chooses for all vCPUs of a VM, capabilities by number in both eras, and KVM_GET_TSC_KHZ."""

from __future__ import annotations

import json
import struct

import pytest

from engine.abi import SYSTEM, VCPU, VM, Call, Reply, UserBuffer
from engine.arch.kvm_vcpu_structs import EVENTS, SREGS
from engine.ioctls import IOCTLS, Target
from engine.machine import VirtualMachine
from tests.engine.builders import PROFILES, machine

EINVAL = Reply(-1, "EINVAL")
PAYLOAD = 0x10


def new_vm(profile: str) -> VirtualMachine:
    return machine(profile, vcpus=(), vcpu_room=4, spp=False)


def again(vm: VirtualMachine) -> VirtualMachine:
    """The machine that its durable form describes."""
    blocks = {(array, block): data for array, block, data in vm.changed_blocks()}
    return VirtualMachine.restore(json.loads(json.dumps(vm.head())), blocks)


def call(vm: VirtualMachine, level: str, name: str, arg: int = 0, data: bytes | None = None) -> tuple[Reply, bytes]:
    user = UserBuffer.of(data)
    vcpu = vm.config.vcpus[0].id if level == VCPU else None
    reply = IOCTLS.perform(Target(vm.config.profile, vm.config.host, vm, vcpu), Call(name, level, user, arg))
    return reply, bytes(user.data or b"")


def enable(vm: VirtualMachine, number: int, value: int = 0, flags: int = 0, level: str = VM) -> Reply:
    return call(
        vm, level, "KVM_ENABLE_CAP", data=struct.pack("<II4Q", number, flags, value, 0, 0, 0).ljust(104, b"\0")
    )[0]


def create(vm: VirtualMachine, vcpu: int) -> str | None:
    return call(vm, VM, "KVM_CREATE_VCPU", vcpu)[0].errno


def events(**given: int) -> bytes:
    raw = bytearray(64)
    for name, value in given.items():
        EVENTS.put(raw, name, value)
    return bytes(raw)


@pytest.mark.parametrize(
    ("number", "of_2019", "latest"),
    [
        (34, 1, 1),
        (56, 1, 1),
        (61, 1, 1),
        (74, 7, 7),
        (128, 1023, 4096),
        (136, 1, 1),
        (159, 1, 1),
        (164, 1, 1),
        (168, 0, 0),
        (175, 0, 0),
        (199, 0, 1),
        (203, 0, 0),
        (208, 0, 4096),
        (213, 0, 0),
        (231, 0, 1),
    ],
)
def test_capabilities(number: int, of_2019: int, latest: int) -> None:
    for profile, value in zip(PROFILES, (of_2019, latest), strict=True):
        for level in (SYSTEM, VM):
            assert call(new_vm(profile), level, "KVM_CHECK_EXTENSION", number)[0] == Reply(value)


@pytest.mark.parametrize("profile", PROFILES)
def test_tsc(profile: str) -> None:
    vm = new_vm(profile)
    assert create(vm, 0) is None
    assert call(vm, VCPU, "KVM_GET_TSC_KHZ")[0].returns > 0
    of_vm = call(vm, VM, "KVM_GET_TSC_KHZ")[0]
    assert of_vm == (Reply(-1, "ENOTTY") if profile == "kvm-2019" else call(vm, VCPU, "KVM_GET_TSC_KHZ")[0])
    assert call(vm, SYSTEM, "KVM_GET_TSC_KHZ")[0] == EINVAL


def test_2019_has_no_choice_of_ids() -> None:
    vm = new_vm("kvm-2019")
    assert enable(vm, 128, 1023) == enable(vm, 128, 2) == enable(vm, 128) == EINVAL
    assert create(vm, 1022) is None


def test_the_limit_of_ids_is_chosen_once_and_first() -> None:
    vm = new_vm("kvm-latest")
    assert enable(vm, 128, 4097) == enable(vm, 128, 3, flags=1) == EINVAL
    assert enable(vm, 128, 0) == enable(vm, 128, 3) == enable(vm, 128, 3) == Reply(0)
    assert enable(vm, 128, 4) == enable(vm, 128, 0) == EINVAL
    vm = again(vm)
    assert create(vm, 3) == "EINVAL" and create(vm, 2) is None
    assert enable(vm, 128, 3) == Reply(0)
    late = new_vm("kvm-latest")
    assert create(late, 7) is None
    assert (enable(late, 128, 4096), enable(late, 128, 8), enable(late, 128, 0)) == (Reply(0), EINVAL, EINVAL)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_boot_processor(profile: str) -> None:
    vm = new_vm(profile)
    impossible = call(vm, VM, "KVM_SET_BOOT_CPU_ID", 4097)[0]
    assert impossible == (Reply(0) if profile == "kvm-2019" else EINVAL)
    assert call(vm, VM, "KVM_SET_BOOT_CPU_ID", 5)[0] == Reply(0)
    if profile == "kvm-latest":
        assert (enable(vm, 128, 4), enable(vm, 128, 6)) == (EINVAL, Reply(0))
        assert call(vm, VM, "KVM_SET_BOOT_CPU_ID", 7)[0] == EINVAL
    vm = again(vm)
    for vcpu, base in ((5, 0xFEE0_0900), (0, 0xFEE0_0800)):
        assert create(vm, vcpu) is None
        sregs = IOCTLS.perform(
            Target(profile, vm.config.host, vm, vcpu), Call("KVM_GET_SREGS", VCPU, user := UserBuffer.of(bytes(312)))
        )
        assert (sregs, SREGS.get(bytes(user.data or b""), "apic_base")) == (Reply(0), base)
    assert call(vm, VM, "KVM_SET_BOOT_CPU_ID", 5)[0] == Reply(-1, "EBUSY")


@pytest.mark.parametrize("profile", PROFILES)
def test_payloads_of_exceptions(profile: str) -> None:
    vm = new_vm(profile)
    assert create(vm, 0) is None
    pending = events(
        flags=PAYLOAD, exception_nr=14, exception_pending=1, exception_has_payload=1, exception_payload=0x7000
    )
    assert call(vm, VCPU, "KVM_SET_VCPU_EVENTS", data=pending)[0] == EINVAL
    assert enable(vm, 164, 1, level=VCPU) == EINVAL
    assert enable(vm, 164, 1) == Reply(0)
    vm = again(vm)
    assert call(vm, VCPU, "KVM_SET_VCPU_EVENTS", data=pending)[0] == Reply(0)
    told = call(vm, VCPU, "KVM_GET_VCPU_EVENTS", data=bytes(64))[1]
    names = ("exception_injected", "exception_pending", "exception_has_payload", "exception_payload")
    assert [EVENTS.get(told, name) for name in names] == [0, 1, 1, 0x7000]
    assert EVENTS.get(told, "flags") & PAYLOAD
    assert call(vm, VCPU, "KVM_SET_VCPU_EVENTS", data=told)[0] == Reply(0)
    wrong = events(flags=PAYLOAD, exception_nr=32, exception_pending=1)
    assert call(vm, VCPU, "KVM_SET_VCPU_EVENTS", data=wrong)[0] == EINVAL
    # Switched off again, what is pending passes for injected; a payload goes with what is injected.
    assert enable(vm, 164, 0) == Reply(0)
    told = call(vm, VCPU, "KVM_GET_VCPU_EVENTS", data=bytes(64))[1]
    assert [EVENTS.get(told, name) for name in names[:2]] == [1, 1] and not EVENTS.get(told, "flags") & PAYLOAD
    assert call(vm, VCPU, "KVM_SET_VCPU_EVENTS", data=told)[0] == Reply(0)
    told = call(vm, VCPU, "KVM_GET_VCPU_EVENTS", data=bytes(64))[1]
    assert [EVENTS.get(told, name) for name in names[:3]] == [1, 0, 0]


@pytest.mark.parametrize("profile", PROFILES)
def test_an_injected_exception_has_no_payload(profile: str) -> None:
    vm = new_vm(profile)
    assert create(vm, 0) is None and enable(vm, 164, 1) == Reply(0)
    both = events(flags=PAYLOAD, exception_nr=14, exception_injected=1, exception_pending=1)
    for raw, seen in (
        (both, [0, 1, 0]),
        (events(flags=PAYLOAD, exception_nr=14, exception_injected=1, exception_has_payload=1), [1, 0, 0]),
        (events(flags=PAYLOAD, exception_nr=3, exception_pending=1), [0, 0, 0]),
    ):
        assert call(vm, VCPU, "KVM_SET_VCPU_EVENTS", data=raw)[0] == Reply(0)
        told = call(vm, VCPU, "KVM_GET_VCPU_EVENTS", data=bytes(64))[1]
        names = ("exception_injected", "exception_pending", "exception_has_payload")
        assert [EVENTS.get(told, name) for name in names] == seen
