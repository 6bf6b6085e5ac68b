"""vCPUs that come one by one: room for them costs nothing, and what their siblings were given they have, too."""

from __future__ import annotations

import json

import pytest

from engine.arch import controls as ctl
from engine.arch.access import WRITE
from engine.cpu import frames
from engine.errors import InvalidValue
from engine.kvm import sppt_roots
from engine.kvm import state_frame as reg
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.machine.fastpath_choice import fast_path_serves
from engine.state.config import HostConfig, VcpuConfig
from engine.state.frame_store import Draft
from engine.state.profiles import kvm_version
from tests.engine.builders import (
    MIB,
    PROFILES,
    access,
    assert_sound,
    edit,
    machine,
    protect,
    replay,
    round_trip,
    store_word,
    vector,
)

HYPERV = HostConfig(nested=False, hyperv={})


@pytest.mark.parametrize("profile", PROFILES)
def test_room_costs_nothing(profile: str) -> None:
    host = HostConfig(nested=False)
    small, roomy = (machine(profile, vcpus=(), vcpu_room=room, host=host) for room in (1, 1024))
    assert roomy.frames_in_use == small.frames_in_use
    assert roomy.counters()["memory_bytes"] == small.counters()["memory_bytes"]
    assert roomy.state.store.begin(roomy.state.current.slots.table).machine.queues.shape[0] == 1
    assert len(roomy.head_json()) - len(small.head_json()) < 16


@pytest.mark.parametrize("profile", PROFILES)
def test_as_many_as_the_kernel_says(profile: str) -> None:
    """An idle vCPU takes one frame and some characters of the head, whoever made it."""
    most = kvm_version(profile).limits.vcpus
    vm = machine(profile, spp=False, vcpus=(), vcpu_room=most)
    before, told = vm.frames_in_use, len(vm.head_json())
    for vcpu in range(most):
        vm.create_vcpu(vcpu)
    assert vm.frames_in_use - before == most - 1, "the first record is always there"
    assert (len(vm.head_json()) - told) / most < 32
    with pytest.raises(InvalidValue) as caught:
        vm.create_vcpu(most)
    assert caught.value.errno == "EINVAL"
    back = round_trip(vm)
    assert back.config == vm.config and back.nested.vcpu(most - 1) == vm.nested.vcpu(most - 1)
    assert back.nested.vcpu(most - 1).vp_index == most - 1
    assert back.vcpus.vmcs(most - 1)["cr0"] == 0x6000_0010
    assert replay(back, [(0x1000, 8, WRITE, most - 1)]).records == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_one_that_comes_late_has_what_its_siblings_have(profile: str) -> None:
    vm = machine(profile, vcpus=(), vcpu_room=5, host=HostConfig(nested=False))
    vm.create_vcpu(0)
    protect(vm, "text", (0x3000, 256), (0x20_0000, 128))
    vm.dirty.track("page", "pml")
    for vcpu in (1, 7):
        vm.create_vcpu(vcpu)
        assert_sound(vm)
    m = vm.state.current.snapshot.machine
    own = kvm_version(profile).subpages.sppt_per_vcpu
    pointers = [vm.vcpus.vmcs(vcpu)["sppt_pointer"] for vcpu in (0, 1, 7)]
    assert 0 not in pointers and len(set(pointers)) == (3 if own else 1)
    assert int(sppt_roots.trees(m)) == (3 if own else 1)
    logs = [vm.vcpus.vmcs(vcpu)["pml_address"] for vcpu in (0, 1, 7)]
    assert 0 not in logs and len(set(logs)) == 3
    for vcpu in (0, 1, 7):
        assert access(vm, 0x3000, vcpu=vcpu)[-1] == "violation"
        assert "violation" not in access(vm, 0x3100, vcpu=vcpu)
    assert_sound(round_trip(vm))


def test_a_tree_that_comes_late_says_the_same() -> None:
    vm = machine("kvm-2019", vcpus=(), vcpu_room=2)
    protect(vm, "text", (0x3000, 256))
    vm.create_vcpu(0)
    assert access(vm, 0x3000)[-1] == "violation"
    vm.create_vcpu(1)
    assert vector(vm, 3) is not None and vector(vm, 3, tree=1) == vector(vm, 3)


def test_an_own_tree_is_one_that_the_fast_path_knows() -> None:
    vm = machine("kvm-2019", vcpus=(), vcpu_room=9)
    for vcpu in range(3):
        vm.create_vcpu(vcpu)
    protect(vm, "text", (0x3000, 256))
    vm.create_vcpu(3)
    assert fast_path_serves(vm.config, vm.state.current.snapshot.machine)
    vm.unprotect("text")
    assert_sound(vm)


