"""KVM_GET_MP_STATE and KVM_SET_MP_STATE in both eras."""

from __future__ import annotations

import struct

import pytest

from engine.abi import Reply, UserBuffer
from engine.arch.kvm_vcpu_structs import EVENTS
from engine.vcpu.vcpu import Vcpu
from tests.engine.builders import machine, round_trip
from tests.engine.ioctls.bare_vcpu import Call, ioctl
from tests.engine.nested.support import ERAS, make_vcpu

RUNNABLE, UNINITIALIZED, INIT_RECEIVED, HALTED, SIPI_RECEIVED = range(5)
RESET_HOLD = 9


def set_state(vcpu: Vcpu, number: int) -> str | None:
    return ioctl(Call("KVM_SET_MP_STATE", "vcpu", UserBuffer.of(struct.pack("<I", number)), vcpu=vcpu)).errno


def state(vcpu: Vcpu) -> int:
    user = UserBuffer.of(bytes(4))
    assert ioctl(Call("KVM_GET_MP_STATE", "vcpu", user, vcpu=vcpu)) == Reply(0)
    return int(struct.unpack("<I", bytes(user.data or b""))[0])


def set_events(vcpu: Vcpu, **fields: int) -> str | None:
    raw = bytearray(64)
    for name, value in fields.items():
        EVENTS.put(raw, name, value)
    return ioctl(Call("KVM_SET_VCPU_EVENTS", "vcpu", UserBuffer.of(bytes(raw)), vcpu=vcpu)).errno


@pytest.mark.parametrize("era", ERAS)
def test_what_was_set_is_given_back(era: str) -> None:
    vcpu = make_vcpu(era)
    for number in (UNINITIALIZED, INIT_RECEIVED, HALTED, RESET_HOLD, RUNNABLE):
        assert set_state(vcpu, number) is None
        assert state(vcpu) == number


@pytest.mark.parametrize("era", ERAS)
def test_a_number_that_is_none(era: str) -> None:
    """The kernel of 2019 looks at nothing but the APIC."""
    vcpu = make_vcpu(era)
    for number in (5, 8, 10, 0xFFFF_FFFF):
        assert set_state(vcpu, number) == (None if era == "kvm-2019" else "EINVAL")
        assert state(vcpu) == (number if era == "kvm-2019" else RUNNABLE)


@pytest.mark.parametrize("era", ERAS)
def test_without_an_apic_in_the_kernel_only_runnable(era: str) -> None:
    vcpu = make_vcpu(era)
    vcpu.lapic_in_kernel = False
    for number in (UNINITIALIZED, INIT_RECEIVED, HALTED, SIPI_RECEIVED, RESET_HOLD, 77):
        assert set_state(vcpu, number) == "EINVAL"
    assert set_state(vcpu, RUNNABLE) is None


@pytest.mark.parametrize("era", ERAS)
def test_a_sipi_starts_the_vcpu_at_its_vector(era: str) -> None:
    vcpu = make_vcpu(era)
    assert set_events(vcpu, flags=2, sipi_vector=0x9A) is None
    assert set_state(vcpu, SIPI_RECEIVED) is None
    assert state(vcpu) == RUNNABLE
    assert (vcpu.registers["cs_selector"], vcpu.registers["cs_base"], vcpu.registers["rip"]) == (0x9A00, 0x9A000, 0)


@pytest.mark.parametrize("era", ERAS)
def test_smm_and_waiting_for_a_sipi(era: str) -> None:
    """In 2019 the two exclude each other; today's kernel takes both, drops the SIPI, and refuses to run."""
    vcpu, old = make_vcpu(era), era == "kvm-2019"
    assert set_state(vcpu, INIT_RECEIVED) is None
    assert set_events(vcpu, flags=8, smi_smm=1) == ("EINVAL" if old else None)
    assert set_state(vcpu, RUNNABLE) is None
    assert set_events(vcpu, flags=8, smi_smm=1) is None
    for number in (INIT_RECEIVED, SIPI_RECEIVED):
        assert set_state(vcpu, number) == ("EINVAL" if old else None)
        assert state(vcpu) == (RUNNABLE if old else INIT_RECEIVED)
    assert ioctl(Call("KVM_RUN", "vcpu", vcpu=vcpu)).errno == (None if old else "EINVAL")


@pytest.mark.parametrize("era", ERAS)
def test_a_further_vcpu_is_not_initialised(era: str) -> None:
    """With an APIC in the kernel all but vCPU 0 wait for an INIT, and say so to whoever looks at them."""
    for irqchip in (False, True):
        vm = machine(era, spp=False, vcpus=(), vcpu_room=2)
        vm.nested.set_lapic_in_kernel(irqchip)
        vm.create_vcpu(3)
        vm.create_vcpu(0)
        for back in (vm, round_trip(vm)):
            assert [back.nested.vcpu(vcpu).mp_state for vcpu in (3, 0)] == [
                "uninitialized" if irqchip else "runnable",
                "runnable",
            ]
        with vm.nested.change(3) as (vcpu, _):
            assert set_state(vcpu, RUNNABLE) is None
        assert round_trip(vm).nested.vcpu(3).mp_state == "runnable"
