"""How pages are mapped: leaf sizes, write protection, aging; seen as entries, exits and memory in use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.arch import ept as bits
from engine.arch import sppt
from engine.cpu import frames
from engine.kvm import mapping, regions, write_protection
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
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
    edit,
    leaf,
    machine,
    new_trail,
    protect,
    replay,
    set_map,
    vector,
)

GIB = 1 << 30
BASE = bits.READ | bits.EXECUTE | bits.ACCESSED | bits.IGNORE_PAT | 6 << 3
LOCKLESS = write_protection.HOST_WRITEABLE | write_protection.MMU_WRITEABLE
WRITABLE = BASE | LOCKLESS | bits.WRITE | bits.DIRTY
ARMED = BASE | LOCKLESS | bits.SPP
SAVED = 1 << 55  # kvm-latest

NO_FLAGS = HostConfig(vmx_capabilities={"ept_vpid_cap": 0x0F01_0633_41C1 & ~bits.CAP_ACCESSED_DIRTY})


def write_protect(vm: VirtualMachine, gfn: int) -> bool:
    changed = []
    edit(vm, lambda m: changed.append(bool(mapping.write_protect(m, np.int64(gfn), new_trail()))))
    return changed[0]


def age(vm: VirtualMachine, gfn: int) -> None:
    edit(vm, lambda m: mapping.age(m, np.int64(gfn), new_trail()))


def raw_leaf(vm: VirtualMachine, gfn: int) -> tuple[int, int]:
    """(level, entry) of the leaf of a page, also of one without rights."""
    m = vm.state.current.snapshot.machine
    found, level, _, _, entry = mapping.find_leaf(m, np.int64(gfn), new_trail())
    assert found
    return int(level), int(entry)


def huge(profile: str, size: int = 2 * MIB, total: int = 8 * MIB, gpa: int = 0, **config: Any) -> VirtualMachine:
    return machine(profile, slots=[SlotSpec(0, gpa, total, host_page_size=size)], **config)


# ---- leaf sizes


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("size", "total", "gpa", "at", "level"),
    [
        (2 * MIB, 8 * MIB, 0, 0x5000, 2),
        (2 * MIB, 8 * MIB, 0, 0x40_3000, 2),
        (2 * MIB, 3 * MIB, 0, 0x20_0000, 1),  # the second region is not whole
        (2 * MIB, 4 * MIB, MIB, 0x10_0000, 1),  # nor is the first
        (2 * MIB, 4 * MIB, MIB, 0x20_0000, 2),
        (GIB, 2 * GIB, 0, GIB + 0x5000, 3),
        (GIB, 2 * GIB, 2 * MIB, 0x20_0000, 2),  # the rest of the first GByte in smaller ones
        (4096, 8 * MIB, 0, 0x5000, 1),
    ],
)
def test_leaf_is_as_large_as_host_page_and_slot_allow(
    profile: str, size: int, total: int, gpa: int, at: int, level: int
) -> None:
    vm = huge(profile, size, total, gpa)
    assert access(vm, at) == ["mapped", "completed"]
    shift = bits.LEVEL_SHIFT[level]
    page = bits.PAGE if level > 1 else 0
    assert raw_leaf(vm, at >> 12) == (level, at >> shift << shift | WRITABLE | page)
    assert access(vm, at ^ 0x1000, READ) == (["completed"] if level > 1 else ["mapped", "completed"])


@pytest.mark.parametrize(("without", "level"), [(bits.CAP_1G, 2), (bits.CAP_1G | bits.CAP_2M, 1)])
def test_processor_without_large_pages_gets_smaller_ones(without: int, level: int) -> None:
    host = HostConfig(vmx_capabilities={"ept_vpid_cap": 0x0F01_0633_41C1 & ~without})
    vm = huge("kvm-2019", GIB, GIB, host=host)
    access(vm, 0x5000)
    assert raw_leaf(vm, 5)[0] == level


def test_read_only_slot_is_mapped_by_a_large_page_without_write() -> None:
    vm = machine("kvm-latest", slots=[SlotSpec(0, 0, 2 * MIB, read_only=True, host_page_size=2 * MIB)])
    assert access(vm, 0x5000, READ) == ["mapped", "completed"]
    assert raw_leaf(vm, 5) == (2, BASE | bits.PAGE)


# ---- protected pages and large leaves


def test_2019_maps_a_large_page_over_protected_ones_and_says_which_writes_got_through() -> None:
    vm = huge("kvm-2019")
    set_map(vm, 5, 0xFFFF_FFFE)
    result = replay(vm, [0x5000, 0x5000, 0x5080, 0x6000, (0x5000, 8, READ)])
    assert (result.violations, result.unenforced_writes) == (0, 2)
    assert result.page_granular_violations == 3
    assert raw_leaf(vm, 5)[0] == 2
    one = vm.access(AccessRequest(0x5000, data=b"12345678"))
    assert (one.allowed, one.lands, one.unenforced) == (True, True, True)
    assert not vm.access(AccessRequest(0x5080)).unenforced
    assert vm.read_memory(0x5000, 8) == b"12345678"
    assert vm.counters()["unenforced_writes"] == 3


def test_2019_set_does_not_see_a_page_in_a_large_leaf() -> None:
    vm = huge("kvm-2019")
    access(vm, 0x5000)
    set_map(vm, 5, 0)
    assert raw_leaf(vm, 5)[0] == 2
    assert replay(vm, [0x5000] * 3).unenforced_writes == 3


@pytest.mark.parametrize("kind", [READ, WRITE, EXECUTE])
def test_later_map_small_pages_where_one_of_the_region_is_protected(kind: int) -> None:
    vm = huge("kvm-latest")
    set_map(vm, 5, 0)
    access(vm, 0x6000, kind)
    assert raw_leaf(vm, 6)[0] == 1
    access(vm, 0x20_0000, kind)
    assert raw_leaf(vm, 512)[0] == 2, "another region"
    assert access(vm, 0x5000)[-1] == "violation"


def test_later_set_splits_a_large_page_and_neighbours_stay_writable() -> None:
    vm = huge("kvm-latest")
    access(vm, 0x5000)
    set_map(vm, 5, 0)
    assert leaf(vm, 5) is None
    result = replay(vm, [gfn << 12 for gfn in range(512)])
    assert (result.violations, result.unenforced_writes) == (1, 0)
    assert raw_leaf(vm, 6) == (1, 0x6000 | WRITABLE)
    set_map(vm, 5, FULL)
    access(vm, 0x5000)
    assert raw_leaf(vm, 5)[0] == 2, "large again when nothing in it is protected"


def test_protected_page_in_a_gbyte_leaves_its_other_regions_2_mbytes() -> None:
    vm = huge("kvm-latest", GIB, 2 * GIB)
    access(vm, GIB)
    set_map(vm, 5, 0)
    assert [(access(vm, gpa), raw_leaf(vm, gpa >> 12)[0])[1] for gpa in (0x6000, 0x20_0000, GIB + 0x5000)] == [1, 2, 3]
    protect(vm, "p", (GIB + 0x30_0000, 1))
    assert leaf(vm, GIB >> 12) is None
    access(vm, GIB)
    assert raw_leaf(vm, GIB >> 12)[0] == 2


def test_counts_of_regions_follow_every_layer() -> None:
    vm = huge("kvm-latest", GIB, 2 * GIB)

    def counts() -> list[int]:
        m = vm.state.current.snapshot.machine
        return [int(regions.word(m, np.int64(gfn), level)) for gfn in (0, 512, 1 << 18) for level in (2, 3)]

    set_map(vm, 0, 0, npages=3)
    set_map(vm, 1, 1)
    assert counts() == [3, 1, 0, 1, 0, 0]
    protect(vm, "p", (0, 0x4000), (0x20_0000, 1))
    assert counts() == [4, 2, 1, 2, 0, 0]
    set_map(vm, 0, FULL, npages=3)
    assert counts() == [4, 2, 1, 2, 0, 0]
    result = vm.access(AccessRequest(0x20_0000, on_violation="grant"))
    assert result.allowed
    assert counts() == [4, 1, 0, 1, 0, 0]
    vm.unprotect("p")
    assert counts() == [0, 0, 0, 0, 0, 0]
    set_map(vm, 3, 0)
    vm.delete_slot(0)
    assert counts() == [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("profile", PROFILES)
def test_large_page_is_served_by_its_small_pages(profile: str) -> None:
    """The fast path knows pages, not leaves: what a page of a large leaf costs once it costs no more."""
    vm = huge(profile)
    rows = [gfn << 12 for gfn in range(64)]
    result = replay(vm, rows * 3)
    assert (result.exits["ept_violation"], result.violations) == (1, 0)
    set_map(vm, 7, 0)
    result = replay(vm, rows * 3)
    assert (result.violations, result.unenforced_writes) == ((0, 3) if profile == "kvm-2019" else (3, 0))


def test_large_page_that_goes_during_a_replay_is_forgotten_with_all_its_pages() -> None:
    """A grant drops the mapping of its page; in a large leaf that is every page of it."""
    vm = huge("kvm-latest", host=HostConfig(nested=False))
    protect(vm, "p", (0x20_0000, 1))
    result = replay(vm, [0, 0x1000, 0x20_0000, 0x20_1000, 0x20_0000, 0x1000], on_violation="grant")
    assert result.violations == 1
    assert raw_leaf(vm, 512)[0] == 2, "its region is protected no more"
    assert result.exits["ept_violation"] == 1 + 2 + 1


# ---- write protection and aging


def test_2019_write_protection_leaves_an_armed_page_alone() -> None:
    """Writes that the map allows go on unseen: a dirty log misses them (kvm-spp 5)."""
    vm = machine()
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    access(vm, 0x6000)
    armed = leaf(vm, 5)
    assert (write_protect(vm, 5), write_protect(vm, 6), write_protect(vm, 7)) == (False, True, False)
    assert leaf(vm, 5) == armed
    assert leaf(vm, 6) == 0x6000 | WRITABLE & ~bits.WRITE
    assert access(vm, 0x5000) == ["completed"]
    assert access(vm, 0x6000) == ["write-restored", "completed"]


def test_2019_set_full_makes_a_write_protected_page_writable() -> None:
    vm = machine()
    access(vm, 0x5000)
    write_protect(vm, 5)
    set_map(vm, 5, FULL)
    assert access(vm, 0x5000) == ["completed"]


def test_later_write_protection_puts_bit_61_aside_and_the_next_write_brings_it_back() -> None:
    vm = machine("kvm-latest")
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    assert write_protect(vm, 5)
    assert leaf(vm, 5) == 0x5000 | ARMED & ~bits.SPP | SAVED | bits.DIRTY
    assert not write_protect(vm, 5)
    assert access(vm, 0x5000, READ) == ["completed"]
    assert access(vm, 0x5200) == ["write-restored", "violation"]
    assert leaf(vm, 5) == 0x5000 | ARMED | bits.DIRTY
    write_protect(vm, 5)
    assert access(vm, 0x5000) == ["write-restored", "completed"], "no loop, and no exit to user space"
    assert vm.counters()["faults_restored"] == 2


def test_later_restored_page_is_not_dirty_until_the_write_lands() -> None:
    vm = machine("kvm-latest")
    set_map(vm, 5, 0xF)
    access(vm, 0x5000, READ)
    write_protect(vm, 5)
    assert access(vm, 0x5200) == ["write-restored", "sppt-filled", "violation"]
    assert leaf(vm, 5) == 0x5000 | ARMED
    assert access(vm, 0x5000) == ["completed"]
    assert leaf(vm, 5) == 0x5000 | ARMED | bits.DIRTY


@pytest.mark.parametrize("profile", PROFILES)
def test_write_protected_large_leaf_is_made_anew_by_a_write(profile: str) -> None:
    vm = huge(profile)
    access(vm, 0x5000)
    assert write_protect(vm, 7)
    assert raw_leaf(vm, 5) == (2, WRITABLE & ~bits.WRITE | bits.PAGE)
    assert access(vm, 0x5000) == ["mapped", "completed"]


@pytest.mark.parametrize("profile", PROFILES)
def test_age_clears_the_accessed_flag(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    age(vm, 5)
    age(vm, 6)
    assert leaf(vm, 5) == 0x5000 | (ARMED | bits.DIRTY) & ~bits.ACCESSED
    assert access(vm, 0x5000) == ["completed"]
    assert leaf(vm, 5) == 0x5000 | ARMED | bits.DIRTY


@pytest.mark.parametrize(
    ("profile", "shift", "armed"), [("kvm-2019", 52, bits.SPP), ("kvm-latest", 54, SAVED)], ids=PROFILES
)
def test_age_without_accessed_flags_takes_all_rights(profile: str, shift: int, armed: int) -> None:
    vm = machine(profile, host=NO_FLAGS)
    set_map(vm, 5, 0xF)
    for gpa in (0x5000, 0x6000):
        access(vm, gpa)
        age(vm, gpa >> 12)
        age(vm, gpa >> 12)
    saved = (BASE | LOCKLESS) & ~(bits.READ | bits.EXECUTE) | (bits.READ | bits.EXECUTE) << shift
    assert raw_leaf(vm, 5)[1] & ~bits.DIRTY == 0x5000 | saved | armed
    assert raw_leaf(vm, 6)[1] & ~bits.DIRTY == 0x6000 | saved
    assert access(vm, 0x6000) == ["write-restored", "completed"]
    assert access(vm, 0x5000, READ) == ["write-restored", "completed"], "read and execute come back"
    assert access(vm, 0x5000, EXECUTE) == ["completed"]


def test_2019_takes_any_write_to_an_aged_armed_page_for_a_violation() -> None:
    """A false exit (found in review of patch 7): the map allows the write, and it is lost."""
    vm = machine(host=NO_FLAGS)
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    age(vm, 5)
    result = vm.access(AccessRequest(0x5000))
    assert (result.resolution, result.exits.column("denied").tolist()) == ("violation", [0])
    assert result.run is not None and result.run.name == "KVM_EXIT_SPP"
    assert access(vm, 0x5000) == ["violation"], "until something reads the page"
    access(vm, 0x5000, READ)
    assert access(vm, 0x5000) == ["completed"]


def test_later_write_to_an_aged_armed_page_is_restored_and_tried_again() -> None:
    vm = machine("kvm-latest", host=NO_FLAGS)
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    age(vm, 5)
    assert access(vm, 0x5000) == ["write-restored", "completed"]
    age(vm, 5)
    assert access(vm, 0x5200) == ["write-restored", "violation"]
    age(vm, 5)
    assert access(vm, 0x5000, READ) == ["write-restored", "completed"]
    assert raw_leaf(vm, 5)[1] & (SAVED | bits.SPP) == SAVED, "bit 61 is for the next write"
    assert access(vm, 0x5000) == ["write-restored", "completed"]


@pytest.mark.parametrize("mask", [0xF, FULL])
def test_2019_set_on_an_aged_page_gives_no_write_without_read(mask: int) -> None:
    vm = machine(host=NO_FLAGS)
    set_map(vm, 5, 0xFF)
    access(vm, 0x5000)
    age(vm, 5)
    set_map(vm, 5, mask)
    assert raw_leaf(vm, 5)[1] & bits.RIGHTS == 0
    assert access(vm, 0x5000, READ) == ["write-restored", "completed"]
    assert access(vm, 0x5000)[-1] == "completed"


def test_aged_large_leaf_gets_its_rights_back() -> None:
    vm = huge("kvm-latest", host=NO_FLAGS)
    access(vm, 0x5000)
    age(vm, 5)
    assert access(vm, 0x7000, READ) == ["write-restored", "completed"]
    assert raw_leaf(vm, 5)[0] == 2
    assert access(vm, 0x7000) == ["mapped", "completed"]
    vm.delete_slot(0)
    assert vm.counters()["frames_ept"] == 1


def test_aged_leaf_goes_with_its_slot() -> None:
    vm = huge("kvm-latest", host=NO_FLAGS)
    access(vm, 0x5000)
    age(vm, 5)
    vm.delete_slot(0)
    vm.set_slot(SlotSpec(0, 0, MIB))
    assert access(vm, 0x5000, READ) == ["mapped", "completed"]


# ---- what is not needed goes back


@pytest.mark.parametrize("profile", PROFILES)
def test_frames_of_tables_return_when_nothing_is_protected_or_mapped(profile: str) -> None:
    vm = machine(profile, slots=[], maxphyaddr=52)
    before = vm.counters()
    for round_ in range(3):
        vm.set_slot(SlotSpec(1, 1 << 40, 8 * MIB, host_page_size=(1 << 12, 1 << 21, 1 << 12)[round_]))
        protect(vm, "p", ((1 << 40) + 0x1000, 0x3000), ((1 << 40) + 0x20_0000, 8))
        set_map(vm, (1 << 28) + 3, 0xF)
        replay(vm, [(1 << 40) + (gfn << 12) for gfn in range(1024)], on_violation=("skip", "grant", "allow")[round_])
        vm.write_memory(1 << 40, b"x")
        vm.unprotect("p")
        vm.delete_slot(1)
        after = vm.counters()
        for kind in ("ept", "sppt", "layer", "memory"):
            assert after[f"frames_{kind}"] == before[f"frames_{kind}"], kind
        assert after["memory_bytes"] == before["memory_bytes"]


def test_leaf_over_a_table_frees_it() -> None:
    """The host collapses small pages: a leaf takes the place of the table."""
    vm = huge("kvm-2019", GIB, GIB)

    def split(m: frames.Machine) -> None:
        regions.mark(m, np.int64(0), 2, np.int64(regions.SPLIT))
        regions.mark(m, np.int64(0), 3, np.int64(regions.SPLIT))

    def whole(m: frames.Machine) -> None:
        regions.mark(m, np.int64(0), 2, np.int64(0))
        regions.mark(m, np.int64(0), 3, np.int64(0))

    edit(vm, split)
    access(vm, 0x5000)
    access(vm, 0x20_0000)
    assert [raw_leaf(vm, gfn)[0] for gfn in (5, 512)] == [1, 2]
    assert vm.counters()["frames_ept"] == 4
    edit(vm, whole)
    assert access(vm, 0x6000) == ["mapped", "completed"]
    assert raw_leaf(vm, 5)[0] == 3
    assert vm.counters()["frames_ept"] == 2


# ---- one SPPT, or one a vCPU


@pytest.mark.parametrize(("profile", "distinct"), [("kvm-2019", 3), ("kvm-latest", 1)])
def test_trees(profile: str, distinct: int) -> None:
    vm = machine(profile, vcpus=(0, 1, 7))
    pointers = {vm.vcpus.vmcs(vcpu)["sppt_pointer"] for vcpu in (0, 1, 7)}
    assert len(pointers) == distinct
    set_map(vm, 5, 0xF)
    assert [vm.access(AccessRequest(0x5000, vcpu=vcpu)).allowed for vcpu in (0, 1, 7)] == [True] * 3
    assert vm.counters()["exits_spp_miss"] == (0 if profile == "kvm-2019" else 1)
    assert [vector(vm, 5, tree) for tree in range(distinct)] == [0x55] * distinct
    set_map(vm, 5, 0)
    result = replay(vm, [(0x5000, 8, WRITE, vcpu) for vcpu in (0, 1, 7)] * 2)
    assert result.violations == 6
    set_map(vm, 5, FULL)
    assert vm.counters()["frames_sppt"] == distinct, "roots"


def test_raw_vector_of_the_first_tree_does_not_decide_for_other_vcpus() -> None:
    vm = machine(vcpus=(0, 1))
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    vm.tables.set_sppt_entry(1, 0x5000, sppt.VECTOR_ALL)
    result = replay(vm, [(0x5200, 8, WRITE, vcpu) for vcpu in (1, 0, 1, 0)])
    assert (result.violations, result.unenforced_writes) == (2, 2)
