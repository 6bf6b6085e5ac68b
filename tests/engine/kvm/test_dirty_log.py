"""Dirty tracking seen from inside: leaves, vectors, exits, frames, and what a change of mind does to them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.cpu import frames, host_physical_memory, radix
from engine.kvm import dirty_harvest, dirty_marking
from engine.kvm import state_frame as reg
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine, state
from tests.engine.builders import (
    FULL,
    MIB,
    PAGE,
    PROFILES,
    READ,
    bare_draft,
    leaf,
    machine,
    picture,
    protect,
    replay,
    resolutions,
    round_trip,
    set_map,
    spread,
    totals,
    unchanged,
    vector,
)

LOGGED = [SlotSpec(0, 0, 4 * MIB, log_dirty=True)]


def written(vm: VirtualMachine) -> dict[int, int]:
    found = vm.dirty.pages()
    return dict(zip(found.gfns.tolist(), found.maps.tolist(), strict=True))


def harvest(vm: VirtualMachine) -> dict[int, int]:
    taken = vm.dirty.harvest()
    vm.dirty.acknowledge(taken.harvest)
    return dict(zip(taken.gfns.tolist(), taken.maps.tolist(), strict=True))


# ---- sparse trees


def test_next_leaf_passes_over_what_is_not_there() -> None:
    m = bare_draft().machine
    end = 1 << 40
    assert radix.next_leaf(m, reg.ROOT_WRITTEN, 0, end) == end
    for gfn in (5, 700, 1 << 20, (1 << 39) + 511):
        radix.write(m, reg.ROOT_WRITTEN, gfn, np.int64(1))
    found, at = [], 0
    while (at := int(radix.next_leaf(m, reg.ROOT_WRITTEN, at, end))) < end:
        found.append(at)
        at = (at | 511) + 1
    assert found == [0, 512, 1 << 20, 1 << 39]
    assert radix.next_leaf(m, reg.ROOT_WRITTEN, 3, end) == 3
    assert radix.next_leaf(m, reg.ROOT_WRITTEN, 1024, 1 << 20) == 1 << 20


def test_a_huge_guest_costs_what_it_writes() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 42)], maxphyaddr=46)
    vm.dirty.track("subpage")
    replay(vm, [5 * PAGE, (1 << 41) + 128])
    assert harvest(vm) == {5: 1, 1 << 29: 2}
    assert vm.counters()["frames_layer"] == 0


# ---- what the hardware may write by itself


@pytest.mark.parametrize("profile", PROFILES)
def test_allowed_and_already_dirty(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 2, 0x0F)
    vm.dirty.track("subpage")
    for gpa, mask in ((2 * PAGE, 0x1), (2 * PAGE + 256, 0x5), (2 * PAGE + 3 * 128, 0xD)):
        replay(vm, [gpa])
        assert vector(vm, 2) == spread(mask)
        assert leaf(vm, 2) & bits.SPP and not leaf(vm, 2) & bits.WRITE
    replay(vm, [3 * PAGE + 128 * s for s in range(31)])
    assert leaf(vm, 3) & bits.SPP and vector(vm, 3) == spread(FULL >> 1)
    replay(vm, [3 * PAGE + 128 * 31])
    assert leaf(vm, 3) & bits.WRITE and not leaf(vm, 3) & bits.SPP
    assert harvest(vm) == {2: 0xD, 3: FULL}
    assert vector(vm, 2) == 0 and not leaf(vm, 3) & bits.WRITE


@pytest.mark.parametrize("profile", PROFILES)
def test_exits_of_a_clean_sub_page(profile: str) -> None:
    vm = machine(profile)
    replay(vm, [(2 * PAGE, 8, READ)])
    vm.dirty.track("subpage")
    first = resolutions(replay(vm, [2 * PAGE], include="all"))
    assert first[-1] == "dirty-logged" and set(first) <= {"dirty-logged", "sppt-filled"}
    assert replay(vm, [2 * PAGE, 2 * PAGE + 8], include="all").exits["ept_violation"] == 0
    assert resolutions(replay(vm, [2 * PAGE + 128], include="all")) == ["dirty-logged"]
    assert vm.counters()["dirty_faults"] == 2


def test_a_refusal_names_what_the_policy_refuses() -> None:
    vm = machine()
    set_map(vm, 2, 0xFFFF_FFFE)
    vm.dirty.track("subpage")
    result = replay(vm, [(2 * PAGE + 100, 200)], include="violations")
    assert result.exit_columns.column("denied").tolist() == [1]
    assert written(vm) == {}


@pytest.mark.parametrize("profile", PROFILES)
def test_what_the_host_wrote_is_not_open_to_the_guest(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 2, 0x1)
    vm.dirty.track("subpage")
    vm.write_memory(2 * PAGE + 128, b"host")
    assert written(vm) == {2: 0x2}
    assert replay(vm, [2 * PAGE, 2 * PAGE + 128, 2 * PAGE, 2 * PAGE + 128]).violations == 2
    assert written(vm) == {2: 0x3} and vector(vm, 2) == spread(0x1)


@pytest.mark.parametrize("profile", PROFILES)
def test_without_tracking_nothing_is_left_of_it(profile: str) -> None:
    plain, tracked = machine(profile), machine(profile)
    for vm in (plain, tracked):
        protect(vm, "p", (5 * PAGE, 300))
    tracked.dirty.track("subpage")
    replay(tracked, [2 * PAGE, 5 * PAGE, 5 * PAGE + 1024])
    harvest(tracked)
    tracked.dirty.track("page", "pml")
    replay(tracked, [9 * PAGE])
    tracked.dirty.track("off")
    tracked.host_memory.event("zap")
    tracked.host_memory.event("shrink")
    plain.host_memory.event("zap")
    rows = [2 * PAGE, 5 * PAGE, 5 * PAGE + 1024, 9 * PAGE, 2 * PAGE]
    assert resolutions(replay(plain, rows, include="all")) == resolutions(replay(tracked, rows, include="all"))
    assert leaf(plain, 2) == leaf(tracked, 2) and leaf(plain, 5) == leaf(tracked, 5)
    assert vector(plain, 5) == vector(tracked, 5)
    kinds = ("frames_layer", "frames_client", "frames_sppt", "frames_ept")
    assert [plain.counters()[name] for name in kinds] == [tracked.counters()[name] for name in kinds]


# ---- KVM's log


def test_the_saved_bit_waits_for_the_log() -> None:
    vm = machine("kvm-latest", slots=LOGGED)
    set_map(vm, 2, 0x1)
    replay(vm, [(2 * PAGE, 8, READ)])
    assert not leaf(vm, 2) & bits.SPP
    exits = resolutions(replay(vm, [2 * PAGE], include="all"))
    assert exits[0] == "write-restored"
    assert leaf(vm, 2) & bits.SPP
    assert int.from_bytes(vm.dirty.take_log(0), "little") == 1 << 2
    assert not leaf(vm, 2) & bits.SPP and not leaf(vm, 2) & bits.WRITE


def test_the_first_series_leaves_an_armed_leaf_alone() -> None:
    vm = machine("kvm-2019", slots=LOGGED)
    set_map(vm, 2, 0x1)
    assert resolutions(replay(vm, [2 * PAGE], include="all")) == ["armed"]
    assert not any(vm.dirty.take_log(0))


@pytest.mark.parametrize("gfn", [0, 63, 64, 1000])
def test_bits_of_a_slot_count_from_its_first_page(gfn: int) -> None:
    vm = machine(slots=[SlotSpec(0, gfn * PAGE, 130 * PAGE, log_dirty=True)])
    replay(vm, [(gfn + n) * PAGE for n in (0, 1, 64, 129)])
    log = vm.dirty.take_log(0)
    assert len(log) == 24
    assert int.from_bytes(log, "little") == 1 | 1 << 1 | 1 << 64 | 1 << 129


# ---- the processor's log


def test_a_dirty_flag_begins_at_0_and_pages_are_logged_once() -> None:
    vm = machine(slots=LOGGED)
    replay(vm, [2 * PAGE])
    vm.dirty.take_log(0)
    vm.dirty.track("off", "pml")
    assert not leaf(vm, 2) & bits.DIRTY and leaf(vm, 2) & bits.WRITE
    replay(vm, [2 * PAGE, 2 * PAGE])
    assert leaf(vm, 2) & bits.DIRTY
    vm.dirty.take_log(0)
    assert not leaf(vm, 2) & bits.DIRTY
    vm.dirty.track("off")
    assert vm.counters()["frames_client"] == 0


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("level", ["page", "subpage"])
def test_logs_of_several_vcpus_are_exact_by_the_fast_path(
    profile: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each vCPU has a log of its own, some of them full soon; without the fast path everything comes to the same."""
    rng = np.random.default_rng(5)
    vcpus = (0, 3, 700)
    rows = [
        (int(rng.integers(24)) * PAGE + int(rng.integers(500)) * 8, 8, int(rng.integers(2)), int(rng.choice(vcpus)))
        for _ in range(240)
    ]

    def run() -> tuple[object, ...]:
        vm = machine(profile, vcpus=vcpus)
        set_map(vm, 3, 0xFF0F)
        vm.dirty.track(level, "pml")
        for vcpu in vcpus:
            vm.vcpus.set_vmcs(vcpu, {"pml_index": 4})
        found: list[object] = []
        for part in (rows[:120], rows[120:]):
            found += [totals(replay(vm, part)), vm.counters(), picture(vm), harvest(vm)]
        return tuple(found)

    with machine(profile, vcpus=vcpus).state.change() as change:
        assert change.machine.caps[frames.CAP_FAST_PATH]
    fast = run()
    monkeypatch.setattr(state, "fast_path_serves", lambda *_: False)
    assert run() == fast
    assert fast[0]["exits"]["ept_violation"] and fast[1]["exits_pml_full"]  # type: ignore[index]


