"""Traces by the guest's linear addresses: the same as by GPA, through real page tables (design, "Addresses")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.cpu.frames import FIRST_VCPU_FRAME, write_word
from engine.errors import TraceError
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.trace.columns import TraceChunk
from engine.trace.interactive import InteractiveReplay
from engine.trace.operations import NO_SPACE, Operation, Operations
from engine.trace.results import TraceResult
from engine.trace.session import MOST_UNTRANSLATED, ReplayOptions
from tests.engine import builders as b
from tests.support.guest_pages import MODES, GuestPages, K, M

KERNEL = 0xFFFF_FFFF_8100_0000
ROOT = 2 * M
SLOTS = (SlotSpec(0, 0, 64 * M),)


def guest(mode: str = "4-level", *, root: int = ROOT, vcpus: Sequence[int] = (0,), **config: Any) -> tuple[Any, Any]:
    """A machine of 64 MBytes and page tables at 2 MBytes that nothing is mapped by yet."""
    return b.machine(slots=SLOTS, vcpus=vcpus, **config), GuestPages(MODES[mode], root)


def load(vm: VirtualMachine, pages: GuestPages, *positions: int) -> None:
    pages.store(vm.write_memory)
    for position in positions or (0,):
        b.edit(vm, lambda m, position=position: pages.load(m, position))


def by_gva(vm: VirtualMachine, rows: Sequence[Any], **options: Any) -> TraceResult:
    """Replay rows whose addresses are linear, as packed records have them."""
    return b.replay(vm, rows, address="gva", **options)


def columns(result: TraceResult) -> dict[str, list[Any]]:
    """All columns of all exit records but the linear address, and the objects of each."""
    found = result.exit_columns
    values = {name: column.tolist() for name, column in found.columns.items() if name != "gva"}
    return values | {"objects": found.objects(), "record_gpa": found.record_gpa.tolist()}


def linear(mode: str) -> int:
    """Where the tests have their pages: the kernel's half, where there is one."""
    return KERNEL if MODES[mode].entry == 8 and MODES[mode].levels > 3 else 0xC100_0000


# A kernel's picture: a large page with the text, and small ones that are scattered, some of them in order.
LAYOUT = (
    (0x000_000, 16 * M, 2),
    (0x400_000, 32 * M + 12 * K, 1),
    (0x401_000, 32 * M + 16 * K, 1),
    (0x402_000, 32 * M + 4 * K, 1),
    (0x403_000, 48 * M, 1),
)


def mapped(mode: str) -> tuple[VirtualMachine, VirtualMachine, dict[int, int]]:
    """Two machines of one policy, the first with page tables; and the GPA of each 4-KByte page of LAYOUT."""
    vm, pages = guest(mode)
    flat = b.machine(slots=SLOTS)
    base, where = linear(mode), {}
    for offset, gpa, level in LAYOUT:
        size = MODES[mode].pages[level]
        pages.map(base + offset, gpa, level)
        where |= {base + offset + at: gpa + at for at in range(0, size, 4 * K)}
    load(vm, pages)
    for machine in (vm, flat):
        machine.protect("text", [b.ProtectedObject("text", 16 * M + 0x1080, 0x100)])
        machine.protect("data", [b.ProtectedObject("data", 32 * M + 16 * K + 0xF80, 0x80)])
    return vm, flat, where


