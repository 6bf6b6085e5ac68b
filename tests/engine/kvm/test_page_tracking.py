"""Whole pages without sub-page protection: KVM's page tracking, by leaves, faults and what a client is told.

Linux 5.3 (mmu.c: mmu_need_write_protect, page_fault_handle_page_track; page_track.c) and 7.1 (make_spte,
kvm_write_track_add_gfn), and KVMI's hooks of the emulator (kvm_page_track_preread, _prewrite, _preexec; kvm-spp 9.2).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.errors import NotEnabled
from engine.kvm.protections import ProtectedObject, ProtectedPages
from engine.kvm.slots import SlotSpec
from engine.kvm.write_protection import HOST_WRITEABLE, LOCKLESS_WRITABLE, MMU_WRITEABLE
from engine.machine import VirtualMachine
from engine.machine.page_access import AccessChange, text_of
from engine.state.config import HostConfig
from engine.trace.columns import TraceChunk
from engine.trace.interactive import InteractiveReplay
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    EXECUTE,
    FULL,
    MIB,
    PAGE,
    PROFILES,
    READ,
    WRITE,
    chunk,
    exits,
    leaf,
    machine,
    refused,
    replay,
    round_trip,
    store_word,
    totals,
)

R, W, X = bits.READ, bits.WRITE, bits.EXECUTE
HOSTS = [HostConfig(), HostConfig(spp=False), HostConfig(vendor="amd"), HostConfig(ept=False)]
# A write that a present leaf of rights r-x refuses: write, readable, executable, linear address valid, final.
REFUSED = 0x1AA
LARGE = SlotSpec(0, 0, 4 * MIB, host_page_size=2 * MIB)
# Without accessed flags (bit 21 of the capability MSR) aging takes all rights.
NO_FLAGS = HostConfig(spp=False, vmx_capabilities={"ept_vpid_cap": 0xF0106134141})


def guest(profile: str, host: HostConfig = HOSTS[1], **config: Any) -> VirtualMachine:
    return machine(profile, spp=False, host=host, **config)


def whole(vm: VirtualMachine, gpa: int, size: int = 8, name: str = "o") -> None:
    vm.protect(name, [ProtectedObject(name, gpa, size, "page")])


def rights(vm: VirtualMachine, gfn: int) -> tuple[str, int]:
    (page,) = vm.page_access.read([gfn])
    return text_of(page.rights), page.bitmap


def resolutions(vm: VirtualMachine, *rows: Any) -> list[str]:
    result = replay(vm, list(rows), include="all")
    return result.exit_columns.resolution_names()


# ---- leaves and faults


@pytest.mark.parametrize("profile", PROFILES)
def test_first_write_maps_the_page_without_write_permission_and_the_next_one_is_refused(profile: str) -> None:
    vm = guest(profile)
    whole(vm, 0x2010)
    result = replay(vm, [(0x2010, 8), (0x2010, 8), (0x2010, 8, READ), (0x2010, 8, EXECUTE)], include="all")
    assert exits(result, "index", "resolution", "qualification", "denied") == [
        (0, 0, 0x182, 0),
        (0, 6, REFUSED, 1),
        (1, 6, REFUSED, 1),
    ]
    assert (result.violations, result.exits["ept_violation"], result.exits["spp_miss"]) == (2, 3, 0)
    entry = leaf(vm, 2)
    assert entry is not None and entry & (bits.RIGHTS | bits.SPP) == R | X
    assert entry & LOCKLESS_WRITABLE == HOST_WRITEABLE
    assert vm.counters()["faults_armed"] == vm.counters()["sppt_fills"] == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_mapped_page_loses_write_permission_at_once_and_gets_it_back_by_a_fault(profile: str) -> None:
    vm = guest(profile, translation_cache="model")
    replay(vm, [0x2000, 0x3000])
    before = leaf(vm, 2)
    assert before is not None and before & W
    flushes = vm.counters()["tlb_flushes"]
    whole(vm, 0x2000)
    assert leaf(vm, 2) == before & ~(W | MMU_WRITEABLE)
    assert vm.counters()["tlb_flushes"] == flushes + 1
    assert resolutions(vm, 0x2000, 0x3000) == ["violation"]
    vm.unprotect("o")
    assert leaf(vm, 2) == before & ~(W | MMU_WRITEABLE)
    assert resolutions(vm, 0x2000, 0x2000) == ["mapped"]
    assert leaf(vm, 2) == before


@pytest.mark.parametrize("profile", PROFILES)
def test_large_leaf_keeps_its_place_until_a_neighbour_is_written(profile: str) -> None:
    """The leaf of the region loses write permission; the next write to another of its pages maps that small."""
    vm = guest(profile, slots=[LARGE])
    replay(vm, [0x3000])
    whole(vm, 0x2000)
    entry = leaf(vm, 2)
    assert entry is not None and entry & bits.PAGE and not entry & (W | MMU_WRITEABLE)
    assert resolutions(vm, (0x2000, 8, READ), 0x2000) == ["violation"]
    assert replay(vm, [0x3000]).violations == 0 and vm.counters()["faults_split"] == 1
    small = leaf(vm, 3)
    assert small is not None and small & W and not small & bits.PAGE
    assert replay(vm, [0x2000, 0x20_0000]).violations == 1
    beyond = leaf(vm, 0x200)
    assert beyond is not None and beyond & bits.PAGE, "other regions stay large"
    vm.unprotect("o")
    vm.host_memory.event("zap")
    replay(vm, [0x2000])
    again = leaf(vm, 2)
    assert again is not None and again & bits.PAGE


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("event", ["unmap", "write-protect", "age", "zap", "shrink", "split", "collapse", "migrate"])
@pytest.mark.parametrize("host", [HOSTS[1], NO_FLAGS])
def test_host_memory_events_leave_a_page_protected(profile: str, event: str, host: HostConfig) -> None:
    vm = guest(profile, host)
    whole(vm, 0x2000)
    replay(vm, [0x2000, 0x3000])
    vm.host_memory.event(event, 0 if event == "collapse" else 2, 512 if event == "collapse" else 2)
    assert replay(vm, [0x2000, (0x2000, 8, READ), 0x2000, 0x3000]).violations == 2
    assert replay(round_trip(vm), [0x2000, 0x3000]).violations == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_shared_and_read_only_pages(profile: str) -> None:
    slots = [SlotSpec(0, 0, MIB), SlotSpec(1, MIB, MIB, read_only=True)]
    vm = guest(profile, slots=slots)
    whole(vm, 0x2000)
    whole(vm, MIB, 8, "rom")
    replay(vm, [(0x2000, 8, READ)])
    vm.host_memory.event("remap-read-only", 2, 1)
    assert resolutions(vm, 0x2000, (MIB, 8)) == ["violation", "mmio"]
    vm.unprotect("o")
    assert replay(vm, [0x2000]).violations == 0
    entry = leaf(vm, 2)
    assert entry is not None and entry & W


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", ["write-protect", "pml"])
def test_refused_write_is_dirty_nowhere(profile: str, method: str) -> None:
    vm = guest(profile, slots=[SlotSpec(0, 0, MIB, log_dirty=True)])
    vm.dirty.track("page", method)
    whole(vm, 0x2000)
    replay(vm, [0x2000, 0x3000, 0x2000])
    assert vm.dirty.harvest().gfns.tolist() == [3]
    assert int.from_bytes(vm.dirty.take_log(0), "little") == 1 << 3
    assert replay(vm, [0x2000], on_violation="allow").violations == 1
    assert int.from_bytes(vm.dirty.take_log(0), "little") == 1 << 2
    vm.unprotect("o")
    assert replay(vm, [0x2000]).violations == 0
    assert int.from_bytes(vm.dirty.take_log(0), "little") == 1 << 2


@pytest.mark.parametrize("profile", PROFILES)
def test_every_processor_is_stopped(profile: str) -> None:
    vm = guest(profile, vcpus=(0, 1), translation_cache="model")
    replay(vm, [(0x2000, 8, WRITE, 0), (0x2000, 8, WRITE, 1)])
    whole(vm, 0x2000)
    assert replay(vm, [(0x2000, 8, WRITE, vcpu) for vcpu in (0, 1, 0, 1)]).violations == 4


def test_write_over_two_pages_lands_in_neither() -> None:
    vm = guest("kvm-latest")
    whole(vm, 0x3000)
    result = replay(vm, [(0x2FFC, 8), (0x2F00, 0x2000), (0x3FF0, 0x20)])
    assert exits(result, "gpa", "denied") == [(0x3000, 1), (0x3000, FULL), (0x3FF0, 1 << 31)]
    assert vm.access(AccessRequest(0x2FFC, 8, data=b"12345678")).lands is False
    assert vm.read_memory(0x2FFC, 8) == bytes(8)


def test_raw_entry_goes_past_it_and_is_counted() -> None:
    vm = guest("kvm-latest")
    whole(vm, 0x2000)
    replay(vm, [(0x2000, 8, READ)])
    vm.tables.set_ept_entry(1, 0x2000, vm.tables.ept_entry(1, 0x2000).raw | W)
    result = replay(vm, [0x2000])
    assert (result.violations, result.unenforced_writes) == (0, 1)


# ---- what becomes of a write


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("on_violation", ["skip", "stop", "allow", "grant"])
def test_what_becomes_of_a_refused_write(profile: str, host: HostConfig, on_violation: str) -> None:
    vm = guest(profile, host)
    whole(vm, 0x2010)
    first = vm.access(AccessRequest(0x2800, data=b"whatever", on_violation=on_violation))
    assert first.run is None and (first.resolution, first.lands) == ("violation", on_violation in ("allow", "grant"))
    assert vm.read_memory(0x2800, 8) == (b"whatever" if first.lands else bytes(8))
    result = replay(vm, [0x2010, 0x2FF8, 0x3000], on_violation=on_violation)
    expected = {"skip": 2, "stop": 1, "allow": 2, "grant": 0}[on_violation]
    assert (result.violations, result.page_granular_violations) == (expected, expected)
    assert vm.counters()["grants"] == (on_violation == "grant"), "a grant frees the whole page"
    assert vm.counters()["unenforced_writes"] == 0


@pytest.mark.parametrize("host", [HOSTS[1], HOSTS[3]])
@pytest.mark.parametrize(("action", "violations"), [("skip", 2), ("allow", 2), ("grant", 1), ("stop", 1)])
def test_what_a_tool_answers(host: HostConfig, action: str, violations: int) -> None:
    vm = guest("kvm-latest", host)
    whole(vm, 0x2010)
    with vm.replay(ReplayOptions(on_violation="ask")) as run:
        replaying = run.replay
        assert isinstance(replaying, InteractiveReplay)
        going = run.feed(chunk([0x2010, 0x2800, 0x3000]))
        run.pause()
    assert not going and replaying.asked.column("gpa").tolist() == [0x2010]
    while not going and replaying.paused_at is not None:
        with vm.replay(ReplayOptions(on_violation="ask"), replaying) as run:
            going = replaying.answer(action)
            run.pause()
    assert replaying.result().violations == violations
    assert vm.counters()["grants"] == (action == "grant")


@pytest.mark.parametrize("profile", PROFILES)
def test_objects_of_whole_pages_count_neighbours(profile: str) -> None:
    vm = guest(profile)
    vm.protect("p", [ProtectedObject("a", 0x2FF0, 0x20, "page"), ProtectedObject("b", 0x2100, 8, "page")])
    result = replay(vm, [0x2FF0, 0x3008, 0x2000, 0x2100, 0x4000, (0x20FC, 8), (0x1FFC, 8)])
    assert result.violations == result.page_granular_violations == 6
    assert (result.by_object["a"].violations, result.by_object["a"].collateral) == (6, 4)
    assert (result.by_object["b"].violations, result.by_object["b"].collateral) == (5, 3)
    assert result.by_object["a"].subpages == 64


@pytest.mark.parametrize("profile", PROFILES)
def test_protections_overlap_until_the_last_one_goes(profile: str) -> None:
    vm = guest(profile)
    whole(vm, 0x2000, name="a")
    vm.protect("b", [], [ProtectedPages(2, 2, 0), ProtectedPages(5, 1, FULL)])
    assert replay(vm, [0x2000, 0x3000, 0x5000]).violations == 2
    vm.unprotect("a")
    assert replay(vm, [0x2000, 0x3000]).violations == 2
    vm.unprotect("b")
    assert replay(vm, [0x2000, 0x3000]).violations == 0
    assert vm.counters()["frames_layer"] == 0


def test_pages_in_part_need_sub_page_protection() -> None:
    vm = guest("kvm-2019", HostConfig())
    page, part = ProtectedObject("a", 0x2000, 8, "page"), ProtectedObject("b", 0x3000, 4096)
    with refused(vm, NotEnabled, "spp", False, r"must be on: .*; objects\[1\] protects pages in part", "ENODEV"):
        vm.protect("p", [page, part])
    with refused(vm, NotEnabled, "spp", False, r"pages\[1\] protects pages in part"):
        vm.protect("p", [page], [ProtectedPages(1, 1, 0), ProtectedPages(1, 1, 1)])
    with refused(vm, NotEnabled, "entries[1].write_bitmap", 3, "0 or all ones", "EOPNOTSUPP"):
        vm.page_access.set([AccessChange(2, rights=R), AccessChange(3, bitmap=3)])
    done = vm.page_access.set([AccessChange(3, bitmap=3), AccessChange(2, bitmap=0)], "apply-all")
    assert [item.outcome for item in done] == ["refused", "applied"]
    assert rights(vm, 2) == ("r-x", 0)


# ---- page access


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("allowed", [R | W | X, R | W, R | X, R, X, 0])
def test_page_access(profile: str, host: HostConfig, touched: bool, allowed: int) -> None:
    vm = guest(profile, host)
    if touched:
        replay(vm, [0x2000])
    if allowed == X and not host.executes_only:
        with pytest.raises(Exception, match="execute-only"):
            vm.page_access.set([AccessChange(2, rights=allowed)])
        return
    vm.page_access.set([AccessChange(2, rights=allowed)])
    assert rights(vm, 2) == (text_of(allowed), FULL if allowed & W else 0)
    for _ in range(2):
        for access, right in ((READ, R), (WRITE, W), (EXECUTE, X)):
            found = vm.access(AccessRequest(0x2000, access=access))
            assert (found.allowed, found.resolution == "violation") == (bool(allowed & right), not allowed & right)
            assert found.run is None
    vm.page_access.set([AccessChange(2, rights=R | W | X)])
    assert replay(vm, [(0x2000, 8, access) for access in (READ, WRITE, EXECUTE)]).violations == 0
    assert vm.counters()["frames_layer"] == 0


@pytest.mark.parametrize("spp", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("allowed", [R | W | X, R | W, R | X, R, X, 0])
def test_page_access_holds_for_what_is_emulated(profile: str, spp: bool, allowed: int) -> None:
    vm = machine(profile, spp=spp)
    vm.page_access.set([AccessChange(2, rights=allowed)])
    for access, right in ((READ, R), (WRITE, W), (EXECUTE, X)):
        found = vm.access(AccessRequest(0x2000, access=access, source=acc.EMULATED))
        assert found.allowed == bool(allowed & right)
        if not found.allowed:
            assert found.exits.column("qualification").tolist() == [1 << access | allowed << 3 | 0x180]
            assert found.exits.column("reason").tolist() == [48]
    assert vm.counters()["exits_ept_violation"] == 0, "no processor took part"
    assert vm.access(AccessRequest(0x2000, source=acc.HOST)).allowed
    assert vm.access(AccessRequest(0x2000, access=READ, source=acc.HOST)).allowed


@pytest.mark.parametrize("profile", PROFILES)
def test_emulated_writes_obey_whole_pages_and_those_of_the_host_do_not(profile: str) -> None:
    vm = guest(profile)
    whole(vm, 0x2000)
    words = [(0x2100, 8 | WRITE << 16 | acc.record_bits(0, 1, source)) for source in (acc.EMULATED, acc.HOST)]
    result = replay(vm, TraceChunk(np.array(words, dtype=np.uint64), None, {}, kinds=True))
    assert (result.violations, result.page_granular_violations, result.unenforced_writes) == (1, 1, 0)
    assert exits(result, "index", "qualification", "denied") == [(0, REFUSED, 4)]
    assert result.by_object["o"].violations == 1


def test_emulated_writes_obey_page_access_in_2019_but_no_protection_and_no_set() -> None:
    """KVMI's hook knows the tool's bitmap (kvm-spp 9.2); version 4 has no check of its own."""
    vm = machine("kvm-2019")
    vm.page_access.set([AccessChange(2, bitmap=1)])
    vm.protect("p", [ProtectedObject("o", 0x2000, 8)])
    found = [vm.access(AccessRequest(gpa, source=acc.EMULATED)) for gpa in (0x2000, 0x2080)]
    assert [(item.allowed, item.unenforced) for item in found] == [(True, True), (False, False)]
    assert vm.counters()["page_granular_violations"] == 1


# ---- hosts without EPT


@pytest.mark.parametrize("profile", PROFILES)
def test_shadow_page_tables_keep_it(profile: str) -> None:
    vm = guest(profile, HOSTS[3], slots=[SlotSpec(0, 0, MIB), SlotSpec(1, MIB, MIB, read_only=True)])
    whole(vm, 0x2010)
    result = replay(vm, [0x2010, (0x1FFC, 8), 0x3000, MIB, 4 * MIB], include="all")
    assert exits(result, "index", "reason", "resolution", "qualification", "denied", "gpa") == [
        (0, 0, 6, 0, 1, 0x2010),
        (1, 0, 6, 0, 1, 0x2000),
        (3, 0, 7, 0, 0, MIB),
        (4, 0, 7, 0, 0, 4 * MIB),
    ]
    assert (result.violations, result.page_granular_violations, result.mmio) == (2, 2, 2)
    assert (
        vm.walk(0x2010).then.sentence == "denied: KVM's shadow of the guest's tables does not permit write at GFN 0x2"
    )


# ---- addresses of the guest


@pytest.mark.parametrize("host", [HOSTS[1], HOSTS[3]])
@pytest.mark.parametrize("on_violation", ["skip", "allow", "grant"])
def test_access_by_linear_address(host: HostConfig, on_violation: str) -> None:
    vm = guest("kvm-latest", host)
    for at, entry in ((0x10000, 0x11003), (0x11000, 0x12003), (0x12000, 0x13003), (0x13010, 0x2003), (0x13018, 0x3003)):
        store_word(vm, at, entry)
    vm.vcpus.set_vmcs(0, {"cr3": 0x10000})
    whole(vm, 0x3000)
    request = AccessRequest(None, gva=0x2FFC, data=b"12345678", on_violation=on_violation)
    found = vm.access(request)
    assert found.resolution == "violation" and found.run is None
    at = found.exits.resolution_names().index("violation")
    assert [int(found.exits.column(name)[at]) for name in ("gpa", "denied")] == [0x3000, 1]
    assert vm.read_memory(0x2FFC, 8) == (bytes(8) if on_violation == "skip" else b"12345678")
    assert vm.counters()["violations"] == vm.counters()["page_granular_violations"] == 1
    assert vm.access(request).allowed == (on_violation == "grant")


# ---- enabling sub-page protection afterwards


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("slot", [SlotSpec(0, 0, 4 * MIB), LARGE])
def test_enabling_makes_them_what_they_are_with_sub_pages(profile: str, slot: SlotSpec) -> None:
    rows = [0x2000, 0x2FF8, 0x5000, (0x6000, 8, EXECUTE), 0x3000, 0x2000]
    late, soon = guest(profile, HostConfig(), slots=[slot]), machine(profile, slots=[slot])
    for vm in (late, soon):
        replay(vm, [0x2000, 0x3000])
        whole(vm, 0x2010)
        vm.protect("pages", [], [ProtectedPages(5, 1, 0)])
        vm.page_access.set([AccessChange(6, rights=R)])
        replay(vm, rows)
    late.enable_spp()
    for vm in (late, soon):
        vm.host_memory.event("shrink")
    for each in (late, round_trip(late)):
        again = round_trip(soon)
        assert totals(replay(each, rows)) == totals(replay(again, rows))
        assert leaf(each, 2) == leaf(again, 2)
        assert rights(each, 6) == ("r--", 0)


@pytest.mark.parametrize("profile", PROFILES)
def test_enabling_drops_the_leaves_of_tracked_pages(profile: str) -> None:
    vm = guest(profile, HostConfig())
    whole(vm, 0x2000)
    replay(vm, [0x2000, 0x2000, 0x3000])
    vm.enable_spp()
    assert leaf(vm, 2) is None and leaf(vm, 3) is not None
    result = replay(vm, [0x2000, 0x2000])
    assert (result.violations, vm.counters()["faults_armed"]) == (2, 1)
    entry = leaf(vm, 2)
    assert entry is not None and entry & bits.SPP
    vm.set_subpages([])
    assert replay(vm, [0x2080], on_violation="grant").violations == 1
    assert replay(vm, [0x2080, 0x2000]).violations == 1, "a grant is of sub-pages from now on"


# ---- against an oracle: the set of pages


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("seed", range(12))
def test_random_operations_against_a_set_of_pages(profile: str, seed: int) -> None:
    rng = random.Random(seed)
    host = HOSTS[seed % len(HOSTS)]
    vm = guest(profile, host, slots=[SlotSpec(0, 0, 2 * MIB, host_page_size=(PAGE, 2 * MIB)[seed // 4 % 2])])
    protections: dict[str, set[int]] = {}
    closed: set[int] = set()
    granted: set[int] = set()
    for _ in range(30):
        covered = set().union(*protections.values())
        match rng.randrange(6):
            case 0:
                name, gpa, size = rng.choice("abc"), rng.randrange(16 * PAGE), rng.choice((1, 8, 5000))
                if name not in protections:
                    whole(vm, gpa, size, name)
                    protections[name] = set(range(gpa // PAGE, (gpa + size - 1) // PAGE + 1))
            case 1 if protections:
                name = rng.choice(list(protections))
                vm.unprotect(name)
                del protections[name]
                granted &= set().union(*protections.values())
            case 2:
                gfn, opened = rng.randrange(16), rng.random() < 0.5
                vm.page_access.set([AccessChange(gfn, rights=R | X | (W if opened else 0))])
                (closed.discard if opened else closed.add)(gfn)
                granted.discard(gfn)
            case 3:
                event = rng.choice(("unmap", "write-protect", "age", "migrate", "zap", "split"))
                vm.host_memory.event(event, rng.randrange(16), 1)
            case _:
                rows = [(rng.randrange(16 * PAGE), rng.choice((1, 8, 5000)), rng.randrange(3)) for _ in range(6)]
                on_violation = rng.choice(("skip", "allow", "grant"))
                result = replay(vm, rows, on_violation=on_violation)
                violations = 0
                for gpa, size, access in rows:
                    touched = set(range(gpa // PAGE, (gpa + size - 1) // PAGE + 1))
                    hit = touched & (closed | covered - granted) if access == WRITE else set()
                    violations += bool(hit)
                    if on_violation == "grant":
                        closed -= hit
                        granted |= hit & covered
                assert result.violations == result.page_granular_violations == violations
                assert result.unenforced_writes == 0
        if rng.random() < 0.2:
            vm = round_trip(vm)