@pytest.mark.parametrize("profile", PROFILES)
def test_logs_of_several_vcpus_leave_the_fast_path_on(profile: str) -> None:
    vm = machine(profile, vcpus=(0, 3))
    vm.dirty.track("page", "pml")
    with vm.state.change() as change:
        assert change.machine.caps[frames.CAP_FAST_PATH]
    vm.vcpus.set_vmcs(3, {"secondary_controls": vm.vcpus.vmcs(3)["secondary_controls"] & ~int(ctl.SECONDARY_PML)})
    with vm.state.change() as change:
        assert not change.machine.caps[frames.CAP_FAST_PATH]


def test_a_log_that_frames_do_not_suffice_for_is_emptied_in_part() -> None:
    slots = tuple(SlotSpec(n, n << 30, 4 * PAGE) for n in range(40))
    vm = machine(slots=slots)
    vm.dirty.track("page", "pml")
    with vm.state.change() as draft:
        m = draft.machine
        frame = int(frames.FIRST_VCPU_FRAME)
        table = int(frames.read_word(m, frame, ctl.V_PML_ADDRESS))
        for position in range(512):
            host_physical_memory.write_entry(m, table, position, np.int64((position % 40) << 30))
        frames.write_word(m, frame, ctl.V_PML_INDEX, np.int64(0xFFFF))
        dirty_harvest.empty_buffer(m, 0, np.int64(1 << 40))
        assert frames.read_word(m, frame, ctl.V_PML_INDEX) == 0
        assert dirty_marking.written(m, 0) == FULL and dirty_marking.written(m, 1 << 18) == 0
        dirty_harvest.empty_buffer(m, 0, np.int64(0))
        assert frames.read_word(m, frame, ctl.V_PML_INDEX) == 511
    assert sorted(written(vm)) == [n << 18 for n in range(40)]