@pytest.mark.parametrize("mode", MODES)
def test_the_same_trace_by_gpa_and_by_gva(mode: str) -> None:
    vm, flat, where = mapped(mode)
    rng = np.random.default_rng(4)
    gvas, gpas = [], []
    for page in rng.choice(sorted(where), 300).tolist() + [linear(mode) + 0x1000, linear(mode) + 0x401_000] * 20:
        offset, size = int(rng.integers(0, 4096 // 64)) * 64, int(rng.choice([1, 8, 64]))
        row = (size, int(rng.integers(0, 3)), 0)
        gvas.append((page + offset, *row))
        gpas.append((where[page] + offset, *row))
    for offset in (0x401_F80, 0x1080, 0x401_F80):
        gvas.append((linear(mode) + offset, 8))
        gpas.append((where[linear(mode) + offset - offset % 4096] + offset % 4096, 8))
    options = {"include": "all", "on_violation": "grant"}
    mine, theirs = by_gva(vm, gvas, **options), b.replay(flat, gpas, **options)
    assert b.totals(mine) == b.totals(theirs)
    assert columns(mine) == columns(theirs)
    assert mine.violations
    at = mine.exit_columns.column("index").tolist()
    assert mine.exit_columns.column("gva").tolist() == [gvas[i][0] for i in at]
    assert not mine.untranslated


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(MODES)), st.data())
def test_random_tables_lead_where_they_say(mode: str, data: st.DataObject) -> None:
    vm, pages = guest(mode)
    flat = b.machine(slots=SLOTS)
    rows, gpas, lost = [], [], []
    base, level_of = linear(mode), {}
    for number in data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5, unique=True)):
        level = data.draw(st.sampled_from([1, 2]))
        size = MODES[mode].pages[level]
        gpa = data.draw(st.integers(8 * M // size, 64 * M // size - 1)) * size
        pages.map(base + number * 4 * M, gpa, level)
        level_of[number] = (gpa, size)
    load(vm, pages)
    for machine in (vm, flat):
        machine.protect("all", [b.ProtectedObject("low", 8 * M, 16 * M)])
    for index in range(data.draw(st.integers(1, 12))):
        number, offset = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 4 * M - 8))
        rows.append((base + number * 4 * M + offset, 8 if offset % 4096 <= 4088 else 1))
        gpa, size = level_of.get(number, (0, 0))
        if offset < size:
            gpas.append((gpa + offset, rows[-1][1]))
        else:
            lost.append(index)
    mine, theirs = by_gva(vm, rows), b.replay(flat, gpas)
    assert b.totals(mine) | {"by_object": 0} == b.totals(theirs) | {"by_object": 0}
    assert mine.untranslated == len(lost)
    assert [item.index for item in mine.untranslated_records] == lost
    assert mine.exit_columns.column("gpa").tolist() == theirs.exit_columns.column("gpa").tolist()
    kept = [index for index in range(len(rows)) if index not in lost]
    assert mine.exit_columns.column("index").tolist() == [
        kept[at] for at in theirs.exit_columns.column("index").tolist()
    ]


@pytest.mark.parametrize(
    ("mode", "address", "level"),
    [
        ("4-level", 0x0000_8000_0000_0000, 0),
        ("4-level", 0, 4),
        ("4-level", KERNEL + 0x200_0000, 2),
        ("4-level", KERNEL + 0x40_4000, 1),
        ("5-level", KERNEL, None),
        ("5-level", 0, 5),
        ("5-level", 0x00FF_0000_0000_0000, 5),
        ("pae", 0, 3),
        ("pae", 0xC300_0000, 2),
        ("32-bit", 0x40_0000, 2),
        ("32-bit", 0xC140_4000, 1),
    ],
)
def test_what_does_not_translate_is_no_access(mode: str, address: int, level: int | None) -> None:
    vm, _, where = mapped(mode)
    known = min(where)
    result = by_gva(vm, [known, address, known])
    assert result.records == (3 if level is None else 2)
    told = [(item.index, item.gva, item.level) for item in result.untranslated_records]
    assert told == ([] if level is None else [(1, address, level)])
    assert vm.counters()["untranslated"] == len(told) == result.untranslated


def test_reserved_bits_lead_nowhere_and_permissions_are_not_asked() -> None:
    vm, pages = guest()
    pages.map(KERNEL, 16 * M | 1 << 13, 2)  # bit 13 of a 2-MByte page is reserved
    pages.map(KERNEL + 0x200_000, 20 * M, 1, flags=1)  # read only, of the supervisor, not to be executed
    load(vm, pages)
    b.edit(vm, lambda m: write_word(m, FIRST_VCPU_FRAME, ctl.V_CPL, 3))
    before = [vm.read_memory(slot, 8) for slot in pages.entries]
    result = by_gva(vm, [KERNEL, KERNEL + 0x200_000, (KERNEL + 0x200_000, 8, b.EXECUTE)])
    assert (result.records, result.untranslated, result.mmio) == (2, 1, 0)
    assert (result.untranslated_records[0].index, result.untranslated_records[0].level) == (0, 2)
    assert [vm.read_memory(slot, 8) for slot in pages.entries] == before


