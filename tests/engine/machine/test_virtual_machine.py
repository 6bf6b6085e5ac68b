"""VirtualMachine: every operation either publishes its whole effect or leaves the machine as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.cpu import explain as explain_module
from engine.cpu.frames import RESERVE
from engine.errors import Busy, Conflict, EngineError, InvalidValue, LimitExceeded, NotEnabled, NotFound
from engine.kvm import bitmaps, page_contents, slot_changes, spp_set
from engine.kvm import protections as protections_module
from engine.kvm.protections import ProtectedObject
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    EXECUTE,
    FULL,
    MIB,
    PROFILES,
    READ,
    WRITE,
    assert_sound,
    chunk,
    edit,
    leaf,
    machine,
    maps,
    picture,
    protect,
    refused,
    replay,
    resolutions,
    round_trip,
    set_map,
    store_leaf,
    unchanged,
)

# ---- creation


@pytest.mark.parametrize("profile", PROFILES)
def test_new_machine(profile: str) -> None:
    vm = VirtualMachine.create(VmConfig(name="first", profile=profile), [SlotSpec(3, 0, MIB), SlotSpec(1, MIB, MIB)])
    assert vm.config.name == "first"
    assert [spec.slot for spec in vm.slots()] == [1, 3]
    assert not vm.spp_active and vm.protections() == ()
    assert set(vm.counters().values()) >= {0, 1} and vm.counters()["records"] == 0


def test_creation_with_slots_that_overlap_makes_nothing() -> None:
    with pytest.raises(InvalidValue, match="must not overlap"):
        VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, MIB), SlotSpec(1, 4096, MIB)])


CONFIGS = [
    ({"profile": "kvm-2020"}, "profile", "kvm-2020", "one of kvm-2019, kvm-latest"),
    ({"translation_cache": "on"}, "translation_cache", "on", "one of off, model"),
    ({"host": HostConfig(vendor="arm")}, "host.vendor", "arm", "one of intel, amd"),
    ({"maxphyaddr": 35}, "maxphyaddr", 35, "36 to 52"),
    ({"maxphyaddr": 53}, "maxphyaddr", 53, "36 to 52"),
    ({"vcpus": ()}, "vcpus", 0, "1 to 1024 vCPUs"),
    ({"vcpus": tuple(VcpuConfig(i) for i in range(1025))}, "vcpus", 1025, "1 to 1024 vCPUs"),
    ({"vcpus": (VcpuConfig(0), VcpuConfig(4096))}, "vcpus[1].id", 4096, "0 to 4095"),
    ({"vcpus": (VcpuConfig(-1),)}, "vcpus[0].id", -1, "0 to 4095"),
    ({"vcpus": (VcpuConfig(2), VcpuConfig(2))}, "vcpus", [2, 2], "distinct"),
    ({"host": HostConfig(vmx_capabilities={"pml": 1})}, "host.vmx_capabilities", "pml", "one of ept_vpid_cap"),
    (
        {"host": HostConfig(vmx_capabilities={"ept_vpid_cap": 1 << 64})},
        "host.vmx_capabilities.ept_vpid_cap",
        1 << 64,
        "64 bits",
    ),
]


@pytest.mark.parametrize(("change", "field", "value", "rule"), CONFIGS, ids=[f"{r[1]}={r[2]!s:.12}" for r in CONFIGS])
def test_machine_that_cannot_be(change: dict[str, Any], field: str, value: Any, rule: str) -> None:
    with pytest.raises(InvalidValue, match=rule) as caught:
        VirtualMachine.create(VmConfig(**change))
    assert (caught.value.field, caught.value.value) == (field, value)


@pytest.mark.parametrize(("width", "walk_5", "levels"), [(36, True, 4), (48, True, 4), (49, True, 5), (52, False, 4)])
def test_depth_of_ept(width: int, walk_5: bool, levels: int) -> None:
    host = HostConfig(vmx_capabilities={} if walk_5 else {"ept_vpid_cap": 0x0F01_0633_4141})
    vm = machine(maxphyaddr=width, host=host)
    assert vm.config.ept_levels == levels
    assert len(vm.walk(0).ept) == 1
    assert vm.access(AccessRequest(0)).allowed
    assert len(vm.walk(0).ept) == levels


# ---- slots


def test_new_slot_joins_the_others() -> None:
    vm = machine()
    spec = SlotSpec(1, 16 * MIB, MIB)
    vm.set_slot(spec)
    assert vm.slots() == (SlotSpec(0, 0, 4 * MIB), spec)
    assert maps(vm, 16 * MIB >> 12) == [FULL]
    before = picture(vm)
    vm.set_slot(spec)
    assert picture(vm) == before, "the same again does nothing"


SLOT_REFUSALS = [
    ("overlap", SlotSpec(1, 2 * MIB, 4 * MIB), "gpa", 2 * MIB, "slot 0, which covers 0x0 to 0x3fffff"),
    ("other size", SlotSpec(0, 0, 2 * MIB), "size", 2 * MIB, "keeps its size"),
    ("other flag", SlotSpec(0, 0, 4 * MIB, read_only=True), "read_only", True, "keeps its read_only flag"),
    ("other host page", SlotSpec(0, 0, 4 * MIB, host_page_size=2 * MIB), "host_page_size", 2 * MIB, "host page size"),
    ("beyond the width", SlotSpec(1, 1 << 46, MIB), "gpa", 1 << 46, "width of 46 bits"),
]


@pytest.mark.parametrize(
    ("spec", "field", "value", "rule"), [row[1:] for row in SLOT_REFUSALS], ids=[row[0] for row in SLOT_REFUSALS]
)
def test_slot_that_is_refused(spec: SlotSpec, field: str, value: Any, rule: str) -> None:
    vm = machine()
    with refused(vm, InvalidValue, field, value, rule):
        vm.set_slot(spec)


def furnished(profile: str = "kvm-2019") -> VirtualMachine:
    """A slot of 4 MiB at 8 MiB with a map, a protection, a grant, contents and mapped pages."""
    vm = machine(profile, slots=[SlotSpec(0, 8 * MIB, 4 * MIB)])
    gfn = 8 * MIB >> 12
    set_map(vm, gfn + 1, 0xFFFF_FF00)
    set_map(vm, gfn + 700, 0)
    protect(vm, "p", ((gfn + 2) << 12, 0x100), ((gfn + 3) << 12, 0x80))
    vm.write_memory((gfn << 12) + 4090, b"over two pages")
    replay(vm, [(gfn + 2) << 12, (gfn + 1) << 12, (gfn + 5) << 12], on_violation="skip")
    replay(vm, [(gfn + 2) << 12], on_violation="grant")
    assert maps(vm, gfn + 2, layer="granted") == [1]
    return vm


@pytest.mark.parametrize("profile", PROFILES)
def test_moved_slot_takes_maps_and_contents_along_and_leaves_protections(profile: str) -> None:
    vm = furnished(profile)
    old, new = 8 * MIB >> 12, 32 * MIB >> 12
    vm.set_slot(SlotSpec(0, 32 * MIB, 4 * MIB))
    assert maps(vm, new, 3, "set") == [FULL, 0xFFFF_FF00, FULL]
    assert maps(vm, new + 700) == [0]
    assert maps(vm, new, 4, "protected") == [0] * 4
    assert maps(vm, new, 4, "granted") == [0] * 4, "a grant ends where no protection is"
    assert vm.read_memory((new << 12) + 4090, 14) == b"over two pages"
    assert leaf(vm, old + 1) is None and leaf(vm, new + 1) is None
    vm.set_slot(SlotSpec(1, 8 * MIB, 4 * MIB))
    assert maps(vm, old, 4) == [FULL, FULL, 0xFFFF_FFFC, 0xFFFF_FFFE], "protections are by address"
    assert vm.read_memory((old << 12) + 4090, 14) == bytes(14)
    assert_sound(vm)
    round_trip(vm)


@pytest.mark.parametrize("shift", [-1, 1, 2, 512])
def test_slot_moved_over_its_own_pages(shift: int) -> None:
    vm = furnished()
    old = 8 * MIB >> 12
    new = old + shift
    vm.set_slot(SlotSpec(0, new << 12, 4 * MIB))
    assert maps(vm, new + 1, layer="set") == [0xFFFF_FF00]
    assert maps(vm, new + 700, layer="set") == [0]
    assert int(np.bitwise_count(~vm.subpages(new, 1024, "set")).sum()) == 8 + 32, "nothing is left where it was"
    assert vm.read_memory((new << 12) + 4090, 14) == b"over two pages"
    if shift > 0:
        vm.set_slot(SlotSpec(1, old << 12, shift << 12))
    kept = {gfn: maps(vm, gfn, layer="protected")[0] for gfn in (old + 2, old + 3)}
    assert kept == {old + 2: 3, old + 3: 1}
    assert_sound(vm)


def test_grant_moves_where_a_protection_covers_its_new_page() -> None:
    vm = furnished()
    old = 8 * MIB >> 12
    vm.set_slot(SlotSpec(0, (old + 1) << 12, 4 * MIB))
    assert maps(vm, old + 3, layer="granted") == [1]


@pytest.mark.parametrize("profile", PROFILES)
def test_deleted_slot_takes_everything_but_protections(profile: str) -> None:
    vm = furnished(profile)
    gfn = 8 * MIB >> 12
    before = vm.counters()
    vm.delete_slot(0)
    assert vm.slots() == ()
    assert vm.counters()["frames_memory"] == 0 < before["frames_memory"]
    assert vm.access(AccessRequest(gfn << 12)).resolution == "mmio"
    vm.set_slot(SlotSpec(5, 8 * MIB, 4 * MIB))
    assert maps(vm, gfn, 4, "set") == [FULL] * 4
    assert maps(vm, gfn, 4, "granted") == [0] * 4
    assert maps(vm, gfn, 4) == [FULL, FULL, 0xFFFF_FFFC, 0xFFFF_FFFE]
    assert vm.read_memory((gfn << 12) + 4090, 14) == bytes(14)
    assert vm.access(AccessRequest((gfn + 2) << 12)).resolution == "violation"


def test_unknown_slot() -> None:
    vm = machine()
    with refused(vm, NotFound, "slot", 7, "must be the number of an existing slot", "ENOENT"):
        vm.delete_slot(7)


def test_large_empty_slot_moves_and_dies_at_once() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 30)])
    set_map(vm, 100_000, 0)
    vm.set_slot(SlotSpec(0, 1 << 33, 1 << 30))
    assert maps(vm, (1 << 21) + 100_000) == [0]
    vm.delete_slot(0)
    assert vm.counters()["frames_memory"] == 0


@pytest.mark.jit
def test_move_of_contents_in_more_regions_than_frames_are_at_hand() -> None:
    """Each region has a node of its own to be copied; rows must not run out half-way."""
    regions = 1000
    vm = machine(slots=[SlotSpec(0, 0, 1 << 40)])
    for i in range(regions):
        vm.write_memory(i << 21, b"%05d" % i)
    page = 0
    while not 640 <= len(vm.state.store.spare) < 700:
        page += 1
        vm.write_memory((1 << 39) + (page << 12), b"filler")
    vm.set_slot(SlotSpec(0, 1 << 41, 1 << 40))
    assert_sound(vm)
    assert all(vm.read_memory((1 << 41) + (i << 21), 5) == b"%05d" % i for i in range(regions))


def test_detaching_stops_where_rows_run_out_and_goes_on_from_there() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 64 * MIB)])
    for region in range(4):
        vm.write_memory(region << 21, b"x")

    def detach(m: Any) -> None:
        moved = np.zeros((4, slot_changes.PAGE_WORDS), dtype=np.int64)
        trail = np.zeros((10, 4), dtype=np.int64)
        assert slot_changes.lift_pages(m, 0, 4 * 512, moved, trail) == 4
        emptied = moved.copy()
        emptied[:, slot_changes.PAGE_CONTENT] = 0
        height = int(m.top[1])
        m.top[1] = RESERVE + 1
        assert slot_changes.store_contents(m, 0, emptied, 0) == 1, "the root and a node of the tree are copied"
        assert slot_changes.place_pages(m, 8192, moved, 0) == 0
        assert slot_changes.drop_pages(m, 0, 4 * 512, 0, trail) == 0
        m.top[1] += height - RESERVE - 1
        assert slot_changes.store_contents(m, 0, emptied, 1) == 4
        assert [int(page_contents.locate(m, region << 9)[0]) for region in range(4)] == [-1] * 4

    edit(vm, detach)


# ---- SET


def test_set_replaces_a_window() -> None:
    vm = machine()
    vm.set_subpages([SubpageRange(2, 3, np.array([1, 2, 3], dtype=np.uint32)), SubpageRange(4, 1, 9)])
    assert maps(vm, 1, 5) == [FULL, 1, 2, 9, FULL]


def test_set_of_more_pages_than_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.machine.subpage_operations.SET_BATCH", 100)
    vm = machine()
    vm.set_subpages([SubpageRange(3, 250, np.arange(250, dtype=np.uint32)), SubpageRange(300, 201, 7)])
    assert maps(vm, 3, 250) == list(range(250))
    assert maps(vm, 299, 203) == [FULL, *([7] * 201), FULL]


SET_REFUSALS = [
    ("33 bits", SubpageRange(1, 1, 1 << 32), "access", 1 << 32, "32 bits"),
    ("negative", SubpageRange(1, 1, -1), "access", -1, "32 bits"),
    ("list too short", SubpageRange(1, 3, np.zeros(2, np.uint32)), "access", 2, "one map for each page"),
    ("list too long", SubpageRange(1, 1, np.zeros(2, np.uint32)), "access", 2, "one map for each page"),
    ("no pages", SubpageRange(1, 0, 0), "npages", 0, "at least 1"),
    ("negative page", SubpageRange(-1, 2, 0), "gfn", -1, "width of 46 bits"),
    ("beyond the width", SubpageRange(1 << 34, 1, 0), "gfn", 1 << 34, "width of 46 bits"),
    ("absurd", SubpageRange(0, 1 << 80, 0), "gfn", 0, "width of 46 bits"),
    ("without a slot", SubpageRange(1023, 2, 0), "gfn", 1023, "GFN 0x400 has none"),
]


@pytest.mark.parametrize(
    ("bad", "field", "value", "rule"), [row[1:] for row in SET_REFUSALS], ids=[row[0] for row in SET_REFUSALS]
)
def test_set_that_is_refused_applies_nothing(bad: SubpageRange, field: str, value: Any, rule: str) -> None:
    vm = machine()
    with refused(vm, InvalidValue, field, value, rule):
        vm.set_subpages([SubpageRange(5, 1, 0), bad])


def test_unknown_layer() -> None:
    vm = machine()
    with refused(vm, InvalidValue, "layer", "all", "layer is one of effective, set, protected, granted"):
        vm.subpages(0, 1, "all")


def test_failure_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = machine()
    kernel = spp_set.set_maps

    def fail_on_second(m: Any, gfn: int, *rest: Any) -> int:
        if gfn == 6:
            raise RuntimeError("power cut")
        return int(kernel(m, gfn, *rest))

    monkeypatch.setattr(spp_set, "set_maps", fail_on_second)
    with unchanged(vm), pytest.raises(RuntimeError, match="power cut"):
        vm.set_subpages([SubpageRange(5, 1, 0), SubpageRange(6, 1, 0)])
    monkeypatch.undo()
    assert maps(vm, 5) == [FULL]


# ---- protections


def test_protection_is_listed_until_it_is_deleted() -> None:
    vm = machine()
    first = vm.protect("first", [ProtectedObject("a", 0x1000, 8), ProtectedObject("b", 0x2FFF, 2)])
    protect(vm, "second", (0x1000, 1))
    assert [p.name for p in vm.protections()] == ["first", "second"]
    assert vm.protection("first") == first
    assert (first.pages, first.subpages) == (3, 3)
    vm.unprotect("first")
    assert [p.name for p in vm.protections()] == ["second"]
    assert maps(vm, 1, 3) == [0xFFFF_FFFE, FULL, FULL]


Objects = list[tuple[str, int, int]]
PROTECT_REFUSALS: list[tuple[str, str, Objects, type[EngineError], str, Any, str]] = [
    ("taken name", "p", [("o", 0, 1)], Conflict, "name", "p", "exists"),
    ("empty name", "", [("o", 0, 1)], InvalidValue, "name", "", "1 to 256 characters"),
    ("long name", "n" * 257, [("o", 0, 1)], InvalidValue, "name", "n" * 257, "1 to 256 characters"),
    ("no objects", "q", [], InvalidValue, "objects", 0, "an object or a range of pages"),
    ("nameless object", "q", [("o", 0, 1), ("", 0, 1)], InvalidValue, "objects[1].name", "", "1 to 256 characters"),
    ("empty object", "q", [("o", 0, 0)], InvalidValue, "objects[0].size", 0, "at least one byte"),
    ("negative address", "q", [("o", -1, 1)], InvalidValue, "objects[0].gpa", -1, "width of 46 bits"),
    ("beyond the width", "q", [("o", (1 << 46) - 1, 2)], InvalidValue, "objects[0].gpa", (1 << 46) - 1, "46 bits"),
    (
        "no slot",
        "q",
        [("o", 0, 1), ("o", 4 * MIB - 1, 2)],
        InvalidValue,
        "objects[1].gpa",
        4 * MIB - 1,
        "GFN 0x400 has none",
    ),
    (
        "too many pages",
        "q",
        [("o", 0, (1 << 32) + 1)],
        LimitExceeded,
        "objects",
        (1 << 20) + 1,
        "at most 1048576 pages",
    ),
]


@pytest.mark.parametrize(
    ("name", "objects", "kind", "field", "value", "rule"),
    [row[1:] for row in PROTECT_REFUSALS],
    ids=[row[0] for row in PROTECT_REFUSALS],
)
def test_protection_that_is_refused(
    name: str, objects: Objects, kind: type[EngineError], field: str, value: Any, rule: str
) -> None:
    vm = machine()
    protect(vm, "p", (0x1000, 1))
    with refused(vm, kind, field, value, rule):
        vm.protect(name, [ProtectedObject(*o) for o in objects])


def test_too_many_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protections_module, "MAX_OBJECTS", 2)
    vm = machine()
    with refused(vm, InvalidValue, "objects", 3, "at most 2 objects"):
        protect(vm, "p", (0, 1), (1, 1), (2, 1))


def test_protection_before_spp_is_enabled() -> None:
    vm = machine(spp=False)
    with refused(vm, NotEnabled, "spp", False, "must be on", "ENODEV"):
        protect(vm, "p", (0, 1))


@pytest.mark.parametrize("operation", [VirtualMachine.protection, VirtualMachine.unprotect])
def test_unknown_protection(operation: Callable[[VirtualMachine, str], Any]) -> None:
    vm = machine()
    with refused(vm, NotFound, "name", "nobody", "must be the name of a protection", "ENOENT"):
        operation(vm, "nobody")


# ---- guest memory


def test_memory_is_zero_until_written_and_sparse() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 40)])
    assert vm.read_memory(1 << 39, 5) == bytes(5)
    vm.write_memory((1 << 39) - 2, b"four")
    vm.write_memory(0, bytes(range(256)) * 48)
    assert vm.read_memory((1 << 39) - 3, 6) == b"\0four\0"
    assert vm.read_memory(100, 12000) == (bytes(range(256)) * 48)[100:12100]
    assert vm.counters()["frames_memory"] == 5


def test_host_writes_ignore_permissions() -> None:
    vm = machine(slots=[SlotSpec(0, 0, MIB, read_only=True)])
    set_map(vm, 0, 0)
    vm.write_memory(0, b"rom")
    assert vm.read_memory(0, 3) == b"rom"


BYTES = [
    ("negative address", -1, 4, "gpa", -1, "not negative"),
    ("no slot", 4 * MIB, 1, "gpa", 4 * MIB, "GFN 0x400 has none"),
    ("over the end", 4 * MIB - 1, 2, "gpa", 4 * MIB - 1, "GFN 0x400 has none"),
    ("beyond the width", 1 << 46, 1, "gpa", 1 << 46, "width of 46 bits"),
]


@pytest.mark.parametrize(("gpa", "size", "field", "value", "rule"), [r[1:] for r in BYTES], ids=[r[0] for r in BYTES])
def test_bytes_outside_memory(gpa: int, size: int, field: str, value: int, rule: str) -> None:
    vm = machine()
    with refused(vm, InvalidValue, field, value, rule):
        vm.read_memory(gpa, size)
    with refused(vm, InvalidValue, field, value, rule):
        vm.write_memory(gpa, bytes(size))


def test_no_bytes_at_all() -> None:
    vm = machine()
    with refused(vm, InvalidValue, "size", 0, "at least one byte"):
        vm.read_memory(0, 0)
    with refused(vm, InvalidValue, "body", 0, "at least one byte"):
        vm.write_memory(0, b"")


# ---- one access

ON_VIOLATION = [
    # on_violation, allowed, lands, resolution, grants
    ("skip", False, False, "violation", 0),
    ("stop", False, False, "violation", 0),
    ("allow", False, True, "violation", 0),
    ("grant", True, True, "violation", 1),
]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("on_violation", "allowed", "lands", "resolution", "grants"), ON_VIOLATION)
def test_violating_write_with_data(
    profile: str, on_violation: str, allowed: bool, lands: bool, resolution: str, grants: int
) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xFFFF_FFFE)
    result = vm.access(AccessRequest(0x5000, 4, data=b"data", on_violation=on_violation))
    assert (result.allowed, result.lands, result.resolution) == (allowed, lands, resolution)
    assert vm.read_memory(0x5000, 4) == (b"data" if lands else bytes(4))
    assert maps(vm, 5) == [FULL if grants else 0xFFFF_FFFE]
    assert vm.counters()["grants"] == grants
    assert vm.counters()["violations"] == 1
    assert result.run is not None and result.run.spp_addr == 0x5000


def test_allowed_write_lands_and_a_read_finds_it() -> None:
    vm = machine()
    written = vm.access(AccessRequest(0x5FFC, 8, data=b"straddle"))
    assert (written.allowed, written.lands, written.resolution, written.run) == (True, True, "completed", None)
    assert resolutions(written) == ["mapped", "mapped"]
    found = vm.access(AccessRequest(0x5FFC, 8, READ))
    assert (found.data, found.allowed, len(found.exits)) == (b"straddle", True, 0)
    assert vm.access(AccessRequest(0x5FFC, 1, EXECUTE)).data is None


def test_write_over_two_pages_lands_whole_or_not_at_all() -> None:
    vm = machine()
    set_map(vm, 6, 0xFFFF_FFFE)
    result = vm.access(AccessRequest(0x5FFC, 8, data=b"straddle"))
    assert not result.lands
    assert vm.read_memory(0x5FFC, 8) == bytes(8)
    assert result.exits.column("gpa").tolist() == [0x5FFC, 0x6000, 0x6000]
    assert vm.access(AccessRequest(0x5FFC, 8, data=b"straddle", on_violation="allow")).lands
    assert vm.read_memory(0x5FFC, 8) == b"straddle"


@pytest.mark.parametrize("on_violation", ["allow", "grant"])
@pytest.mark.parametrize("second", [None, SlotSpec(1, MIB, MIB, read_only=True)], ids=["hole", "read-only"])
def test_permission_for_the_first_page_puts_nothing_where_no_ram_is(on_violation: str, second: SlotSpec | None) -> None:
    vm = machine(slots=[SlotSpec(0, 0, MIB), *([second] if second else [])])
    set_map(vm, 255, 0)
    result = vm.access(AccessRequest(MIB - 4, 8, data=b"straddle", on_violation=on_violation))
    assert (result.allowed, result.lands) == (False, False)
    assert result.resolution == ("mmio" if on_violation == "grant" else "violation")
    assert vm.read_memory(MIB - 4, 4) == bytes(4)
    assert vm.counters()["frames_memory"] == 0
    assert vm.counters()["mmio"] == (on_violation == "grant")


def test_access_without_ram() -> None:
    vm = machine()
    result = vm.access(AccessRequest(1 << 30, 4, data=b"mmio"))
    assert (result.allowed, result.lands, result.resolution) == (False, False, "mmio")
    assert result.run is not None and (result.run.exit_reason, result.run.name) == (6, "KVM_EXIT_MMIO")
    assert vm.access(AccessRequest(1 << 30, 4, READ)).data is None


def test_linear_address_is_passed_on() -> None:
    vm = machine()
    result = vm.access(AccessRequest(0x5000, gva=0xFFFF_8000_0000_5000))
    assert result.exits.column("gva").tolist() == [0xFFFF_8000_0000_5000]
    assert result.exits.has_gva
    assert not vm.access(AccessRequest(0x5000)).exits.has_gva


ACCESS_REFUSALS = [
    ("size 0", {"size": 0}, "size", 0, "1 to 65535 bytes"),
    ("size 65536", {"size": 65536}, "size", 65536, "1 to 65535 bytes"),
    ("access 3", {"access": 3}, "access", 3, "0 read, 1 write or 2 execute"),
    ("negative address", {"gpa": -1}, "gpa", -1, "width of 46 bits"),
    ("beyond the width", {"gpa": (1 << 46) - 4}, "gpa", (1 << 46) - 4, "width of 46 bits"),
    ("linear address", {"gva": 1 << 64}, "gva", 1 << 64, "64 bits"),
    ("unknown vCPU", {"vcpu": 1}, "vcpu", 1, "id of a vCPU of this machine"),
    ("data of a read", {"access": 0, "data": b"12345678"}, "data", "3132333435363738", "only a write has data"),
    ("too little data", {"data": b"1"}, "data", "31", "as many bytes as the access"),
    ("what to do", {"on_violation": "wait"}, "on_violation", "wait", "one of skip, stop, allow, grant, ask"),
]


@pytest.mark.parametrize(
    ("change", "field", "value", "rule"), [row[1:] for row in ACCESS_REFUSALS], ids=[row[0] for row in ACCESS_REFUSALS]
)
def test_access_that_is_refused(change: dict[str, Any], field: str, value: Any, rule: str) -> None:
    vm = machine()
    with refused(vm, InvalidValue, field, value, rule):
        vm.access(AccessRequest(**{"gpa": 0x1000, **change}))


def test_record_that_the_replay_refuses_is_an_invalid_access(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = machine()
    monkeypatch.setattr(AccessRequest, "validate", lambda *_: None)
    with refused(vm, InvalidValue, "vcpu", 9, "must be the id of a vCPU of this machine"):
        vm.access(AccessRequest(0x1000, vcpu=9))


# ---- counters


def test_counters_add_up_over_operations() -> None:
    vm = machine("kvm-latest")
    set_map(vm, 1, 0xF)
    replay(vm, [0x1000, 0x1200, (0x1000, 8, READ), 1 << 30])
    vm.access(AccessRequest(0x1200))
    vm.walk(0x1200)
    counts = vm.counters()
    assert {name: count for name, count in counts.items() if count and not name.startswith(("frames", "memory"))} == {
        "records": 5,
        "writes": 4,
        "violations": 2,
        "page_granular_violations": 3,
        "mmio": 1,
        "exits_ept_violation": 4,
        "exits_spp_miss": 1,
        "faults_armed": 1,
        "sppt_fills": 1,
    }
    assert counts["frames_state"] == counts["frames_vcpu"] == 1
    assert counts["memory_bytes"] == 4096 * sum(n for name, n in counts.items() if name.startswith("frames_"))


# ---- walk


def explained(vm: VirtualMachine, gpa: int, access: int = WRITE, **options: Any) -> tuple[str, str]:
    with unchanged(vm):
        found = vm.walk(gpa, access, **options)
    return found.outcome, found.sentence


def test_walk_says_why() -> None:
    vm = machine("kvm-latest")
    assert explained(vm, 0x5000)[0] == "ept_violation"
    assert explained(vm, 0x5000)[1].startswith("not mapped: PML4E at 0x")
    assert "is not present" in explained(vm, 0x5000)[1]
    vm.access(AccessRequest(0x5000))
    assert explained(vm, 0x5000) == ("allowed", "allowed: every EPT entry used permits write")
    assert explained(vm, 0x5000, READ) == ("allowed", "allowed: every EPT entry used permits read")
    set_map(vm, 5, 0xF)
    assert explained(vm, 0x5000)[0] == "ept_violation", "SET dropped the mapping"
    vm.access(AccessRequest(0x5000, access=READ))
    outcome, sentence = explained(vm, 0x5000)
    assert outcome == "spp_miss" and sentence.startswith("SPP-related event: SPPL4E at 0x")
    assert "= 0x0 is not valid (SPP miss); KVM fills the SPPT" in sentence
    vm.access(AccessRequest(0x5000))
    outcome, sentence = explained(vm, 0x5000)
    assert outcome == "allowed" and sentence.startswith("allowed: every touched sub-page is 1 in SPPL1E at 0x")
    assert sentence.endswith("though EPT write permission is 0")
    outcome, sentence = explained(vm, 0x5200)
    assert outcome == "ept_violation" and sentence.startswith("denied: sub-page 4 of SPPL1E at 0x")
    assert sentence.endswith(" is 0")
    outcome, sentence = explained(vm, 0x51FC, size=256)
    assert sentence.startswith("denied: sub-pages 4, 5 of SPPL1E at 0x") and sentence.endswith(" are 0")


def test_walk_names_the_entry_that_refuses() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5000))
    store_leaf(vm, 5, lambda entry: entry & ~6)
    pte = vm.walk(0x5000).ept[-1]
    place = f"PTE at {pte.table + 8 * pte.index:#x}"
    restored = "; KVM gives back what it took from the entry itself, and the guest tries again"
    assert explained(vm, 0x5000) == ("ept_violation", f"{place} does not permit write{restored}")
    remapped = "; KVM maps the page, and the guest tries again"
    assert explained(vm, 0x5000, EXECUTE) == ("ept_violation", f"{place} does not permit execute{remapped}")
    store_leaf(vm, 5, lambda entry: 2)
    assert explained(vm, 0x5000) == (
        "ept_misconfiguration",
        f"EPT misconfiguration: {place} = 0x2 is not a valid entry",
    )


def test_walk_finds_a_reserved_bit_of_the_sppt() -> None:
    vm = machine()
    set_map(vm, 5, 0xF)
    vm.access(AccessRequest(0x5000))
    l2e = vm.walk(0x5000).sppt[2]

    def spoil(m: Any) -> None:
        row = m.row_of[(l2e.table - int(m.caps[0])) >> 12]
        m.rows[row, l2e.index] |= 2

    edit(vm, spoil)
    outcome, sentence = explained(vm, 0x5000)
    assert outcome == "spp_misconfiguration"
    assert sentence.endswith(f"= {l2e.raw | 2:#x} has a reserved bit set")


def test_walk_beyond_what_the_tables_translate() -> None:
    host = HostConfig(vmx_capabilities={"ept_vpid_cap": 0x0F01_0633_4141})
    vm = machine(maxphyaddr=52, host=host)
    found = vm.walk(1 << 48)
    assert found.sentence == "denied: the GPA is wider than the EPT walk translates"
    assert (found.ept, found.sppt, found.qualification) == ((), (), 0x182)


def test_walk_shows_every_entry_in_fields() -> None:
    vm = machine()
    set_map(vm, 5, 0xF)
    vm.access(AccessRequest(0x5000))
    found = vm.walk(0x5208)
    assert (found.gpa, found.size, found.access, found.exit_gpa) == (0x5208, 8, "write", 0x5208)
    assert (found.reason, found.qualification, found.subpages, found.denied) == (48, 0x1AA, 1 << 4, 1 << 4)
    assert [(e.structure, e.level, e.index, e.absent) for e in found.ept] == [
        ("PML4E", 4, 0, False),
        ("PDPTE", 3, 0, False),
        ("PDE", 2, 0, False),
        ("PTE", 1, 5, False),
    ]
    assert found.ept[0].fields == {
        "read": 1, "write": 1, "execute": 1, "page": 0, "accessed": 1, "user_execute": 0, "suppress_ve": 0,
        "address": found.ept[1].table, "reserved": 0,
    }  # fmt: skip
    pte = found.ept[3].fields
    assert {name: value for name, value in pte.items() if value} == {
        "read": 1, "execute": 1, "memory_type": 6, "ignore_pat": 1, "accessed": 1, "dirty": 1, "user_execute": 1,
        "spp": 1, "address": 0x5000,
    }  # fmt: skip
    assert [(e.structure, e.fields) for e in found.sppt] == [
        ("SPPL4E", {"valid": 1, "address": found.sppt[1].table, "reserved": 0}),
        ("SPPL3E", {"valid": 1, "address": found.sppt[2].table, "reserved": 0}),
        ("SPPL2E", {"valid": 1, "address": found.sppt[3].table, "reserved": 0}),
        ("SPPL1E", {"writable_subpages": 0xF, "reserved": 0}),
    ]
    read = vm.walk(0x5208, READ)
    assert (read.reason, read.qualification, read.exit_gpa, read.denied, read.sppt) == (None, None, None, 0, ())


def test_walk_of_two_pages_stops_at_the_one_that_exits() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5FFC))
    assert vm.walk(0x5FFC).outcome == "allowed"
    set_map(vm, 6, 0)
    found = vm.walk(0x5FFC)
    assert (found.exit_gpa, found.subpages, found.denied, found.ept[-1].index) == (0x6000, 1, 1, 6)
    set_map(vm, 5, 0)
    found = vm.walk(0x5FFC)
    assert (found.exit_gpa, found.subpages, found.ept[-1].index) == (0x5FFC, 1 << 31, 5)


def test_walk_into_absent_table_memory() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5000))
    pml4e = vm.walk(0x5000).ept[0]

    def lead_astray(m: Any) -> None:
        m.rows[m.row_of[(pml4e.table - int(m.caps[0])) >> 12], pml4e.index] = 0x1000 | 7

    edit(vm, lead_astray)
    found = vm.walk(0x5000)
    assert (found.outcome, found.ept[-1].raw, found.ept[-1].absent) == ("ept_misconfiguration", (1 << 64) - 1, True)


def test_walk_explains_large_pages_and_shows_their_fields() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5000))
    pde = vm.walk(0x5000).ept[2]

    def enlarge(m: Any) -> None:
        m.rows[m.row_of[(pde.table - int(m.caps[0])) >> 12], pde.index] = 0xB7

    edit(vm, enlarge)
    found = vm.walk(0x5000)
    assert (found.outcome, found.ept[-1].structure, found.ept[-1].fields["page"]) == ("allowed", "PDE", 1)


def test_walk_that_is_refused() -> None:
    vm = machine()
    with refused(vm, InvalidValue, "size", 0, "1 to 65535"):
        vm.walk(0, size=0)
    with refused(vm, InvalidValue, "vcpu", 3, "id of a vCPU of this machine"):
        vm.walk(0, vcpu=3)
    with refused(vm, NotFound, "vcpu", 3, "id of a vCPU of this machine"):
        vm.config.vcpu_position(3)


# ---- one writer, many readers

MUTATIONS: dict[str, Callable[[VirtualMachine], Any]] = {
    "set_slot": lambda vm: vm.set_slot(SlotSpec(9, 1 << 30, MIB)),
    "delete_slot": lambda vm: vm.delete_slot(0),
    "set_subpages": lambda vm: set_map(vm, 1, 0),
    "protect": lambda vm: protect(vm, "q", (0, 1)),
    "unprotect": lambda vm: vm.unprotect("p"),
    "write_memory": lambda vm: vm.write_memory(0, b"x"),
    "access": lambda vm: vm.access(AccessRequest(0)),
    "replay": lambda vm: vm.replay(ReplayOptions()),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_second_writer_is_told_that_the_machine_is_busy(name: str) -> None:
    vm = machine()
    protect(vm, "p", (0x1000, 1))
    with vm.replay(ReplayOptions()) as first:
        first.feed(chunk([0x2000]))
        with pytest.raises(Busy, match="another change of this machine is under way"):
            MUTATIONS[name](vm)
        first.finish()
    MUTATIONS[name](vm)
    assert vm.counters()["records"] >= 1


def test_enabling_while_busy() -> None:
    vm = machine(spp=False)
    with vm.replay(ReplayOptions()), pytest.raises(Busy):
        vm.enable_spp()
    vm.enable_spp()


def test_readers_see_the_published_state_during_a_change() -> None:
    vm = machine()
    set_map(vm, 1, 0xF)
    vm.write_memory(0x1000, b"old")
    with vm.replay(ReplayOptions(on_violation="grant")) as run:
        run.feed(chunk([0x1200]))
        seen: list[Any] = []

        def look() -> None:
            seen.extend([maps(vm, 1), vm.read_memory(0x1000, 3), vm.counters()["records"], vm.walk(0x1200).outcome])

        reader = threading.Thread(target=look)
        reader.start()
        reader.join()
        assert seen == [[0xF], b"old", 0, "ept_violation"]
        run.finish()
    assert maps(vm, 1) == [0x1F]


def overtaken(vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
    """Let the next call of ``where.name`` begin only after several changes."""
    original = getattr(where, name)

    def late(*args: Any) -> Any:
        monkeypatch.undo()
        for word in range(8):
            set_map(vm, 1, word)
            vm.write_memory(0x1000, bytes([word]) * 8)
            vm.access(AccessRequest(0x1000, access=READ))
        return original(*args)

    monkeypatch.setattr(where, name, late)


def test_overtaken_get_answers_from_the_state_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = machine()
    set_map(vm, 1, 0x1234)
    overtaken(vm, monkeypatch, bitmaps, "read_maps")
    assert maps(vm, 1) == [0x1234]
    assert maps(vm, 1) == [7]


@pytest.mark.parametrize(("place", "name", "before"), [(page_contents, "read_bytes", 1), (SlotMap, "holding", 0)])
def test_overtaken_memory_read_answers_from_the_state_it_began_with(
    place: Any, name: str, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two pages, and of one."""
    vm = machine()
    vm.write_memory(0x1000, b"original")
    overtaken(vm, monkeypatch, place, name)
    assert vm.read_memory(0x1000 - before, before + 8)[before:] == b"original"
    assert vm.read_memory(0x1000 - before, before + 8)[before:] == b"\7" * 8


