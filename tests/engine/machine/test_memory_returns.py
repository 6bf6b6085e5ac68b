"""What a machine takes it gives back: frames in use by kind, and bytes, are the same after a thousand rounds."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from tests.engine.builders import MIB, PAGE, PROFILES, machine, protect, replay, set_map

ROUNDS = 400


def in_use(vm: VirtualMachine) -> dict[str, int]:
    """Frames by kind, and bytes."""
    return {name: n for name, n in vm.counters().items() if name.startswith("frames_") or name == "memory_bytes"}


@pytest.mark.jit
@pytest.mark.parametrize("profile", PROFILES)
def test_protections_and_slots_within_a_machine(profile: str) -> None:
    vm = machine(profile, slots=[])
    before = in_use(vm)
    high_water = []
    for number in range(ROUNDS):
        gpa = (number % 7) * 8 * MIB
        vm.set_slot(SlotSpec(1, gpa, 4 * MIB, log_dirty=number % 2 == 0))
        vm.dirty.track(("off", "page", "subpage")[number % 3], ("write-protect", "pml")[number % 2])
        protect(vm, "held", (gpa + 2 * MIB - 200, 1000))
        set_map(vm, gpa >> 12, 0x0F, npages=3)
        found = replay(vm, [gpa, gpa + 1024, gpa + 2 * MIB - 100, gpa + 3 * MIB], on_violation="allow")
        assert found.violations == 2
        if number % 3:
            vm.dirty.acknowledge(vm.dirty.harvest().harvest)
        vm.unprotect("held")
        vm.delete_slot(1)
        vm.dirty.track("off")
        assert in_use(vm) == before, number
        high_water.append(len(vm.state.current.snapshot.machine.rows))
    assert high_water[10] == high_water[-1], "rows go on growing"


@pytest.mark.jit
@pytest.mark.parametrize("profile", PROFILES)
def test_protections_within_a_machine_that_keeps_its_slot(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, 8 * MIB)])
    replay(vm, [(gfn * PAGE) for gfn in range(0, 2048, 64)])
    before = in_use(vm)
    for number in range(ROUNDS):
        at = (number * 37 % 2000) * PAGE
        protect(vm, "held", (at, 300))
        assert replay(vm, [at, at + 128, at + 2048]).violations == 2
        vm.unprotect("held")
        assert replay(vm, [at]).violations == 0
    mapped = in_use(vm)
    assert {**mapped, "frames_ept": 0, "memory_bytes": 0} == {**before, "frames_ept": 0, "memory_bytes": 0}
    assert mapped["frames_ept"] <= before["frames_ept"] + 4, "page tables of the pages touched, and no more"


@pytest.mark.jit
@pytest.mark.parametrize("profile", PROFILES)
def test_machines_created_and_deleted(profile: str) -> None:
    def round_of(number: int) -> None:
        vm = VirtualMachine.create(VmConfig(profile=profile), [SlotSpec(0, 0, 4 * MIB)], spp=True)
        protect(vm, "held", (number * 128, 300))
        assert replay(vm, [number * 128, number * 128 + 2048]).violations == 1

    for number in range(20):
        round_of(number)
    gc.collect()
    tracemalloc.start()
    try:
        first = None
        for number in range(ROUNDS):
            round_of(number)
            if number == ROUNDS // 2:  # the allocators' free lists fill over the first hundreds of rounds
                gc.collect()
                first, _ = tracemalloc.get_traced_memory()
        gc.collect()
        last, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert first is not None
    assert last - first < 64 * 1024, f"{last - first} bytes were kept by {ROUNDS // 2} machines"