@pytest.mark.parametrize("profile", PROFILES)
def test_one_on_hyperv_has_the_pages_of_its_cpu(profile: str) -> None:
    vm = machine(profile, spp=False, vcpus=(), vcpu_room=3, host=HYPERV)
    for vcpu in (0, 1):
        vm.create_vcpu(vcpu)
    m = vm.state.current.snapshot.machine
    pages = [int(frames.read_word(m, 1 + at, word)) for at in (0, 1) for word in (ctl.V_HV_EVMCS, ctl.V_HV_ASSIST)]
    assert 0 not in pages and len(set(pages)) == 4
    assert "violation" not in access(vm, 0x3000, vcpu=1)


def of_format_1(vm: VirtualMachine, vcpus: int) -> VirtualMachine:
    """A machine as a release of before stored it: a record for each vCPU that there is room for, and ``vcpus`` made."""
    head = json.loads(vm.head_json())
    head["format"] = 1
    room = len(vm.config.vcpus)
    kept = [{"id": item.id, "vp_index": None, "cpuid": []} for item in vm.config.vcpus[:vcpus]]
    head["config"] |= {"vcpus": kept, "vcpu_room": room}
    return VirtualMachine.restore(head, {(array, block): data for array, block, data in vm.changed_blocks()})


@pytest.mark.parametrize("profile", PROFILES)
def test_a_machine_that_was_stored_with_all_its_records(profile: str) -> None:
    whole = machine(profile, vcpus=range(6), host=HostConfig(nested=False))
    protect(whole, "text", (0x3000, 256))
    old = of_format_1(whole, 2)
    assert [item.id for item in old.config.vcpus] == [0, 1] and not old.config.vcpus[1].reset
    assert_sound(old)
    trees = old.state.current.snapshot.machine
    assert frames.records(trees) == 6
    for vcpu in (9, 3):
        old.create_vcpu(vcpu)
        assert old.vcpus.vmcs(vcpu)["cr0"] == 0x6000_0010
        assert access(old, 0x3000, vcpu=vcpu)[-1] == "violation"
    assert_sound(round_trip(old))
    assert round_trip(old).config.vcpus[2:] == (VcpuConfig(9, 2, reset=True), VcpuConfig(3, reset=True))


def test_places_are_not_given_away() -> None:
    """However a machine grows and shrinks, no table and no page lands where a vCPU is to come."""
    vm = machine("kvm-latest", spp=False, vcpus=(), vcpu_room=1024)
    vm.write_memory(0, bytes([1]) * MIB)
    back = round_trip(vm)
    for gfn in range(256, 512):
        back.write_memory(gfn << 12, b"x")
    m = back.state.current.snapshot.machine
    assert (m.row_of[2:1025] == -1).all() and (m.kind[2:1025] == frames.FREE).all()
    for vcpu in range(20):
        back.create_vcpu(vcpu)
    assert_sound(back)
    change = Draft(back.state.store, back.state.current.slots.table)
    assert int(frames.read_word(change.machine, frames.STATE_FRAME, reg.ROOT_EPT)) > 1024


def with_few_spare_rows(vm: VirtualMachine, few: int) -> None:
    """Write pages of memory until that many rows are spare, or the machine would grow."""
    page = 0
    while vm.state.current.snapshot.machine.top[frames.TOP_SPARE] >= few:
        store_word(vm, page << 12, 1)
        page += 1


def test_logs_of_a_thousand_vcpus_have_a_frame_each() -> None:
    """Each takes two rows, of which there may be few: it asks for them first."""
    vm = machine("kvm-latest", slots=[SlotSpec(0, 0, 64 * MIB)], vcpus=range(1024), host=HostConfig(nested=False))
    with_few_spare_rows(vm, 1700)
    vm.dirty.track("page", "pml")
    assert_sound(vm)


def test_a_tree_whose_entries_lead_in_circles_is_copied_once() -> None:
    vm = machine("kvm-2019", vcpus=(), vcpu_room=3, host=HostConfig(nested=False))
    vm.create_vcpu(0)

    def lead_back(m: frames.Machine) -> None:
        root = int(sppt_roots.root_frame(m, 0))
        m.rows[frames.own(m, root), 8:64] = int(frames.address_of(m, root)) | 1

    edit(vm, lead_back)
    before = vm.frames_in_use
    vm.create_vcpu(1)
    assert vm.frames_in_use - before < 8