def test_tables_that_loop_end_by_their_levels() -> None:
    vm, pages = guest()
    pages.entries[ROOT + 8 * 511] = ROOT | 3  # the root is its own table, at every level
    load(vm, pages)
    result = by_gva(vm, [0xFFFF_FFFF_FFFF_F000])
    assert (result.records, result.untranslated) == (1, 0)


def test_first_ones_are_listed_and_all_are_counted() -> None:
    vm, pages = guest()
    pages.map(KERNEL, 16 * M, 2)
    load(vm, pages)
    rows = [at for i in range(MOST_UNTRANSLATED + 50) for at in (KERNEL + 8 * i, 0x1000 * i)]
    result = by_gva(vm, rows)
    assert (result.records, result.untranslated) == (MOST_UNTRANSLATED + 50,) * 2
    assert [item.index for item in result.untranslated_records] == list(range(1, 2 * MOST_UNTRANSLATED, 2))


def test_nothing_is_counted_beyond_a_stop() -> None:
    vm, pages = guest()
    pages.map(KERNEL, 16 * M, 2)
    load(vm, pages)
    b.protect(vm, "p", (16 * M, 128))
    rows = [0x1000, KERNEL + 0x1000, KERNEL, 0x2000, KERNEL + 0x2000]
    result = by_gva(vm, rows, on_violation="stop")
    assert (result.stopped_at, result.records, result.untranslated, result.violations) == (2, 1, 1, 1)
    result = by_gva(vm, rows, on_violation="skip", start=2)
    assert (result.records, result.untranslated, result.violations) == (2, 1, 0), "the violation counts once"


# ---- frames that are no neighbours


def scattered(size: int = 16, **options: Any) -> tuple[VirtualMachine, TraceResult, int]:
    """A write over the end of the second page of LAYOUT, whose frame is followed by no frame of the third's."""
    vm, _, _ = mapped("4-level")
    at = KERNEL + 0x402_000 - 8
    return vm, by_gva(vm, [KERNEL, (at, size), KERNEL], **options), at


def test_a_record_over_two_frames_is_one_record_with_two_checks() -> None:
    _, result, at = scattered(include="all")
    assert (result.records, result.writes, result.violations) == (3, 3, 1)
    assert b.exits(result, "index", "gpa", "gva", "size", "subpages", "denied", "resolution")[-1] == (
        *(1, 32 * M + 20 * K - 8, at, 16, 1 << 31, 1 << 31),
        b.exits(result, "resolution")[-1][0],
    )
    assert result.exit_columns.objects()[-1] == ["data"]
    assert result.by_object["data"].violations == 1
    assert result.page_granular_violations == 1


def test_the_far_part_refuses_and_is_what_the_exit_reports() -> None:
    vm, _, _ = mapped("4-level")
    b.protect(vm, "far", (32 * M + 4 * K, 4))
    at = KERNEL + 0x402_000 - 8
    result = by_gva(vm, [(at, 16)])
    assert result.violations == 1, "the near part is checked first"
    vm.unprotect("data")
    result = by_gva(vm, [(at, 16), (at, 16)], include="all")
    last = b.exits(result, "index", "gpa", "gfn", "subpages", "denied", "gva")[-1]
    assert last == (1, 32 * M + 4 * K, 8193, 1, 1, at)
    (name,) = set(result.by_object) - {"text"}
    hits = result.by_object[name]
    assert (hits.violations, hits.collateral, hits.first_index) == (2, 0, 0)
    assert result.exit_columns.objects()[-1] == [name]


