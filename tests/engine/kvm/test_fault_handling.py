"""What KVM does about an exit: map, arm, fill, restore, report. Seen as exits, entries and vectors of a machine."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exits as arch_exits
from engine.cpu import frames, host_physical_memory
from engine.kvm import exit_handling, mapping, sppt_tables, write_protection
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
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
    exits,
    leaf,
    machine,
    maps,
    new_trail,
    protect,
    replay,
    resolutions,
    set_map,
    spread,
    store_leaf,
    vector,
)

BASE = bits.READ | bits.EXECUTE | bits.ACCESSED | bits.IGNORE_PAT | 6 << 3
SOFTWARE = write_protection.HOST_WRITEABLE | write_protection.MMU_WRITEABLE
WRITABLE = BASE | SOFTWARE | bits.WRITE | bits.DIRTY
ARMED = BASE | SOFTWARE | bits.SPP
FULL_VECTOR = 0x5555_5555_5555_5555


# ---- first touch


@pytest.mark.parametrize("kind", [READ, WRITE, EXECUTE])
def test_first_touch_maps_a_full_page_writable(kind: int) -> None:
    vm = machine()
    assert leaf(vm, 5) is None
    assert access(vm, 0x5000, kind) == ["mapped", "completed"]
    assert leaf(vm, 5) == 0x5000 | WRITABLE
    assert access(vm, 0x5000, kind) == ["completed"]


@pytest.mark.parametrize("kind", [READ, EXECUTE])
@pytest.mark.parametrize(("profile", "filled"), [("kvm-2019", spread(0xF)), ("kvm-latest", None)])
def test_first_touch_arms_a_page_whose_map_is_not_full(profile: str, filled: int | None, kind: int) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    assert leaf(vm, 5) is None, "SET waits for the first touch"
    assert access(vm, 0x5000, kind) == ["armed", "completed"]
    assert leaf(vm, 5) == 0x5000 | ARMED
    assert vector(vm, 5) == filled


FIRST_WRITE = [
    ("kvm-2019", 0x5000, ["armed", "completed"]),
    ("kvm-2019", 0x5200, ["armed", "violation"]),
    ("kvm-latest", 0x5000, ["armed", "sppt-filled", "completed"]),
    ("kvm-latest", 0x5200, ["armed", "sppt-filled", "violation"]),
]


@pytest.mark.parametrize(("profile", "gpa", "steps"), FIRST_WRITE)
def test_first_write_to_a_protected_page(profile: str, gpa: int, steps: list[str]) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    assert access(vm, gpa) == steps
    assert access(vm, gpa) == steps[-1:], "only the first write costs more"


def test_read_only_slot_is_mapped_without_write_and_never_armed() -> None:
    vm = machine(slots=[SlotSpec(0, 0, MIB, read_only=True)])
    set_map(vm, 5, 0xF)
    assert access(vm, 0x5000, READ) == ["mapped", "completed"]
    assert leaf(vm, 5) == 0x5000 | BASE
    assert access(vm, 0x5000) == ["mmio"], "a permitted sub-page does not override a read-only slot"
    assert access(vm, 0x6000) == ["mmio"]
    assert leaf(vm, 6) is None


@pytest.mark.parametrize("kind", [READ, WRITE, EXECUTE])
def test_page_without_a_slot_is_mmio(kind: int) -> None:
    vm = machine()
    assert access(vm, 1 << 30, kind) == ["mmio"]
    assert leaf(vm, 1 << 18) is None


def test_violation_goes_by_bit_61_alone() -> None:
    """As in the patch series: the bitmap is not looked at again."""
    vm = machine()
    set_map(vm, 5, 0xFFFF_FFFE)
    access(vm, 0x5080)

    def spoil(m: frames.Machine) -> None:
        sppt_tables.fill_vectors(m, np.int64(5), np.int64(0))

    edit(vm, spoil)
    assert access(vm, 0x5080) == ["violation"]
    assert maps(vm, 5) == [0xFFFF_FFFE]


def test_plain_write_protection_of_kvm_is_taken_back() -> None:
    vm = machine()
    access(vm, 0x5000)
    store_leaf(vm, 5, lambda entry: entry & ~(bits.WRITE | bits.DIRTY))
    assert access(vm, 0x5000) == ["write-restored", "completed"]
    assert leaf(vm, 5) == 0x5000 | WRITABLE
    assert vm.counters()["faults_restored"] == 1


def test_leaf_that_lost_a_right_is_made_anew() -> None:
    vm = machine()
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    store_leaf(vm, 5, lambda entry: entry & ~bits.EXECUTE)
    assert access(vm, 0x5000, EXECUTE) == ["armed", "completed"]
    assert leaf(vm, 5) == 0x5000 | ARMED
    assert access(vm, 0x5200) == ["violation"]


def put_upper_entry(vm: VirtualMachine, level: int, entry: int) -> None:
    """Replace the EPT entry of a level that page 5 is translated by."""

    def write(m: frames.Machine) -> None:
        trail = new_trail()
        mapping.find_leaf(m, 5, trail)
        row = trail[4 - level]
        assert row[0] == level
        host_physical_memory.write_entry(m, row[1], row[2], np.int64(entry))

    edit(vm, write)


def test_larger_page_in_the_way_makes_room_for_a_table() -> None:
    vm = machine()
    access(vm, 0x5000)
    put_upper_entry(vm, 2, BASE | bits.PAGE)
    assert access(vm, 0x5000, READ) == ["completed"]
    set_map(vm, 5, 0)
    assert leaf(vm, 5) == BASE | bits.PAGE, "the first series does not see it"
    assert access(vm, 0x5000) == ["armed", "violation"]
    assert leaf(vm, 5) == 0x5000 | ARMED
    assert vm.counters()["faults_split"] == 1


def test_path_that_leaves_table_memory_fails_kvm_run() -> None:
    vm = machine()
    access(vm, 0x5000)
    put_upper_entry(vm, 3, bits.RIGHTS | 0x7000)
    before = vm.counters()["frames_ept"]
    result = vm.access(AccessRequest(0x5000))
    assert result.resolution == "run-failed" and result.run is not None and result.run.errno == "EINVAL"
    assert vm.counters()["frames_ept"] == before


# Write and execute without read: with bits 62, 63 and 11, a mark of MMIO in the one series, the other, or none.
MARK = bits.WRITE | bits.EXECUTE
SPECIAL, SUPPRESS_VE, PRESENT = 1 << 62, bits.SUPPRESS_VE, 1 << 11


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", [READ, WRITE, EXECUTE])
@pytest.mark.parametrize("leaf_of", [bits.WRITE, 0x5037 | 1 << 51, 0x5037 | 1 << 51 | PRESENT, MARK | PRESENT, 0x501F])
def test_misconfigured_entry_fails_kvm_run(profile: str, kind: int, leaf_of: int) -> None:
    """Second reading 1: EINVAL in both series; what 7.1 would try for ever (bit 11 clear) is no exception here."""
    vm = machine(profile, maxphyaddr=40)
    access(vm, 0x5000)
    store_leaf(vm, 5, lambda entry: leaf_of)
    result = vm.access(AccessRequest(0x5000, access=kind))
    assert (result.resolution, result.exits.column("reason").tolist()) == ("run-failed", [49])
    assert result.run is not None
    assert (result.run.errno, result.run.hw_exit_reason, result.run.rip_advanced) == ("EINVAL", None, False)
    assert vm.counters()["exits_ept_misconfiguration"] == 1
    assert (vm.counters()["mmio"], vm.counters()["violations"]) == (0, 0)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("entry", "marks"),
    [
        (MARK, ("kvm-latest",)),
        (MARK | SPECIAL, ("kvm-2019", "kvm-latest")),
        (MARK | SUPPRESS_VE, ()),
        (MARK | SUPPRESS_VE | SPECIAL, ("kvm-2019",)),
        (MARK | PRESENT | SPECIAL, ("kvm-2019",)),
        (MARK | 0x5000, ("kvm-latest",)),
        (bits.WRITE | SPECIAL, ()),
    ],
)
def test_entry_that_marks_mmio_goes_to_user_space(profile: str, level: int, entry: int, marks: tuple[str, ...]) -> None:
    vm = machine(profile)
    access(vm, 0x5000)
    vm.tables.set_ept_entry(level, 0x5000, entry & (1 << 64) - 1)
    result = vm.access(AccessRequest(0x5000))
    assert result.resolution == ("mmio" if profile in marks else "run-failed")
    assert result.run is not None and result.run.errno == (None if profile in marks else "EINVAL")
    assert (vm.counters()["mmio"], vm.counters()["exits_ept_misconfiguration"]) == (profile in marks, 1)


@pytest.mark.parametrize(
    ("profile", "ending", "told"),
    [
        ("kvm-2019", "internal-error", (17, "KVM_EXIT_INTERNAL_ERROR", None, None)),
        ("kvm-latest", "mmio", (6, "KVM_EXIT_MMIO", None, None)),
    ],
)
def test_misconfiguration_while_an_event_is_delivered(
    profile: str, ending: str, told: tuple[int, str, int | None, str | None]
) -> None:
    """5.3 does not look at the entry; 7.1 would try for ever, and does here what it does otherwise."""
    vm = machine(profile)
    access(vm, 0x5000)
    store_leaf(vm, 5, lambda entry: MARK | SPECIAL)
    result = vm.access(AccessRequest(0x5000, circumstances=acc.DELIVERY))
    assert result.resolution == ending and result.run is not None
    assert (result.run.exit_reason, result.run.name, result.run.hw_exit_reason, result.run.errno) == told


def test_misconfigured_vector_is_an_internal_error() -> None:
    vm = machine()
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)

    def spoil(m: frames.Machine) -> None:
        host_physical_memory.write_entry(m, sppt_tables.vector_table(m, 0, 5 << 12), 5, np.int64(2))

    edit(vm, spoil)
    assert access(vm, 0x5000) == ["internal-error"]
    assert vm.counters()["exits_spp_misconfiguration"] == 1
    assert access(vm, 0x5000, READ) == ["completed"]


def test_table_that_no_handler_can_mend_ends_in_an_internal_error() -> None:
    """The vCPU walks an SPPT that KVM does not fill: hardware would miss for ever."""
    vm = machine()
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)

    def elsewhere(m: frames.Machine) -> None:
        table = frames.new_frame(m, frames.CLIENT)
        frames.write_word(m, frames.FIRST_VCPU_FRAME, ctl.V_SPPTP, frames.address_of(m, table))

    edit(vm, elsewhere)
    result = vm.access(AccessRequest(0x5000))
    assert result.resolution == "internal-error"
    assert len(result.exits) == 64 and set(resolutions(result)[:-1]) == {"sppt-filled"}


def test_address_wider_than_the_walk_maps_nothing_in_its_place() -> None:
    """A guest of 52 bits on a processor with four levels: the upper slot cannot be reached, the lower one is safe."""
    host = HostConfig(vmx_capabilities={"ept_vpid_cap": 0x0F01_0633_41C1 & ~bits.CAP_WALK_5})
    vm = machine(host=host, maxphyaddr=52, slots=[SlotSpec(0, 0, MIB), SlotSpec(1, 1 << 48, MIB)])
    set_map(vm, 0, 0)
    assert access(vm, 0) == ["armed", "violation"]
    assert access(vm, 1 << 48) == ["internal-error"]
    assert access(vm, 0) == ["violation"]


def test_five_levels_reach_it() -> None:
    vm = machine(maxphyaddr=52, slots=[SlotSpec(0, 0, MIB), SlotSpec(1, 1 << 48, MIB)])
    set_map(vm, 1 << 36, 0)
    assert access(vm, 1 << 48) == ["armed", "violation"]
    assert access(vm, 0) == ["mapped", "completed"]


@pytest.mark.parametrize(("profile", "ending"), [("kvm-2019", "run-failed"), ("kvm-latest", "mmio")])
def test_miss_of_a_page_without_a_slot(profile: str, ending: str) -> None:
    """Only a leaf that a client made can get there: KVM_RUN fails with EFAULT in 2019, later the page is left out."""
    vm = machine(profile)
    access(vm, 0x5000)
    set_map(vm, 6, 0)
    access(vm, 0x6000)
    for level in (3, 2):
        vm.tables.set_ept_entry(level, 1 << 32, frame_entry(vm))
    vm.tables.set_ept_entry(1, 1 << 32, ARMED | 1 << 32)
    result = vm.access(AccessRequest(1 << 32))
    assert result.resolution == ending
    assert result.run is not None
    if profile == "kvm-2019":
        assert (result.run.errno, result.run.name, result.run.hw_exit_reason) == ("EFAULT", "KVM_EXIT_UNKNOWN", None)
    else:
        assert resolutions(result) == ["sppt-filled", "mmio"]


def frame_entry(vm: VirtualMachine) -> int:
    """An entry that leads to a new table."""
    return vm.tables.new_frame() | bits.RIGHTS


EXIT_KINDS = [
    (arch_exits.EPT_VIOLATION, 0x182, reg.EPT_VIOLATION),
    (arch_exits.EPT_VIOLATION, arch_exits.Q_SPP_MISS, reg.EPT_VIOLATION),
    (arch_exits.EPT_MISCONFIGURATION, 0, reg.EPT_MISCONFIGURATION),
    (arch_exits.PML_FULL, 0, reg.PML_FULL),
    (arch_exits.SPP_EVENT, arch_exits.Q_SPP_MISS, reg.SPP_MISS),
    (arch_exits.SPP_EVENT, 0, reg.SPP_MISCONFIGURATION),
]


@pytest.mark.parametrize(("reason", "qualification", "counter"), EXIT_KINDS)
def test_exits_are_counted_by_kind(reason: int, qualification: int, counter: int) -> None:
    tally = np.zeros(len(reg.COUNTERS), dtype=np.int64)
    exit_handling.count_exit(tally, reason, qualification)
    assert np.flatnonzero(tally).tolist() == [counter]


def test_full_log_is_emptied_and_the_access_goes_on() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5000))
    store_leaf(vm, 5, lambda entry: entry & ~bits.DIRTY)

    def log(m: frames.Machine) -> None:
        table = frames.address_of(m, frames.new_frame(m, frames.CLIENT))
        secondary = frames.read_word(m, frames.FIRST_VCPU_FRAME, ctl.V_SECONDARY) | ctl.SECONDARY_PML
        for word, value in ((ctl.V_PML_ADDRESS, table), (ctl.V_SECONDARY, secondary), (ctl.V_PML_INDEX, 0xFFFF)):
            frames.write_word(m, frames.FIRST_VCPU_FRAME, word, np.int64(value))

    edit(vm, log)
    assert resolutions(vm.access(AccessRequest(0x5000))) == ["log-emptied"]
    m = vm.state.current.snapshot.machine
    assert frames.read_word(m, frames.FIRST_VCPU_FRAME, ctl.V_PML_INDEX) == 510
    table = frames.read_word(m, frames.FIRST_VCPU_FRAME, ctl.V_PML_ADDRESS)
    assert host_physical_memory.read_entry(m, table, 511) == 0x5000


# ---- SET on a page that is mapped


def test_2019_set_arms_and_disarms_a_mapped_page() -> None:
    vm = machine()
    access(vm, 0x5000)
    set_map(vm, 5, 0xF)
    assert leaf(vm, 5) == 0x5000 | ARMED | bits.DIRTY, "dirty stays"
    assert vector(vm, 5) == spread(0xF)
    set_map(vm, 5, FULL)
    assert leaf(vm, 5) == 0x5000 | WRITABLE
    assert access(vm, 0x5200) == ["completed"]


def test_later_set_drops_the_mapping_and_the_next_access_makes_it() -> None:
    vm = machine("kvm-latest")
    access(vm, 0x5000)
    set_map(vm, 5, 0xF)
    assert (leaf(vm, 5), vector(vm, 5)) == (None, None)
    assert access(vm, 0x5000, READ) == ["armed", "completed"]
    assert leaf(vm, 5) == 0x5000 | ARMED
    set_map(vm, 5, FULL)
    assert leaf(vm, 5) is None
    assert access(vm, 0x5200) == ["mapped", "completed"]
    assert leaf(vm, 5) == 0x5000 | WRITABLE


def test_vector_stays_behind_when_a_page_becomes_full() -> None:
    vm = machine()
    set_map(vm, 5, 0xF, npages=2)
    access(vm, 0x5000)
    set_map(vm, 5, FULL)
    assert vector(vm, 5) == spread(0xF), "nothing reads it"
    set_map(vm, 6, FULL)
    assert vector(vm, 5) is None, "no page of the region is protected: its table is free"
    set_map(vm, 5, 0xF0)
    assert vector(vm, 5) == spread(0xF0)


def test_later_series_fill_the_whole_region_at_one_miss() -> None:
    vm = machine("kvm-latest")
    set_map(vm, 0, 0xF, npages=512)
    set_map(vm, 600, 0xF)
    result = replay(vm, [page << 12 for page in range(512)])
    assert (result.violations, result.exits["spp_miss"], result.exits["ept_violation"]) == (0, 1, 512)
    assert vector(vm, 511) == spread(0xF)
    assert replay(vm, [600 << 12]).exits["spp_miss"] == 1, "another region"


def test_2019_series_fill_one_page_at_a_time() -> None:
    vm = machine()
    set_map(vm, 0, 0xF, npages=2)
    assert replay(vm, [0]).exits["spp_miss"] == 0
    assert vector(vm, 0) == spread(0xF)
    assert vector(vm, 1) == 0, "not touched yet"


def test_2019_miss_fills_the_page_that_missed() -> None:
    vm = machine()
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)

    def invalidate(m: frames.Machine) -> None:
        mapping.invalidate_region(m, 5)
        mapping.invalidate_region(m, 5)
        mapping.invalidate_region(m, 1 << 30)

    edit(vm, invalidate)
    assert vector(vm, 5) is None
    assert access(vm, 0x5000) == ["sppt-filled", "completed"]
    assert vector(vm, 5) == spread(0xF)


def test_region_without_a_protected_page_becomes_valid_too() -> None:
    """Or the guest would miss for ever: a page that was armed by hand, in a region with full maps."""
    vm = machine("kvm-latest")
    access(vm, 0x5000)
    store_leaf(vm, 5, lambda entry: entry & ~bits.WRITE | bits.SPP)
    assert access(vm, 0x5000) == ["sppt-filled", "completed"]
    assert vector(vm, 5) == FULL_VECTOR


def test_set_makes_the_region_miss_again_whatever_is_mapped() -> None:
    vm = machine("kvm-latest")
    set_map(vm, 1, 0xF, npages=2)
    assert access(vm, 0x1000) == ["armed", "sppt-filled", "completed"]
    set_map(vm, 2, 0xF0)
    assert vector(vm, 1) is None
    assert access(vm, 0x1000) == ["sppt-filled", "completed"]
    assert vector(vm, 2) == spread(0xF0)


STALE = [
    ("stricter", 0xFFFF_FFFE, 0x0, 0x2080, ["armed", "sppt-filled", "violation"]),
    ("laxer", 0x0, 0xFFFF_FFFE, 0x2080, ["armed", "sppt-filled", "completed"]),
    ("new", FULL, 0x2, 0x2080, ["armed", "sppt-filled", "completed"]),
    ("gone", 0x0, FULL, 0x2080, ["mapped", "completed"]),
]


@pytest.mark.parametrize(("before", "after", "gpa", "steps"), [row[1:] for row in STALE], ids=[r[0] for r in STALE])
def test_untouched_page_of_a_filled_region_follows_a_later_set(
    before: int, after: int, gpa: int, steps: list[str]
) -> None:
    vm = machine("kvm-latest")
    set_map(vm, 1, 0)
    set_map(vm, 2, before)
    access(vm, 0x1000)
    set_map(vm, 2, after)
    assert access(vm, gpa) == steps


@pytest.mark.parametrize("profile", ["kvm-2019", "kvm-latest"])
def test_protection_bites_in_a_slot_that_comes_back_to_a_filled_region(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, 0x4000), SlotSpec(1, 0x4000, 0x4000)])
    set_map(vm, 1, 0)
    protect(vm, "p", (0x5000, 0x80))
    vm.delete_slot(1)
    access(vm, 0x1000)  # fills the region while page 5 has no slot
    vm.set_slot(SlotSpec(1, 0x4000, 0x4000))
    assert access(vm, 0x5000)[-1] == "violation"
    assert access(vm, 0x5080)[-1] == "completed"


@pytest.mark.parametrize("profile", ["kvm-2019", "kvm-latest"])
def test_map_that_moved_into_a_filled_region_counts(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, 0x4000), SlotSpec(1, 8 * MIB, 0x4000)])
    set_map(vm, 1, 0)
    access(vm, 0x1000)
    set_map(vm, (8 * MIB >> 12) + 1, 0xFFFF_FFFE)
    vm.set_slot(SlotSpec(1, 0x4000, 0x4000))
    assert maps(vm, 5) == [0xFFFF_FFFE]
    assert access(vm, 0x5080)[-1] == "completed"
    assert access(vm, 0x5000)[-1] == "violation"


# ---- mapping by name


def test_unmapped_page_keeps_map_and_vector() -> None:
    vm = machine()
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)

    def unmap(m: frames.Machine) -> None:
        mapping.unmap_page(m, 5, new_trail())
        mapping.unmap_page(m, 6, new_trail())

    edit(vm, unmap)
    assert leaf(vm, 5) is None
    assert (maps(vm, 5), vector(vm, 5)) == ([0xF], spread(0xF))
    assert access(vm, 0x5200) == ["armed", "violation"], "still denied after a swap-out"


def test_neighbours_share_tables() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 32)])
    access(vm, 0)
    frames_before = vm.counters()["frames_ept"]
    access(vm, 511 << 12)
    assert vm.counters()["frames_ept"] == frames_before == 4
    access(vm, 512 << 12)
    assert vm.counters()["frames_ept"] == 5
    access(vm, 1 << 30)
    assert vm.counters()["frames_ept"] == 7


def test_exits_carry_what_the_processor_reported() -> None:
    vm = machine("kvm-latest")
    set_map(vm, 5, 0xF)
    result = replay(vm, [0x5200], include="all")
    assert exits(result, "reason", "qualification", "gpa", "subpages", "denied", "resolution") == [
        (48, 0x182, 0x5200, 1 << 4, 0, res.ARMED),
        (66, 0x800, 0x5200, 1 << 4, 0, res.FILLED),
        (48, 0x1AA, 0x5200, 1 << 4, 1 << 4, res.VIOLATION),
    ]
    assert result.exit_columns.reason_names() == ["EPT violation", "SPP-related event", "EPT violation"]