def test_overtaken_walk_answers_from_the_state_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = machine()
    set_map(vm, 1, 0x1234)
    vm.access(AccessRequest(0x1000, access=READ))
    overtaken(vm, monkeypatch, explain_module, "explain")
    assert vm.walk(0x1000).sppt[-1].fields["writable_subpages"] == 0x1234
    assert vm.walk(0x1000).sppt[-1].fields["writable_subpages"] == 7


# ---- limits


def test_limit_on_frames_is_an_error_that_changes_nothing() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 44)], max_table_frames=100)
    before = picture(vm)

    def write_on() -> None:
        nonlocal before
        for page in range(5000):
            before = picture(vm)
            vm.write_memory((page % 32 << 39) + (page << 12), b"x")

    with pytest.raises(LimitExceeded, match="100 table frames at most") as caught:
        write_on()
    assert (caught.value.field, caught.value.errno) == ("max_table_frames", "ENOMEM")
    assert caught.value.code == "limit-exceeded"
    assert picture(vm) == before
    assert vm.read_memory(0, 1) == b"x"
    assert_sound(vm)
    assert 100 - 6 < vm.frames_in_use <= 100, "a path of the memory tree is five frames"
    vm.write_memory(0, b"y")
    assert vm.read_memory(0, 1) == b"y"