# ---- larger pages, durability, limits


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("how", ["track", "flag"])
def test_tracked_pages_are_small(profile: str, how: str) -> None:
    large = SlotSpec(0, 0, 4 * MIB, host_page_size=2 * MIB)
    vm = machine(profile, slots=[large])
    replay(vm, [2 * PAGE])
    assert leaf(vm, 2) & bits.PAGE
    if how == "track":
        vm.dirty.track("page")
    else:
        vm.set_slot(SlotSpec(0, 0, 4 * MIB, host_page_size=2 * MIB, log_dirty=True))
    assert leaf(vm, 2) is None
    replay(vm, [2 * PAGE, 700 * PAGE])
    assert not leaf(vm, 2) & bits.PAGE
    assert set(written(vm)) == {2, 700}


@pytest.mark.parametrize("profile", PROFILES)
def test_all_of_it_is_durable(profile: str) -> None:
    vm = machine(profile, slots=LOGGED, vcpus=(0, 3))
    vm.dirty.track("subpage", "pml")
    replay(vm, [2 * PAGE, (3 * PAGE, 8, 1, 3)])
    held = vm.dirty.harvest()
    replay(vm, [4 * PAGE + 128])
    back = round_trip(vm)
    assert back.dirty.tracking() == vm.dirty.tracking()
    again = back.dirty.harvest()
    assert (again.harvest, again.gfns.tolist(), again.maps.tolist()) == (1, held.gfns.tolist(), held.maps.tolist())
    assert written(back) == written(vm) == {2: 0, 3: 0, 4: 2}
    assert back.dirty.take_log(0) == vm.dirty.take_log(0)
    assert json.loads(picture(back)[0])["slots"][0][6] is True


def test_reads_change_nothing() -> None:
    vm = machine(slots=LOGGED)
    vm.dirty.track("page", "pml")
    replay(vm, [2 * PAGE])
    with unchanged(vm):
        vm.dirty.pages()
        vm.dirty.tracking()
        vm.dirty.outstanding()
    vm.dirty.harvest()
    with unchanged(vm):
        vm.dirty.harvest()
