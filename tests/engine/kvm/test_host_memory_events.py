"""Host memory events: what they do to leaves and tables, and that what is denied stays denied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.arch import ept as bits
from engine.errors import InvalidValue
from engine.kvm import mapping, write_protection
from engine.kvm.host_memory_events import EVENTS
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.state.config import HostConfig
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    EXECUTE,
    FULL,
    MIB,
    PROFILES,
    READ,
    WRITE,
    access,
    assert_sound,
    exits,
    leaf,
    machine,
    maps,
    new_trail,
    protect,
    refused,
    replay,
    round_trip,
    set_map,
    vector,
)

BASE = bits.READ | bits.EXECUTE | bits.ACCESSED | bits.IGNORE_PAT | 6 << 3
LOCKLESS = write_protection.HOST_WRITEABLE | write_protection.MMU_WRITEABLE
ARMED = BASE | LOCKLESS | bits.SPP
WRITABLE = BASE | LOCKLESS | bits.WRITE | bits.DIRTY
ARENA = 1 << 45
GIB = 1 << 30


def level(vm: VirtualMachine, gfn: int) -> int:
    m = vm.state.current.snapshot.machine
    found, at, _, _, _ = mapping.find_leaf(m, np.int64(gfn), new_trail())
    return int(at) if found else 0


def armed(profile: str, mask: int = 0xF) -> VirtualMachine:
    """A machine whose page 5 is protected and was written."""
    vm = machine(profile)
    set_map(vm, 5, mask)
    access(vm, 0x5000)
    return vm


# ---- one event each


@pytest.mark.parametrize("profile", PROFILES)
def test_unmap_drops_the_leaf_and_keeps_map_and_vector(profile: str) -> None:
    vm = armed(profile)
    done = vm.host_memory.event("unmap", 4, 3)
    assert (done.event, done.gfn, done.npages, done.leaves, done.frames) == ("unmap", 4, 3, 1, 0)
    assert (leaf(vm, 5), vector(vm, 5), maps(vm, 5)) == (None, 0x55, [0xF])
    assert access(vm, 0x5000) == ["armed", "completed"]
    assert access(vm, 0x5200) == ["violation"]


@pytest.mark.parametrize("profile", PROFILES)
def test_migrated_page_is_mapped_at_another_host_frame(profile: str) -> None:
    vm = armed(profile)
    vm.write_memory(0x5000, b"stays")
    vm.host_memory.event("migrate", 5)
    assert leaf(vm, 5) is None
    assert access(vm, 0x5000) == ["armed", "completed"]
    assert leaf(vm, 5) == ARENA - 0x1000 | ARMED | bits.DIRTY
    vm.host_memory.event("migrate", 4, 2)
    access(vm, 0x4000)
    access(vm, 0x5000)
    assert [(leaf(vm, gfn) or 0) & bits.ADDRESS for gfn in (4, 5, 6)] == [ARENA - 0x2000, ARENA - 0x3000, 0]
    assert vm.read_memory(0x5000, 5) == b"stays"
    assert access(vm, 0x5200) == ["violation"]


def test_host_frames_are_not_those_of_guest_memory() -> None:
    vm = machine(maxphyaddr=36, slots=[SlotSpec(0, (1 << 35) - MIB, MIB), SlotSpec(1, 0, MIB)])
    vm.host_memory.event("migrate", 5, 2)
    access(vm, 0x5000)
    assert (leaf(vm, 5) or 0) & bits.ADDRESS == (1 << 35) - MIB - 0x1000


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("mask", [0xF, FULL])
def test_remap_read_only_disarms_the_leaf_and_a_write_gets_a_copy(profile: str, mask: int) -> None:
    """A permitted sub-page does not override the host: the write exits first (the hazard of kvm-spp 5)."""
    vm = armed(profile, mask)
    assert vm.host_memory.event("remap-read-only", 5).leaves == 1
    shared = leaf(vm, 5)
    assert shared is not None
    assert shared & (bits.ADDRESS | bits.WRITE | bits.SPP | LOCKLESS) == ARENA - 0x1000 | write_protection.MMU_WRITEABLE
    assert access(vm, 0x5000, READ) == ["completed"]
    made = "mapped" if mask == FULL else "armed"
    assert access(vm, 0x5000) == [made, "completed"]
    fresh = leaf(vm, 5)
    assert fresh is not None and fresh & bits.ADDRESS == ARENA - 0x2000
    assert fresh & LOCKLESS == LOCKLESS
    assert access(vm, 0x5200) == (["completed"] if mask == FULL else ["violation"])


@pytest.mark.parametrize("profile", PROFILES)
def test_shared_page_is_mapped_read_only_by_a_read_and_armed_by_a_write(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    vm.host_memory.event("remap-read-only", 5)
    assert access(vm, 0x5000, EXECUTE) == ["mapped", "completed"]
    assert leaf(vm, 5) == ARENA - 0x1000 | BASE
    set_map(vm, 5, FULL)
    assert access(vm, 0x5000, READ) == (["completed"] if profile == "kvm-2019" else ["mapped", "completed"])
    assert leaf(vm, 5) == ARENA - 0x1000 | BASE, "nor does SET override the host"
    set_map(vm, 5, 0xF)
    assert access(vm, 0x5200)[-1] == "violation"
    assert leaf(vm, 5) == ARENA - 0x2000 | ARMED


def test_first_write_of_all_to_a_shared_page_copies_it() -> None:
    vm = machine()
    vm.host_memory.event("remap-read-only", 5)
    assert access(vm, 0x5000) == ["mapped", "completed"]
    assert leaf(vm, 5) == ARENA - 0x2000 | WRITABLE


@pytest.mark.parametrize("profile", PROFILES)
def test_remap_writable_drops_the_leaf(profile: str) -> None:
    vm = armed(profile)
    vm.host_memory.event("remap-read-only", 5)
    vm.host_memory.event("remap-writable", 5)
    assert leaf(vm, 5) is None
    assert access(vm, 0x5000, READ) == ["armed", "completed"]
    assert leaf(vm, 5) == ARENA - 0x2000 | ARMED


@pytest.mark.parametrize(("profile", "changed"), [("kvm-2019", 1), ("kvm-latest", 2)])
def test_write_protect(profile: str, changed: int) -> None:
    vm = armed(profile)
    access(vm, 0x6000)
    assert vm.host_memory.event("write-protect", 4, 4).leaves == changed
    assert access(vm, 0x6000) == ["write-restored", "completed"]
    assert access(vm, 0x5000) == (["completed"] if profile == "kvm-2019" else ["write-restored", "completed"])


@pytest.mark.parametrize("profile", PROFILES)
def test_age(profile: str) -> None:
    vm = armed(profile)
    assert vm.host_memory.event("age", 0, 1024).leaves == 1
    assert (leaf(vm, 5) or 0) & bits.ACCESSED == 0
    assert vm.host_memory.event("age", 5).leaves == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_split_and_collapse(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, 2 * GIB, host_page_size=GIB), SlotSpec(1, 4 * GIB, 4 * MIB)])
    access(vm, 0x5000)
    assert level(vm, 5) == 3
    assert vm.host_memory.event("split", 5).leaves == 1
    assert [(access(vm, gpa)[-1], level(vm, gpa >> 12))[1] for gpa in (0x5000, 0x20_0000, GIB)] == [1, 2, 3]
    assert vm.host_memory.event("split", 5).leaves == 0, "small already"
    assert vm.host_memory.event("collapse", 5).leaves == 1
    access(vm, 0x5000)
    assert level(vm, 5) == 2
    small = (4 * GIB >> 12) + 5
    access(vm, small << 12)
    assert level(vm, small) == 1
    vm.host_memory.event("collapse", small)
    access(vm, small << 12)
    assert level(vm, small) == 2, "small pages of a slot, too"


def test_collapse_of_a_region_that_is_not_in_one_slot_does_nothing() -> None:
    vm = machine(slots=[SlotSpec(0, 0, MIB)])
    access(vm, 0x5000)
    assert vm.host_memory.event("collapse", 5).leaves == 0
    assert level(vm, 5) == 1


@pytest.mark.parametrize(("profile", "after"), [("kvm-2019", 2), ("kvm-latest", 1)])
def test_collapse_over_a_protected_page(profile: str, after: int) -> None:
    """In 2019 protection is gone with the small page, and the result says so."""
    vm = armed(profile, 0)
    vm.host_memory.event("collapse", 5)
    result = replay(vm, [0x5000])
    assert level(vm, 5) == after
    assert (result.violations, result.unenforced_writes) == ((0, 1) if after == 2 else (1, 0))
    vm.host_memory.event("split", 5)
    assert replay(vm, [0x5000]).violations == 1, "split, it is armed"


@pytest.mark.parametrize("event", ["migrate", "remap-read-only", "remap-writable"])
def test_page_of_a_large_host_page_is_split_off_first(event: str) -> None:
    vm = machine(slots=[SlotSpec(0, 0, 2 * GIB, host_page_size=GIB)])
    access(vm, 0x5000)
    assert vm.host_memory.event(event, 7).leaves == 1
    access(vm, 0x7000, READ)
    access(vm, 0x6000, READ)
    access(vm, 0x20_0000, READ)
    assert [level(vm, gfn) for gfn in (6, 7, 512)] == [1, 1, 2]
    assert [(leaf(vm, gfn) or 0) & bits.ADDRESS for gfn in (6, 7)] == [0x6000, ARENA - 0x1000]


@pytest.mark.parametrize("profile", PROFILES)
def test_zap_frees_the_ept_and_leaves_vectors(profile: str) -> None:
    vm = armed(profile)
    done = vm.host_memory.event("zap")
    assert (done.gfn, done.npages, done.leaves, done.frames) == (None, None, None, 3)
    assert (vm.counters()["frames_ept"], vector(vm, 5)) == (1, 0x55)
    assert access(vm, 0x5200) == ["armed", "violation"]


@pytest.mark.parametrize(("profile", "steps"), [("kvm-2019", ["armed"]), ("kvm-latest", ["armed", "sppt-filled"])])
@pytest.mark.parametrize("where", [{}, {"gfn": 7}])
def test_shrink_frees_both_and_all_is_made_anew(profile: str, steps: list[str], where: dict[str, int]) -> None:
    vm = machine(profile, vcpus=(0, 1))
    set_map(vm, 5, 0xF, npages=2)
    access(vm, 0x5000)
    access(vm, 0x6000)
    trees = 2 if profile == "kvm-2019" else 1
    assert vm.host_memory.event("shrink", **where).frames == 3 + 3 * trees
    assert (vm.counters()["frames_ept"], vm.counters()["frames_sppt"]) == (1, trees)
    assert access(vm, 0x6000) == [*steps, "completed"]
    assert access(vm, 0x5200, vcpu=1) == ["armed", "violation"]


def test_zap_of_a_range_keeps_tables_that_hold_more() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 8 * MIB)])
    for gpa in (0x5000, 0x6000, 0x20_0000):
        access(vm, gpa)
    assert (vm.host_memory.event("zap", 5).leaves, vm.counters()["frames_ept"]) == (1, 5)
    done = vm.host_memory.event("zap", 0, 1024)
    assert (done.leaves, done.frames, vm.counters()["frames_ept"]) == (2, 4, 1)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_the_host_did_goes_with_the_slot(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, 4 * MIB, host_page_size=2 * MIB)])
    before = vm.counters()["memory_bytes"]
    vm.host_memory.event("remap-read-only", 5, 3)
    vm.host_memory.event("split", 512)
    access(vm, 0x5000, READ)
    vm.delete_slot(0)
    assert vm.counters()["memory_bytes"] == before
    vm.set_slot(SlotSpec(0, 0, 4 * MIB, host_page_size=2 * MIB))
    access(vm, 0x5000, READ)
    assert (level(vm, 5), (leaf(vm, 5) or 0) & bits.ADDRESS) == (2, 0)


REFUSED = [
    ("unknown", ("melt", 5, 1), "event", "melt", "event is one of unmap"),
    ("no page", ("unmap", None, None), "gfn", None, "gfn is the first"),
    ("pages of everything", ("zap", None, 4), "gfn", None, "gfn is the first"),
    ("no pages", ("unmap", 5, 0), "npages", 0, "npages is 1 to 1048576"),
    ("too many", ("unmap", 5, (1 << 20) + 1), "npages", (1 << 20) + 1, "npages is 1 to 1048576"),
    ("hole", ("unmap", 1023, 2), "gfn", 1023, "GFN 0x400 has none"),
    ("negative", ("age", -1, 1), "gfn", -1, "width of 46 bits"),
    ("too wide", ("age", 1 << 34, 1), "gfn", 1 << 34, "width of 46 bits"),
]


@pytest.mark.parametrize(
    ("call", "field", "value", "rule"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_refused_events(call: Any, field: str, value: Any, rule: str) -> None:
    vm = machine()
    with refused(vm, InvalidValue, field, value, rule):
        vm.host_memory.event(*call)


# ---- after any of them

SMALL = SlotSpec(0, 0, 16 << 12)
LARGE = SlotSpec(1, 2 * MIB, 4 * MIB, host_page_size=2 * MIB)
PAGES = (0, 3, 15, 512, 515, 1023, 1024, 1500)
WRITES = [(gfn << 12) + 128 * s for gfn in PAGES for s in (0, 7, 31)]

few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def denied(vm: VirtualMachine) -> tuple[set[int], int]:
    """The writes that are denied, and how many went through though a map refuses them."""
    result = replay(vm, WRITES)
    return {WRITES[index] for (index,) in exits(result, "index")}, result.unenforced_writes


def happen(vm: VirtualMachine, draw: Any) -> None:
    """An event, a write, a read or a fetch."""
    kind = draw(st.integers(0, 13))
    slot = draw(st.sampled_from((SMALL, LARGE)))
    gfn = slot.gfn + draw(st.integers(0, slot.pages - 1))
    if kind < len(EVENTS):
        npages = draw(st.integers(1, min(600, slot.gfn + slot.pages - gfn)))
        vm.host_memory.event(EVENTS[kind], gfn, npages)
    elif kind == 10:
        vm.host_memory.event(draw(st.sampled_from(("zap", "shrink"))))
    else:
        gpa = draw(st.sampled_from(PAGES)) * 4096 + 128 * draw(st.integers(0, 31))
        vm.access(AccessRequest(gpa, access=(READ, WRITE, EXECUTE)[kind - 11]))


@pytest.mark.parametrize("profile", PROFILES)
@few
@given(data=st.data())
def test_events_change_nothing_about_what_is_denied(profile: str, data: st.DataObject) -> None:
    draw = data.draw
    vm = machine(profile, slots=[SMALL, LARGE])
    words = [draw(st.sampled_from((FULL, FULL, 0, 1, 0x7FFF_FFFF))) for _ in PAGES]
    vm.set_subpages([SubpageRange(gfn, 1, word) for gfn, word in zip(PAGES, words, strict=True)])
    protect(vm, "p", (PAGES[1] << 12, 1), (PAGES[3] << 12, 1))
    wanted = {gpa for gpa in WRITES if not maps(vm, gpa >> 12)[0] >> (gpa >> 7 & 31) & 1}
    for _ in range(draw(st.integers(1, 8))):
        happen(vm, draw)
        if draw(st.booleans()):
            check(vm, profile, wanted)
    check(vm, profile, wanted)
    assert_sound(vm)
    check(round_trip(vm), profile, wanted)


def check(vm: VirtualMachine, profile: str, wanted: set[int]) -> None:
    found, unenforced = denied(vm)
    if profile == "kvm-latest":
        assert (found, unenforced) == (wanted, 0)
        return
    assert found <= wanted and len(found) + unenforced == len(wanted)
    large = {gpa for gpa in wanted if level(vm, gpa >> 12) > 1}
    assert found == wanted - large, "large leaves, and nothing else, hide a protected page"


def test_2019_host_without_accessed_flags_loses_permitted_writes_of_aged_pages() -> None:
    """The exception: aging keeps bit 61, and any write to the page is then reported as a violation."""
    host = HostConfig(vmx_capabilities={"ept_vpid_cap": 0x0F01_0633_41C1 & ~bits.CAP_ACCESSED_DIRTY})
    for profile, lost in (("kvm-2019", 1), ("kvm-latest", 0)):
        vm = machine(profile, host=host)
        set_map(vm, 5, 0xF)
        access(vm, 0x5000)
        vm.host_memory.event("age", 5)
        assert replay(vm, [0x5000]).violations == lost


@pytest.mark.parametrize("profile", PROFILES)
def test_rounds_end_with_the_memory_they_began_with(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(9, 1 << 33, MIB)])
    used = []
    for round_ in range(100):
        vm.set_slot(SlotSpec(1, 0, 4 * MIB, host_page_size=(4096, 2 * MIB)[round_ % 2]))
        protect(vm, "p", (0x5000, 0x200), (0x20_0000, 8))
        replay(
            vm, [0x5000, 0x6000, 0x20_0000, (1 << 33), (0x7000, 8, READ)], on_violation=("skip", "grant")[round_ % 2]
        )
        vm.host_memory.event(EVENTS[round_ % len(EVENTS)], 5)
        vm.unprotect("p")
        vm.delete_slot(1)
        vm.host_memory.event("zap")
        used.append(vm.counters()["memory_bytes"])
    assert set(used) == {used[0]}
    assert len(vm.state.current.snapshot.machine.rows) <= 4000, "rows are used again"