GROWING: dict[str, Callable[[VirtualMachine, int], object]] = {
    "set": lambda vm, gpa: set_map(vm, gpa >> 12, 0),
    "access": lambda vm, gpa: vm.access(AccessRequest(gpa, access=READ)),
    "replay": lambda vm, gpa: replay(vm, [gpa + (page << 12) for page in range(4)]),
    "table": lambda vm, gpa: vm.tables.new_frame(),
    "memory": lambda vm, gpa: vm.write_memory(gpa, bytes([1])),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("way", GROWING)
def test_limit_on_frames_is_that_of_what_is_published(profile: str, way: str) -> None:
    """And a machine that is beyond a new limit may change and shrink."""
    vm = machine(profile, slots=[SlotSpec(0, 0, 1 << 28)], max_table_frames=60)

    def grow() -> None:
        for page in range(100):
            GROWING[way](vm, page << 21)
            assert vm.frames_in_use <= 60

    with pytest.raises(LimitExceeded, match="60 table frames at most"):
        grow()
    assert_sound(vm)
    vm.bound_frames(10)
    used = vm.frames_in_use
    with pytest.raises(LimitExceeded, match="10 table frames at most"):
        vm.write_memory(0x7F << 21, b"x")
    vm.delete_slot(0)
    assert vm.frames_in_use <= used


def test_limit_during_a_replay_leaves_the_machine_as_it_was() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 44)], max_table_frames=100)
    with unchanged(vm), pytest.raises(LimitExceeded, match="100 table frames at most"):
        replay(vm, [i << 30 for i in range(1500)])
    assert replay(vm, [0]).violations == 0
