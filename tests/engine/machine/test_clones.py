"""Clones: machines that begin as another one is, in its frames, until they are changed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VcpuConfig, VmConfig
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    MIB,
    PROFILES,
    assert_sound,
    machine,
    maps,
    picture,
    protect,
    replay,
    round_trip,
    set_map,
)


def filled(profile: str = "kvm-2019", **config: Any) -> VirtualMachine:
    vm = machine(profile, vcpus=(0, 3), **config)
    vm.write_memory(0x1000, b"origin")
    protect(vm, "text", (0x2000, 256))
    set_map(vm, 5, 0x0F)
    replay(vm, [0x2000, 0x3000, 0x5000])
    return vm


def same(a: VirtualMachine, b: VirtualMachine) -> bool:
    return picture(a)[1] == picture(b)[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_clone_is_the_same_machine_under_another_name(profile: str) -> None:
    vm = filled(profile)
    clone = vm.clone("second")
    assert clone.config.name == "second" and vm.config.name == ""
    assert same(vm, clone) and clone.slots() == vm.slots() and clone.protections() == vm.protections()
    assert clone.counters() == vm.counters() and clone.frames_in_use == vm.frames_in_use
    assert clone.read_memory(0x1000, 6) == b"origin"
    assert round_trip(clone).config.name == "second"


def test_nothing_is_copied_before_the_first_change_of_the_clone() -> None:
    vm = filled()
    clone = vm.clone("")
    rows = vm.state.current.snapshot.machine.rows
    assert clone.borrows_frames and clone.state.current.snapshot.machine.rows is rows
    vm.write_memory(0x1000, b"change")
    assert vm.state.current.snapshot.machine.rows is rows, "what is lent does not make the origin copy"
    clone.write_memory(0x1000, b"mine")
    assert not clone.borrows_frames and clone.state.current.snapshot.machine.rows is not rows
    assert vm.read_memory(0x1000, 6) == b"change" and clone.read_memory(0x1000, 6) == b"minein"


def test_what_one_does_the_other_does_not_see() -> None:
    vm = filled()
    clone = vm.clone("")
    then = picture(vm)[1]
    for word in range(40):
        set_map(vm, 5, word)
        vm.write_memory(0x1000, bytes([word]) * 8)
        vm.access(AccessRequest(0x2000, on_violation="grant"))
        assert_sound(vm)
    assert picture(clone)[1] == then
    now = picture(vm)[1]
    for word in range(40, 80):
        set_map(clone, 5, word)
        clone.write_memory(0x3000, bytes([word]) * 8)
        clone.unprotect("text") if word == 50 else None
        assert_sound(clone)
    assert picture(vm)[1] == now and maps(vm, 5) == [39] and maps(clone, 5) == [79]
    assert [item.name for item in vm.protections()] == ["text"] and not clone.protections()


def test_a_clone_outlives_its_origin() -> None:
    vm = filled()
    then = picture(vm)[1]
    clone, gone = vm.clone(""), weakref.ref(vm)
    del vm
    gc.collect()
    assert gone() is None and picture(clone)[1] == then
    clone.protect("more", [ProtectedObject("o", 0x8000, 128)])
    assert_sound(clone)


def test_rows_that_a_clone_shows_wait_for_it_and_then_come_back() -> None:
    vm = filled()
    clone = vm.clone("")
    then = picture(clone)[1]
    total = len(vm.state.current.snapshot.machine.rows)

    def churn() -> None:
        for word in range(200):
            set_map(vm, 5, word)
            vm.write_memory(0x1000, bytes([word]) * 8)

    churn()
    waiting = sum(len(rows) for _, rows in vm.state.store._waiting)
    assert 0 < waiting <= clone.frames_in_use, "only what the clone shows waits, however much is changed"
    assert len(vm.state.current.snapshot.machine.rows) == total, "and the origin does not grow for it"
    assert picture(clone)[1] == then
    clone.write_memory(0x1000, b"mine")
    gc.collect()
    churn()
    assert not vm.state.store._waiting and not vm.state.store._loans
    spare, m = vm.state.store.spare, vm.state.current.snapshot.machine
    retired = sum(len(rows) for _, rows in vm.state.store._retired)
    assert len(spare) + retired + np.count_nonzero(m.row_of >= 0) == len(m.rows), "no row is lost"


def test_clones_of_clones_and_many_of_one() -> None:
    vm = filled()
    first = vm.clone("1")
    second = first.clone("2")
    third = vm.clone("3")
    then = picture(vm)[1]
    set_map(first, 5, 1)
    set_map(vm, 5, 2)
    fourth = first.clone("4")
    set_map(first, 5, 3)
    assert picture(second)[1] == picture(third)[1] == then
    assert [maps(one, 5) for one in (vm, first, second, third, fourth)] == [[2], [3], [0x0F], [0x0F], [1]]
    for one in (vm, first, second, third, fourth):
        set_map(one, 6, 7)
        assert_sound(one)


def test_a_change_of_a_clone_that_is_withdrawn() -> None:
    vm = filled()
    clone = vm.clone("")
    then = picture(clone)[1]
    for word in range(3):
        after = clone.successor()
        set_map(after, 5, word)
        assert [*after.blocks_since(clone)] and len([*after.blocks_since(clone)]) < len(then)
        clone.withdraw(after)
        assert picture(clone)[1] == then and maps(clone, 5) == [0x0F]
        if word == 1:
            clone.own_frames()
            assert not clone.borrows_frames
    set_map(vm, 5, 1)
    set_map(clone, 5, 2)
    assert [maps(vm, 5), maps(clone, 5)] == [[1], [2]]
    assert_sound(clone)


def test_a_change_of_the_origin_that_is_withdrawn_takes_nothing_of_the_clone() -> None:
    vm = filled()
    clone = vm.clone("")
    then = picture(clone)[1]
    set_map(vm, 5, 1)
    after = vm.successor()
    for word in range(20):
        set_map(after, 5, word)
        after.write_memory(0x1000, bytes([word]) * 8)
    vm.withdraw(after)
    for word in range(20):
        set_map(vm, 5, word)
        vm.write_memory(0x1000, bytes([word]) * 8)
        assert_sound(vm)
    assert picture(clone)[1] == then


def test_a_clone_of_a_machine_whose_change_is_under_way_is_as_committed() -> None:
    vm = filled()
    after = vm.successor()
    set_map(after, 5, 1)
    clone = vm.clone("")
    set_map(after, 5, 2)
    set_map(after, 5, 3)
    assert maps(clone, 5) == [0x0F]
    set_map(clone, 5, 4)
    assert [maps(vm, 5), maps(after, 5), maps(clone, 5)] == [[0x0F], [3], [4]]


def test_machines_that_grow_and_places_for_vcpus() -> None:
    config = VmConfig(vcpus=(VcpuConfig(0),), vcpu_room=8)
    vm = VirtualMachine.create(config, [SlotSpec(0, 0, 64 * MIB)], spp=True)
    clone = vm.clone("")
    vm.write_memory(0, bytes(range(256)) * 16 * 4000)
    clone.create_vcpu(5)
    vm.create_vcpu(2)
    assert [vcpu.id for vcpu in vm.config.vcpus] == [0, 2] and [vcpu.id for vcpu in clone.config.vcpus] == [0, 5]
    assert clone.read_memory(0, 16) == bytes(16)
    assert_sound(clone)
    assert_sound(vm)


def test_stale_translations_are_those_of_the_origin() -> None:
    vm = filled(translation_cache="model")
    clone = vm.clone("")
    assert clone.vcpus.tlb(0) == vm.vcpus.tlb(0)