def test_neighbours_in_another_order_are_as_good_as_one_run() -> None:
    """The same bytes as two runs that touch, and as one: everything but the linear addresses is the same."""
    vm, pages = guest()
    flat = b.machine(slots=SLOTS)
    for i in range(4):
        pages.map(KERNEL + i * 0x1000, 16 * M + i * 0x1000)
    load(vm, pages)
    for machine in (vm, flat):
        b.protect(machine, "p", (16 * M + 0x1FF0, 64), (16 * M + 0x3000, 1))
    rows = [(0xFF8, 16), (0x1FF8, 16), (0xF00, 0x2200), (0x2FFC, 8), (0x10, 0x3FE0), (0xFF8, 16, b.READ)]
    for options in ({"on_violation": "skip"}, {"on_violation": "allow"}, {"on_violation": "grant"}):
        mine = by_gva(vm, [(KERNEL + at, *rest) for at, *rest in rows], include="all", **options)
        theirs = b.replay(flat, [(16 * M + at, *rest) for at, *rest in rows], include="all", **options)
        assert (b.totals(mine), columns(mine)) == (b.totals(theirs), columns(theirs))


def test_split_over_many_frames() -> None:
    vm, pages = guest()
    for i in range(17):
        pages.map(KERNEL + i * 0x1000, 16 * M + (17 - i) * 0x2000)
    load(vm, pages)
    b.protect(vm, "last", (16 * M + 0x2000 + 8, 1))
    result = by_gva(vm, [(KERNEL + 0xFF0, 0xF010), (KERNEL + 0x1FF0, 0xE010)], include="all")
    assert (result.records, result.violations) == (2, 0), "both end with the page before"
    result = by_gva(vm, [(KERNEL + 0xFF0, 0xF030)], include="all")
    assert (result.records, result.violations) == (1, 1)
    assert b.exits(result, "gpa", "denied")[-1] == (16 * M + 0x2000, 1)
    assert result.exit_columns.objects()[-1] == result.exit_columns[-1:].objects()[0] != []


def test_grants_and_answers_reach_both_frames() -> None:
    vm, _, _ = mapped("4-level")
    b.protect(vm, "far", (32 * M + 4 * K, 4))
    at = KERNEL + 0x402_000 - 8
    result = by_gva(vm, [(at, 16), (at, 16)], on_violation="grant")
    assert (result.violations, result.writes) == (1, 2)
    for gfn, bit in ((8196, 31), (8193, 0)):
        assert vm.subpages(gfn, 1, "granted").tolist() == [1 << bit]


@pytest.mark.parametrize("action", ["skip", "allow", "grant", "retry"])
def test_an_interactive_replay_asks_about_both_frames(action: str) -> None:
    vm, _, _ = mapped("4-level")
    at = KERNEL + 0x402_000 - 8
    replaying: InteractiveReplay | None = None
    with vm.replay(ReplayOptions(on_violation="ask", address="gva")) as run:
        assert isinstance(run.replay, InteractiveReplay)
        replaying = run.replay
        assert not run.feed(b.chunk([KERNEL, 0x10, (at, 16), KERNEL + 8]))
        assert replaying.asked.objects() == [["data"]]
        assert replaying.asked.column("gva").tolist() == [at]
        run.pause()
    if action == "retry":
        vm.unprotect("data")
    with vm.replay(ReplayOptions(on_violation="ask", address="gva"), replaying) as run:
        assert replaying.answer(action)
        result = run.finish()
    assert (result.records, result.writes, result.untranslated, result.violations) == (3, 3, 1, 1)
    assert vm.subpages(8196, 1, "granted").tolist() == ([1 << 31] if action == "grant" else [0])


def test_an_answer_is_about_its_own_record_though_a_later_one_is_translated() -> None:
    """Translation has run ahead to the record whose frames are no neighbours when the first one pauses."""
    at = KERNEL + 0x402_000 - 8
    rows = [(at - 0xF8, 8), (at - 0xE00, 8), (at, 16)]
    results = []
    for on_violation in ("allow", "ask"):
        vm, _, _ = mapped("4-level")
        vm.unprotect("data")
        b.protect(vm, "near", (32 * M + 16 * K + 0xF00, 0x80))
        b.protect(vm, "far", (32 * M + 4 * K, 4))
        options = ReplayOptions(on_violation=on_violation, address="gva")
        with vm.replay(options) as run:
            going = run.feed(b.chunk(rows))
            while on_violation == "ask" and not going:
                assert isinstance(run.replay, InteractiveReplay)
                going = run.replay.answer("allow")
            results.append(run.finish())
    allowed, asked = results
    assert (b.totals(asked), columns(asked)) == (b.totals(allowed), columns(allowed))
    assert asked.exit_columns.objects() == [["near"], ["far"]]
    assert asked.by_object["far"].first_index == 2


