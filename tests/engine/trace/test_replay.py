"""Replay: totals, exit records, what happens to violations, splits, and the fast path that changes no answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.cpu import fastpath
from engine.errors import InvalidValue, TraceError
from engine.kvm import resolutions as res
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.trace import session
from engine.trace.results import TraceResult
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    EXECUTE,
    FULL,
    MIB,
    PROFILES,
    READ,
    WRITE,
    chunk,
    exits,
    leaf,
    machine,
    maps,
    picture,
    protect,
    records,
    refused,
    replay,
    resolutions,
    round_trip,
    set_map,
    store_leaf,
    totals,
    unchanged,
    word1,
)

OPEN, SHUT, HOLE = 0x9000, 0x5200, 1 << 30


@pytest.fixture(params=PROFILES)
def vm(request: pytest.FixtureRequest) -> VirtualMachine:
    """Page 5 allows sub-pages 0 to 3 only."""
    made = machine(request.param, vcpus=(0, 3, 700))
    set_map(made, 5, 0xF)
    return made


# ---- what is counted


def test_totals(vm: VirtualMachine) -> None:
    result = replay(vm, [OPEN, 0x5000, SHUT, (SHUT, 8, READ), (SHUT, 8, EXECUTE), HOLE, (HOLE, 8, READ), SHUT])
    miss = vm.config.profile == "kvm-latest"
    assert (result.records, result.writes, result.mmio, result.unenforced_writes) == (8, 5, 2, 0)
    assert (result.violations, result.page_granular_violations) == (2, 3)
    assert result.exits == {
        "ept_violation": 6,  # two pages mapped, two refusals, two accesses outside memory
        "ept_misconfiguration": 0,
        "spp_miss": int(miss),
        "spp_misconfiguration": 0,
    }
    assert (result.exit_records_dropped, result.stopped_at) == (0, None)
    assert exits(result, "index", "gpa", "gfn", "size", "access", "subpages", "denied", "resolution") == [
        (2, SHUT, 5, 8, WRITE, 16, 16, res.VIOLATION),
        (7, SHUT, 5, 8, WRITE, 16, 16, res.VIOLATION),
    ]
    assert result.exit_columns.access_names() == ["write", "write"]
    assert result.exit_columns.resolution_names() == ["violation", "violation"]


def test_empty_trace(vm: VirtualMachine) -> None:
    for chunks in ([], [[]]):
        result = replay(vm, *chunks)
        assert totals(result)["records"] == 0 and len(result.exit_columns) == 0
        assert exits(result, "index", "denied") == []


def test_page_granular_counts_writes_to_pages_with_any_refused_sub_page(vm: VirtualMachine) -> None:
    rows = [0x5000, 0x5080, SHUT, (0x5000, 8, READ), 0x4FFC, 0x5FFC, 0x6000]
    assert replay(vm, rows).page_granular_violations == 5
    set_map(vm, 5, FULL)
    assert replay(vm, rows).page_granular_violations == 0


def test_second_page_counts_for_page_granularity() -> None:
    vm = machine()
    set_map(vm, 6, 0xFFFF_FFDF)
    result = replay(vm, [0x5FFC])
    assert (result.violations, result.page_granular_violations) == (0, 1)


def test_before_spp_is_enabled_nothing_is_refused() -> None:
    vm = machine(spp=False)
    result = replay(vm, [OPEN, SHUT, HOLE] * 3)
    assert (result.violations, result.page_granular_violations, result.mmio) == (0, 0, 3)


STRADDLES = [
    # gpa, size, map of page 5, map of page 6, denied per exit, exit at
    ("two sub-pages, both allowed", 0x507C, 8, 0b11, FULL, None, None),
    ("two sub-pages, second refused", 0x507C, 8, 0b01, FULL, 0b10, 0x507C),
    ("two sub-pages, first refused", 0x507C, 8, 0b10, FULL, 0b01, 0x507C),
    ("three sub-pages, middle refused", 0x5040, 256, 0b101, FULL, 0b10, 0x5040),
    ("whole page, one refused", 0x5000, 4096, FULL & ~(1 << 17), FULL, 1 << 17, 0x5000),
    ("two pages, both allowed", 0x5FFC, 8, 1 << 31, 1, None, None),
    ("two pages, low one refused", 0x5FFC, 8, 0, 1, 1 << 31, 0x5FFC),
    ("two pages, high one refused", 0x5FFC, 8, 1 << 31, 0, 1, 0x6000),
    ("two pages, both refused: low first", 0x5FFC, 8, 0, 0, 1 << 31, 0x5FFC),
    ("three pages, middle refused", 0x4FFF, 4098, 0, FULL, FULL, 0x5000),
]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("gpa", "size", "low", "high", "denied", "at"), [row[1:] for row in STRADDLES], ids=[row[0] for row in STRADDLES]
)
def test_every_touched_sub_page_must_allow(
    profile: str, gpa: int, size: int, low: int, high: int, denied: int | None, at: int | None
) -> None:
    vm = machine(profile)
    set_map(vm, 5, low)
    set_map(vm, 6, high)
    for _ in range(3):
        result = replay(vm, [(gpa, size)] * 2)
        wanted = [] if denied is None else [(at, denied), (at, denied)]
        assert exits(result, "gpa", "denied") == wanted
        assert result.violations == len(wanted)


@pytest.mark.parametrize("profile", PROFILES)
def test_access_of_64_kbytes(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 0, 1, npages=1024)
    size = 0xFFFF
    result = replay(vm, [(0x10FFF, size)], include="all")
    assert resolutions(result)[-1] == "violation"
    assert exits(result, "gpa", "subpages")[-1] == (0x10FFF, 1 << 31)
    set_map(vm, 0, FULL, npages=1024)
    result = replay(vm, [(0x10FFF, size), (0x10FFF, size)], include="all")
    mapped = 16 if profile == "kvm-2019" else 17  # in 2019 SET left the first page mapped
    assert resolutions(result) == ["mapped"] * mapped
    set_map(vm, 0x20, FULL & ~(1 << 31))
    result = replay(vm, [(0x10FFF, size)])
    assert exits(result, "gpa", "denied", "size") == [(0x20000, 1 << 31, size)]
    assert result.page_granular_violations == 1


def test_access_of_64_kbytes_over_two_regions_that_both_miss() -> None:
    vm = machine("kvm-latest")
    set_map(vm, 504, FULL & ~1)
    set_map(vm, 520, 1)
    rows = [((504 << 12) + 128, 0xFFFF)]
    assert replay(vm, rows).exits["spp_miss"] == 2
    assert replay(vm, rows, include="all").exit_columns.column("index").tolist() == []
    set_map(vm, 520, 2)
    assert resolutions(replay(vm, rows, include="all")) == ["armed", "sppt-filled", "violation"]


@pytest.mark.parametrize("kind", [READ, EXECUTE])
def test_reads_and_fetches_are_never_refused(vm: VirtualMachine, kind: int) -> None:
    set_map(vm, 0, 0, npages=16)
    result = replay(vm, [(gpa, 8, kind) for gpa in (0, 0x1FFC, SHUT, SHUT)] * 2)
    assert (result.violations, result.writes, result.page_granular_violations) == (0, 0, 0)
    assert result.exits["spp_miss"] == 0


# ---- on_violation


def test_skip_goes_on_and_violates_again(vm: VirtualMachine) -> None:
    result = replay(vm, [SHUT, OPEN, SHUT], on_violation="skip")
    assert (result.records, result.violations, result.stopped_at) == (3, 2, None)


def test_allow_goes_on_and_leaves_the_protection(vm: VirtualMachine) -> None:
    before = maps(vm, 5)
    result = replay(vm, [SHUT, SHUT], on_violation="allow")
    assert (result.records, result.violations) == (2, 2)
    assert maps(vm, 5) == before


def test_grant_opens_the_sub_page_once(vm: VirtualMachine) -> None:
    result = replay(vm, [SHUT, SHUT, 0x5280, 0x5300 - 4], on_violation="grant")
    assert result.violations == 3
    assert exits(result, "index", "denied") == [(0, 1 << 4), (2, 1 << 5), (3, 1 << 6)]
    assert maps(vm, 5) == [0x7F]
    assert vm.counters()["grants"] == 3
    assert replay(vm, [SHUT, 0x5300]).violations == 0


def test_grant_opens_every_refused_sub_page_of_the_access(vm: VirtualMachine) -> None:
    set_map(vm, 6, 0)
    assert replay(vm, [(0x5FF0, 32)] * 2, on_violation="grant").violations == 1
    assert maps(vm, 5, 2) == [0x8000_000F, 1]


def test_grant_of_a_page_that_becomes_full(vm: VirtualMachine) -> None:
    protect(vm, "p", (0x7000, 0x80))
    result = replay(vm, [0x7000, 0x7000, 0x7800], on_violation="grant", include="all")
    assert result.violations == 1
    assert result.page_granular_violations == 1, "the page is open from then on"
    assert maps(vm, 7) == [FULL]


def test_granted_access_that_leaves_memory_ends_as_mmio() -> None:
    vm = machine(slots=[SlotSpec(0, 0, MIB)])
    set_map(vm, 255, 0)
    result = replay(vm, [MIB - 4], on_violation="grant", include="all")
    assert (result.violations, result.mmio) == (1, 1)
    assert resolutions(result) == ["armed", "violation", "mmio"]
    assert result.exits["ept_violation"] == 3


def test_grant_leaves_protected_pages_without_a_slot_alone() -> None:
    slots = [SlotSpec(0, 0, MIB), SlotSpec(1, MIB, MIB)]
    vm = machine(slots=slots)
    protect(vm, "p", (MIB - 4, 8))
    vm.delete_slot(1)
    replay(vm, [MIB - 4], on_violation="grant")
    vm.set_slot(slots[1])
    assert maps(vm, 255, 2, "granted") == [1 << 31, 0]
    assert replay(vm, [MIB]).violations == 1


def test_stop_ends_at_the_record_and_start_goes_on_from_it(vm: VirtualMachine) -> None:
    rows = [OPEN, SHUT, OPEN, 0x5400, OPEN]
    first = replay(vm, rows, on_violation="stop")
    assert (first.stopped_at, first.records, first.violations) == (1, 1, 1)
    assert exits(first, "index") == [(1,)]
    again = replay(vm, rows, on_violation="stop", start=1)
    assert (again.stopped_at, again.records) == (1, 0), "the record was not run"
    set_map(vm, 5, 0x1F)
    second = replay(vm, rows, on_violation="stop", start=1)
    assert (second.stopped_at, second.records, exits(second, "index")) == (3, 2, [(3,)])
    last = replay(vm, rows, on_violation="skip", start=3)
    assert (last.stopped_at, last.records, last.violations) == (None, 2, 0), "counted where it stopped"


def test_stop_takes_no_more_chunks(vm: VirtualMachine) -> None:
    with vm.replay(ReplayOptions(on_violation="stop")) as run:
        assert run.feed(chunk([OPEN]))
        assert run.stopped_at is None
        assert not run.feed(chunk([OPEN, SHUT]))
        assert run.stopped_at == 2
        assert not run.feed(chunk([OPEN]))
        result = run.finish()
    assert (result.stopped_at, result.records) == (2, 2)
    assert vm.counters()["records"] == 2, "what came before is published"


# ---- going on where a replay stopped


def over(*results: TraceResult) -> dict[str, Any]:
    """The totals of several results, added up."""
    hits = {
        name: (
            sum(result.by_object[name].violations for result in results),
            sum(result.by_object[name].collateral for result in results),
        )
        for name in results[0].by_object
    }
    names = ("records", "writes", "violations", "page_granular_violations", "mmio")
    return {name: sum(getattr(result, name) for result in results) for name in names} | {"by_object": hits}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize("on_violation", ["skip", "allow", "grant"])
@pytest.mark.parametrize("size", [8, 0x300])
def test_stopping_violation_counts_once_over_the_results(profile: str, stop: int, on_violation: str, size: int) -> None:
    rows = [OPEN, OPEN + 8, (SHUT, size), (SHUT, size), OPEN, SHUT][2 - stop :]
    whole, vm = protected_guest(profile), protected_guest(profile)
    expected = over(replay(whole, rows, on_violation=on_violation))
    first = replay(vm, rows, on_violation="stop")
    assert (first.stopped_at, first.violations, first.records) == (stop, 1, stop)
    again = replay(vm, rows, on_violation="stop", start=stop, goes_on=True)
    assert (again.stopped_at, again.violations, again.page_granular_violations, len(again.exit_columns)) == (
        stop,
        0,
        0,
        1,
    )
    vm = round_trip(vm)
    last = replay(vm, rows, on_violation=on_violation, start=stop, goes_on=True)
    assert over(first, again, last) == expected
    assert vm.counters()["violations"] == whole.counters()["violations"]


@pytest.mark.parametrize("profile", PROFILES)
def test_sub_page_that_was_opened_meanwhile_is_no_second_violation(profile: str) -> None:
    rows = [OPEN, SHUT, OPEN]
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    first = replay(vm, rows, on_violation="stop")
    set_map(vm, 5, 0x1F)
    last = replay(vm, rows, on_violation="stop", start=1)
    assert (first.violations, last.violations, last.records, last.page_granular_violations) == (1, 0, 2, 0)
    assert over(first, last)["page_granular_violations"] == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_only_the_very_record_that_stopped_goes_on(profile: str) -> None:
    rows = [SHUT, SHUT, OPEN]

    def stopped() -> VirtualMachine:
        vm = protected_guest(profile)
        replay(vm, rows, on_violation="stop")
        return vm

    assert replay(stopped(), rows).violations == 2, "from the beginning: another run of the trace"
    assert replay(stopped(), rows, start=1).violations == 1, "another record"
    assert replay(stopped(), [(SHUT, 4), *rows[1:]], goes_on=True).violations == 2, "another access"
    between = stopped()
    replay(between, [OPEN])
    assert replay(between, rows, goes_on=True).violations == 2, "another replay came between"


def protected_guest(profile: str) -> VirtualMachine:
    vm = machine(profile)
    vm.protect("it", [ProtectedObject("mine", SHUT, 8), ProtectedObject("neighbour", SHUT + 16, 8)])
    return vm


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 100])
def test_start_skips_records_and_keeps_indices(vm: VirtualMachine, start: int) -> None:
    rows = [SHUT] * 6
    for split in ([rows], [rows[:1], rows[1:5], rows[5:]], [rows[:4], rows[4:]]):
        result = replay(vm, *split, start=start)
        assert result.records == max(0, 6 - start)
        assert exits(result, "index") == [(i,) for i in range(start, 6)]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("on_violation", ["skip", "allow", "grant"])
@pytest.mark.parametrize(
    ("circumstances", "endings"),
    [(0, (res.RUN_FAILED, res.RUN_FAILED)), (acc.DELIVERY, (res.INTERNAL_ERROR, res.RUN_FAILED))],
)
def test_what_ends_kvm_run_is_listed_and_passed_over(
    profile: str, on_violation: str, circumstances: int, endings: tuple[int, int]
) -> None:
    vm = machine(profile)
    replay(vm, [OPEN])
    store_leaf(vm, OPEN >> 12, lambda _: bits.WRITE)
    result = replay(vm, [OPEN, 0x1000], on_violation=on_violation, circumstances=circumstances)
    assert (result.records, result.violations, result.exits["ept_misconfiguration"]) == (2, 0, 1)
    assert exits(result, "index", "reason", "resolution") == [(0, 49, endings[PROFILES.index(profile)])]
    assert replay(vm, [OPEN, 0x1000], on_violation="stop").stopped_at == 0


# ---- bad records

ADDRESS = "below guest-physical address 2\\^52"
BAD = [
    ("size 0", OPEN, 1 << 16, "size", 0, "at least one byte"),
    ("access 3", OPEN, 8 | 3 << 16, "access", 3, "0 read, 1 write or 2 execute"),
    ("access 255", OPEN, 8 | 255 << 16, "access", 255, "0 read, 1 write or 2 execute"),
    ("unknown vCPU", OPEN, word1(vcpu=1), "vcpu", 1, "the id of a vCPU of this machine"),
    ("vCPU beyond all", OPEN, word1(vcpu=701), "vcpu", 701, "the id of a vCPU of this machine"),
    ("largest vCPU", OPEN, word1(vcpu=0xFFFF), "vcpu", 0xFFFF, "the id of a vCPU of this machine"),
    ("reserved byte", OPEN, word1() | 1 << 24, "record", word1() | 1 << 24, "must have zeros in its reserved bytes"),
    ("reserved half word", OPEN, word1() | 1 << 63, "record", word1() | 1 << 63, "reserved bytes"),
    ("all ones above the size", OPEN, 0xFFFF_FFFF_FFFF_0008, "access", 255, "0 read, 1 write or 2 execute"),
    ("runs past 2^52", (1 << 52) - 4, word1(), "gpa", (1 << 52) - 4, ADDRESS),
    ("at 2^52", 1 << 52, word1(), "gpa", 1 << 52, ADDRESS),
    ("bit 63", 1 << 63, word1(), "gpa", 1 << 63, ADDRESS),
    ("last address", (1 << 64) - 1, word1(), "gpa", (1 << 64) - 1, ADDRESS),
    ("sum wraps", (1 << 63) - 4, word1(), "gpa", (1 << 63) - 4, ADDRESS),
]


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize(
    ("gpa", "word", "field", "value", "rule"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_record_is_refused_with_its_index_and_nothing_is_applied(
    gpa: int, word: int, field: str, value: int, rule: str, before: int
) -> None:
    vm = machine(vcpus=(0, 3, 700))
    set_map(vm, 5, 0xF)
    good = records([OPEN, (OPEN, 8, READ), SHUT] * 2)[:before]
    words = np.concatenate([good, np.array([[gpa, word]], dtype=np.uint64), records([OPEN])])
    with refused(vm, TraceError, field, value, rule):
        replay(vm, chunk(words), on_violation="grant")
    with unchanged(vm), pytest.raises(TraceError) as caught:
        replay(vm, chunk(words[:before]), chunk(words[before:]))
    assert caught.value.index == before, "absolute, whatever the chunks"
    assert replay(vm, chunk(words), start=before + 1).records == 1, "records before start are not looked at"


@pytest.mark.parametrize("gpa", [(1 << 52) - 8, (1 << 46), (1 << 51)])
def test_last_address_of_all_is_no_error(gpa: int) -> None:
    result = replay(machine(), [gpa])
    assert (result.records, result.mmio) == (1, 1)


OPTIONS = [
    ({"on_violation": "wait"}, "on_violation", "wait", "one of skip, stop, allow, grant, ask"),
    ({"include": "none"}, "include", "none", "one of violations, all"),
    ({"start": -1}, "start", -1, "must not be negative"),
    ({"max_exit_records": -1}, "max_exit_records", -1, "must not be negative"),
]


@pytest.mark.parametrize(("options", "field", "value", "rule"), OPTIONS)
def test_options_that_mean_nothing(options: dict[str, Any], field: str, value: Any, rule: str) -> None:
    vm = machine()
    with refused(vm, InvalidValue, field, value, rule):
        vm.replay(ReplayOptions(**options))


# ---- exit records


@pytest.mark.parametrize("limit", [0, 1, 3, 5, 6])
def test_kept_exit_records_are_bounded_and_totals_are_exact(
    vm: VirtualMachine, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    protect(vm, "p", (SHUT, 8))
    for rows in (1 << 15, 140):
        monkeypatch.setattr(session, "LOG_ROWS", rows)
        result = replay(vm, [SHUT] * 5, max_exit_records=limit)
        assert (result.violations, result.by_object["p"].violations) == (5, 5)
        assert len(result.exit_columns) == min(limit, 5)
        assert result.exit_records_dropped == 5 - min(limit, 5)
        assert exits(result, "index") == [(i,) for i in range(min(limit, 5))]


def test_full_exit_buffer_is_drained_on_the_way(vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LOG_ROWS", 135)
    carried = np.arange(100, dtype=np.uint32)
    result = replay(vm, chunk([SHUT, OPEN] * 50, carry={"pc": carried}), carry=("pc",))
    assert result.violations == len(result.exit_columns) == 50
    assert result.exit_columns.carry["pc"].tolist() == list(range(0, 100, 2))


def test_all_exits_are_listed_in_order(vm: VirtualMachine) -> None:
    result = replay(vm, [OPEN, 0x5000, SHUT, HOLE], include="all")
    filled = ["sppt-filled"] if vm.config.profile == "kvm-latest" else []
    assert resolutions(result) == ["mapped", "armed", *filled, "violation", "mmio"]
    assert [row[0] for row in exits(result, "index")] == [0, 1, *([1] if filled else []), 2, 3]


def test_carried_columns_go_with_the_exits(vm: VirtualMachine) -> None:
    first = chunk([OPEN, SHUT], carry={"pc": np.array([1, 2], np.uint64), "as": np.array([b"a", b"b"])})
    second = chunk([SHUT, OPEN, SHUT], carry={"pc": np.array([3, 4, 5], np.uint64), "as": np.array([b"c", b"d", b"e"])})
    result = replay(vm, first, second, carry=("as", "pc"))
    assert list(result.exit_columns.carry) == ["as", "pc"]
    assert result.exit_columns.carry["pc"].tolist() == [2, 3, 5]
    assert result.exit_columns.carry["as"].tolist() == [b"b", b"c", b"e"]
    assert result.exit_columns[1:].carry["pc"].tolist() == [3, 5]


def test_carried_columns_are_copies(vm: VirtualMachine) -> None:
    """Readers fill the same memory again."""
    column = np.array([7, 8], np.uint64)
    with vm.replay(ReplayOptions(carry=("pc",))) as run:
        run.feed(chunk([SHUT, SHUT], carry={"pc": column}))
        column[:] = 0
        assert run.finish().exit_columns.carry["pc"].tolist() == [7, 8]


def test_linear_addresses(vm: VirtualMachine) -> None:
    top = 0xFFFF_FFFF_8000_5200
    result = replay(vm, chunk([OPEN, SHUT], gva=[1, top]), chunk([SHUT], gva=[2]))
    assert result.exit_columns.has_gva
    assert exits(result, "index", "gva") == [(1, top), (2, 2)]
    assert not replay(vm, [SHUT]).exit_columns.has_gva


def test_vcpus_by_id(vm: VirtualMachine) -> None:
    result = replay(vm, [(SHUT, 8, WRITE, 700), (SHUT, 8, WRITE, 0), (SHUT, 8, WRITE, 3), (OPEN, 8, WRITE, 3)])
    assert exits(result, "vcpu") == [(700,), (0,), (3,)]


def test_vcpu_id_between_two_others_is_refused() -> None:
    vm = machine(vcpus=(0, 2))
    with pytest.raises(TraceError) as caught:
        replay(vm, [(0x5000, 8, WRITE, 1)])
    assert caught.value.field == "vcpu"


def test_body_in_read_only_memory_is_not_written(vm: VirtualMachine) -> None:
    words = records([OPEN, SHUT])
    words.flags.writeable = False
    assert replay(vm, chunk(words)).violations == 1


# ---- one transaction


def test_progress_is_seen_while_it_runs(vm: VirtualMachine) -> None:
    with vm.replay(ReplayOptions()) as run:
        assert run.records_done == 0
        run.feed(chunk([OPEN] * 10))
        assert run.records_done == 10
        assert vm.counters()["records"] == 0
        run.finish()
    assert vm.counters()["records"] == 10


def test_leaving_without_finish_changes_nothing(vm: VirtualMachine) -> None:
    with unchanged(vm), vm.replay(ReplayOptions(on_violation="grant")) as run:
        run.feed(chunk([SHUT, OPEN]))


def test_failure_inside_changes_nothing(vm: VirtualMachine) -> None:
    def fail() -> None:
        with vm.replay(ReplayOptions(on_violation="grant")) as run:
            run.feed(chunk([SHUT, OPEN]))
            raise KeyError

    with unchanged(vm), pytest.raises(KeyError):
        fail()


def test_failure_before_it_begins_lets_the_writer_go(vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    with unchanged(vm):
        monkeypatch.setattr("engine.machine.traces.TimedReplay", fail)
        with pytest.raises(MemoryError):
            vm.replay(ReplayOptions())


def test_failure_while_publishing_changes_nothing(vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    with unchanged(vm):
        monkeypatch.setattr(vm.state.store, "publish", fail)
        with pytest.raises(MemoryError):
            replay(vm, [SHUT])
        monkeypatch.undo()


def test_replay_that_needs_more_frames_than_are_at_hand_goes_on() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 44)])
    result = replay(vm, [(i << 30) + 8 for i in range(900)])
    assert (result.records, result.exits["ept_violation"]) == (900, 900)
    assert vm.counters()["frames_ept"] > 1800


def test_write_after_a_read_sets_the_dirty_flag() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5000))
    store_leaf(vm, 5, lambda entry: entry & ~bits.DIRTY)
    replay(vm, [(0x5000, 8, READ), (0x5000, 8, WRITE)])
    entry = leaf(vm, 5)
    assert entry is not None and entry & bits.DIRTY


# ---- splits, and the fast path

Rows = list[tuple[int, int, int, int]]


def mixed(seed: int, count: int) -> Rows:
    """Accesses of every kind around a few pages, most of them on pages that are already known."""
    rng = np.random.default_rng(seed)
    pages = rng.choice([4, 5, 6, 7, 8, 1024, 0x1005], size=count, p=[0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    offsets = rng.integers(0, 4096, count)
    sizes = rng.choice([1, 8, 64, 300, 9000], size=count, p=[0.2, 0.5, 0.15, 0.1, 0.05])
    kinds = rng.choice([READ, WRITE, EXECUTE], size=count, p=[0.25, 0.65, 0.1])
    vcpus = rng.choice([0, 3], size=count)
    return [
        (int(p) * 4096 + int(o), int(s), int(k), int(v))
        for p, o, s, k, v in zip(pages, offsets, sizes, kinds, vcpus, strict=True)
    ]


def guarded(profile: str, **config: Any) -> VirtualMachine:
    slots = [SlotSpec(0, 0, 4 * MIB), SlotSpec(1, 0x1000 << 12, MIB, read_only=True)]
    vm = machine(profile, slots=slots, vcpus=(0, 3), **config)
    vm.set_subpages([])
    set_map(vm, 5, 0xFF00_FFFF)
    set_map(vm, 7, 0)
    protect(vm, "p", (0x6080, 0x100), (0x5800, 1))
    protect(vm, "q", (0x6000, 0x2000))
    return vm


def pieces(rows: Rows, *cuts: int) -> list[Rows]:
    bounds = [0, *cuts, len(rows)]
    return [rows[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("on_violation", ["skip", "allow", "grant"])
def test_any_split_gives_the_same(profile: str, on_violation: str) -> None:
    rows = mixed(1, 240)
    options = {"on_violation": on_violation, "include": "all"}
    whole_vm = guarded(profile)
    whole = replay(whole_vm, rows, **options)
    for cuts in ((1, 2, 3), (120,), tuple(range(10, 240, 10))):
        chunked_vm, called_vm = guarded(profile), guarded(profile)
        chunked = replay(chunked_vm, *pieces(rows, *cuts), **options)
        assert totals(chunked) == totals(whole)
        names = list(whole.exit_columns.columns)
        assert exits(chunked, *names) == exits(whole, *names)
        results = [replay(called_vm, part, **options) for part in pieces(rows, *cuts)]
        assert sum(r.violations for r in results) == whole.violations
        assert sum(r.page_granular_violations for r in results) == whole.page_granular_violations
        for name in ("p", "q"):
            assert sum(r.by_object[name].violations for r in results) == whole.by_object[name].violations
            assert sum(r.by_object[name].collateral for r in results) == whole.by_object[name].collateral
        for kind, count in whole.exits.items():
            assert sum(r.exits[kind] for r in results) == count
        assert picture(chunked_vm)[1] == picture(called_vm)[1] == picture(whole_vm)[1]


def without_fast_path(vm: VirtualMachine, rows: Sequence[Any], **options: Any) -> Any:
    """Replay with the cache dropped before every record."""
    with vm.replay(ReplayOptions(**options)) as run:
        for row in rows:
            fastpath.forget_all(run._replay._draft.machine)
            run.feed(chunk([row]))
        return run.finish()


def assert_fast_path_is_invisible(made: list[VirtualMachine], rows: Sequence[Any], **options: Any) -> None:
    options["include"] = "all"
    kept = replay(made[0], rows, **options)
    dropped = without_fast_path(made[1], rows, **options)
    assert totals(kept) == totals(dropped)
    names = list(kept.exit_columns.columns)
    assert exits(kept, *names) == exits(dropped, *names)
    assert picture(made[0])[1] == picture(made[1])[1]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("on_violation", ["skip", "allow", "grant"])
@pytest.mark.parametrize("seed", [2, 3])
def test_dropping_the_fast_path_changes_no_answer(profile: str, on_violation: str, seed: int) -> None:
    made = [guarded(profile) for _ in range(2)]
    assert_fast_path_is_invisible(made, mixed(seed, 150), on_violation=on_violation)


RAW_LEAVES = [
    ("accessed flag clear", lambda entry: entry & ~bits.ACCESSED),
    ("dirty flag clear", lambda entry: entry & ~bits.DIRTY),
    ("both flags clear", lambda entry: entry & ~(bits.ACCESSED | bits.DIRTY)),
    ("no execute", lambda entry: entry & ~bits.EXECUTE),
    ("execute only", lambda entry: entry & ~(bits.READ | bits.WRITE)),
    ("not armed", lambda entry: entry & ~bits.SPP),
    ("armed", lambda entry: entry & ~bits.WRITE | bits.SPP),
    ("writable", lambda entry: entry | bits.WRITE),
    ("misconfigured", lambda entry: entry | 0x38),
]


@pytest.mark.parametrize("mask", [0, 0xF, FULL])
@pytest.mark.parametrize("change", [row[1] for row in RAW_LEAVES], ids=[row[0] for row in RAW_LEAVES])
@pytest.mark.parametrize("on_violation", ["skip", "grant"])
def test_dropping_the_fast_path_changes_no_answer_on_entries_that_a_client_made(
    mask: int, change: Any, on_violation: str
) -> None:
    made = [machine() for _ in range(2)]
    for vm in made:
        set_map(vm, 5, mask)
        vm.access(AccessRequest(0x5000))
        store_leaf(vm, 5, change)
    kinds = [(SHUT, 8, WRITE), (SHUT, 8, READ), (SHUT, 8, EXECUTE), (0x5000, 8, WRITE), (SHUT, 8, WRITE)]
    assert_fast_path_is_invisible(made, kinds + kinds[::-1], on_violation=on_violation)
