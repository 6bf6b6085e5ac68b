"""The table of ioctls: one answer for each place in it, and what the machine refuses as errno."""

from __future__ import annotations

import pytest

from engine.abi import SYSTEM, VCPU, VM, Call, Reply
from engine.errors import Busy, NotEnabled
from engine.ioctls import IOCTLS, Ioctl, Registry, Target
from engine.state.config import HostConfig
from tests.engine.builders import machine


def refuse(_: Target, __: Call) -> Reply:
    raise NotEnabled("first things first")


def busy(_: Target, __: Call) -> Reply:
    raise Busy("later")


SYSTEM_TARGET = Target("kvm-2019", HostConfig())


def test_no_place_is_answered_twice() -> None:
    row = Ioctl("KVM_A", VM, refuse)
    with pytest.raises(ValueError, match="KVM_A at level vm"):
        Registry([row, row])
    with pytest.raises(ValueError, match="KVM_A at level host"):
        Registry([Ioctl("KVM_A", "host", refuse)])
    assert Registry([row, Ioctl("KVM_A", VCPU, refuse)]).names == {"KVM_A"}


def test_refusals_become_errno_and_a_busy_machine_does_not() -> None:
    registry = Registry([Ioctl("KVM_A", SYSTEM, refuse), Ioctl("KVM_B", SYSTEM, busy)])
    assert registry.perform(SYSTEM_TARGET, Call("KVM_A", SYSTEM)) == Reply(-1, "ENODEV")
    with pytest.raises(Busy):
        registry.perform(SYSTEM_TARGET, Call("KVM_B", SYSTEM))


def test_another_era_does_not_know_the_ioctl() -> None:
    registry = Registry([Ioctl("KVM_A", VM, refuse, profiles=("kvm-latest",))])
    vm = machine("kvm-2019")
    target = Target("kvm-2019", vm.config.host, vm)
    assert registry.perform(target, Call("KVM_A", VM)) == Reply(-1, "ENOTTY")


def test_a_get_needs_the_writer_only_while_an_allocation_is_to_fail() -> None:
    get, sets = "KVM_SUBPAGES_GET_ACCESS", "KVM_SUBPAGES_SET_ACCESS"
    vm, failing = machine("kvm-latest"), machine("kvm-latest", host=HostConfig(fail_allocation=9))
    assert [IOCTLS.changes(item, VM, name) for item in (vm, failing) for name in (get, sets)] == [
        False,
        True,
        True,
        True,
    ]
    assert not IOCTLS.changes(vm, VCPU, sets)


def test_every_name_is_one_of_the_kernels() -> None:
    assert all(name.startswith("KVM_") and name.isupper() for name in IOCTLS.names)