def test_memory_that_changes_at_a_pause_is_walked_again() -> None:
    """Translations go by the tables as they are when a record is reached."""
    vm, pages = guest()
    pages.map(KERNEL, 16 * M)
    load(vm, pages)
    b.protect(vm, "p", (16 * M, 128))
    with vm.replay(ReplayOptions(on_violation="ask", address="gva")) as run:
        assert isinstance(run.replay, InteractiveReplay)
        replaying = run.replay
        assert not run.feed(b.chunk([KERNEL, KERNEL]))
        run.pause()
    vm.write_memory(pages.slot(KERNEL, 1), (20 * M | 3).to_bytes(8, "little"))
    with vm.replay(ReplayOptions(on_violation="ask", address="gva"), replaying) as run:
        assert replaying.answer("skip")
        assert run.finish().violations == 1


# ---- whose tables


def spaces(values: Sequence[int | None]) -> Operations:
    column = np.array([NO_SPACE if value is None else value for value in values], dtype=np.uint64)
    return Operations(np.zeros(0, dtype=np.int64), (), column)


@pytest.mark.parametrize("mode", MODES)
def test_a_record_may_have_an_address_space_of_its_own(mode: str) -> None:
    vm, first = guest(mode)
    second = GuestPages(MODES[mode], 34 * M)  # in the same row of the cache as 2 MBytes
    at = linear(mode)
    first.map(at, 16 * M)
    second.map(at, 20 * M)
    load(vm, second)
    load(vm, first)
    for page in (16, 20):
        b.protect(vm, str(page), (page * M, 8))
    part = replace(b.chunk([at] * 5), operations=spaces([None, 34 * M, 2 * M, 34 * M, None]))
    result = b.replay(vm, part, address="gva")
    assert [gpa // M for (gpa,) in b.exits(result, "gpa")] == [16, 20, 16, 20, 16]


def test_each_vcpu_has_tables_of_its_own() -> None:
    vm, first = guest(vcpus=(0, 7))
    second = GuestPages(MODES["32-bit"], 3 * M)
    first.map(0x1000, 16 * M)
    second.map(0x1000, 20 * M)
    load(vm, first, 0)
    load(vm, second, 1)
    b.protect(vm, "p", (16 * M, 8), (20 * M, 8))
    result = by_gva(vm, [(0x1000, 8, b.WRITE, vcpu) for vcpu in (0, 7, 0)])
    assert [gpa // M for (gpa,) in b.exits(result, "gpa")] == [16, 20, 16]


# ---- which column, and what is refused


def test_gva_has_the_address_where_there_are_two_columns() -> None:
    vm, _, where = mapped("4-level")
    part = b.chunk([0xDEAD_0000, 0], gva=[KERNEL + 0x1080, KERNEL + 0x2000])
    result = b.replay(vm, part, address="gva")
    assert b.exits(result, "index", "gpa", "gva") == [(0, where[KERNEL + 0x1000] + 0x80, KERNEL + 0x1080)]


def test_flat_takes_a_linear_address_for_a_gpa() -> None:
    vm = b.machine(slots=SLOTS)
    b.protect(vm, "p", (16 * M, 8))
    without = replace(b.chunk([0], gva=[16 * M]), has_gpa=False)
    for part in (b.chunk([16 * M]), b.chunk([4096], gva=[16 * M]), without):
        result = b.replay(vm, part, address="flat")
        assert b.exits(result, "gpa", "gva") == [(16 * M, 16 * M)]
    with pytest.raises(TraceError, match=r"2\^52"):
        b.replay(vm, [KERNEL], address="flat")


def test_a_trace_without_gpa_needs_to_say_what_its_addresses_are() -> None:
    vm = b.machine()
    with pytest.raises(TraceError, match="address=gva") as caught:
        b.replay(vm, replace(b.chunk([0], gva=[16 * M]), has_gpa=False))
    assert (caught.value.index, caught.value.field) == (0, "gpa")


def record_of(word: int) -> TraceChunk:
    return TraceChunk(np.array([[KERNEL, b.word1()], [KERNEL, word]], dtype=np.uint64), None, {}, kinds=True)


REFUSED = {
    "host": (acc.record_bits(acc.DATA, acc.LINEAR_VALID, acc.HOST, 0), "address"),
    "paging": (acc.record_bits(acc.PAGING_UPDATE, acc.LINEAR_VALID, acc.GUEST, 0), "address"),
    "vcpu": (9 << 32, "vcpu"),
    "access": (4 << 16, "access"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_records_without_a_linear_address_are_refused(name: str) -> None:
    vm, pages = guest()
    pages.map(KERNEL, 16 * M)
    load(vm, pages)
    bits, field = REFUSED[name]
    with b.unchanged(vm), pytest.raises(TraceError) as caught:
        b.replay(vm, record_of(b.word1() | bits), address="gva")
    assert (caught.value.index, caught.value.field) == (1, field)


def test_a_record_without_bytes_is_refused_wherever_it_leads() -> None:
    vm, _ = guest()
    with pytest.raises(TraceError, match="one byte") as caught:
        by_gva(vm, [(0x1000, 8), (0x2000, 0)])
    assert caught.value.index == 1


def test_a_vcpu_in_guest_mode_has_no_tables_to_walk() -> None:
    vm, pages = guest()
    load(vm, pages)
    b.edit(vm, lambda m: write_word(m, FIRST_VCPU_FRAME, ctl.V_GUEST_MODE, 1))
    with pytest.raises(TraceError) as caught:
        by_gva(vm, [KERNEL])
    assert caught.value.field == "vcpu"


def test_an_address_space_is_a_value_of_cr3() -> None:
    vm, pages = guest()
    load(vm, pages)
    part = replace(b.chunk([KERNEL] * 2), operations=spaces([None, 1 << 60]))
    with pytest.raises(TraceError) as caught:
        b.replay(vm, part, address="gva")
    assert (caught.value.index, caught.value.field, caught.value.value) == (1, "address_space", 1 << 60)


def test_operations_and_the_model_want_gpas() -> None:
    operation = Operation(1, 3, None, KERNEL, None)
    between = Operations(np.array([1]), (operation,), np.zeros(0, dtype=np.uint64))
    with_operation = replace(b.chunk([KERNEL] * 2), operations=between)
    with_space = replace(b.chunk([KERNEL] * 2), operations=spaces([None, ROOT]))
    vm, pages = guest(translation_cache="model")
    pages.map(KERNEL, 16 * M)
    load(vm, pages)
    for part in (with_operation, with_space):
        with pytest.raises(TraceError) as caught:
            b.replay(vm, part, address="gva")
        assert (caught.value.index, caught.value.field) == (1, "address")
    assert by_gva(vm, [KERNEL] * 2).records == 2


@pytest.mark.parametrize("profile", b.PROFILES)
def test_an_access_over_two_frames_stays_in_the_address_space_of_its_vcpu(profile: str) -> None:
    """In SMM the second page is SMRAM; the page of address space 0 at the same GPA, which is protected, is another."""
    ram, smram = 0x7000_0000_0000, 0x7100_0000_0000
    slots = (
        SlotSpec(0, 0, 4 * M, userspace_addr=ram),
        SlotSpec(1, 0, 0xA0000, address_space=1, userspace_addr=ram),
        SlotSpec(0, 0xA0000, 0x20000, address_space=1, userspace_addr=smram),
    )
    vm, pages = b.machine(profile, slots=slots, vcpus=(0, 1)), GuestPages(MODES["4-level"], 0x10000)
    pages.map(KERNEL, 0x5000)
    pages.map(KERNEL + 4 * K, 0xA0000)
    load(vm, pages, 0, 1)
    vm.nested.set_smm(0, True)
    b.protect(vm, "o", (0xA0000, 8))
    found = [by_gva(vm, [(KERNEL + 0xFFC, 8, b.WRITE, vcpu)]) for vcpu in (0, 1)]
    assert [(one.violations, one.unenforced_writes, one.page_granular_violations) for one in found] == [
        (0, 0, 0),
        (1, 0, 1),
    ]
