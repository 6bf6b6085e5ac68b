"""Table G of the printed vectors, the removals, and the property that a flushed cache changes no answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch.access import EXECUTE, READ, WRITE
from engine.arch.words import signed
from engine.cpu import cached_check, control_registers, instruction, invalidate, tlb

from . import vectors_tables as tables
from .bench_machine import GUEST_PML4, LINEAR, VCPU, Processor
from .vectors import GUEST_PTE, run_cached, set_up

OTHER = LINEAR + 0x1000


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize(
    ("setup", "access", "expected"), [r[1:] for r in tables.CACHED], ids=[r[0] for r in tables.CACHED]
)
def test_cached(setup: str, access: str, expected: str, model: bool) -> None:
    run_cached(Processor(model=model), setup, access, expected)


def test_stale_answers_are_the_cached_ones_and_say_so() -> None:
    p = Processor(model=True)
    set_up(p, "PTE=0x35|b61; vec=1")
    assert not p.access(WRITE).stale
    set_up(p, "vec=0")
    assert p.access(WRITE)[::6] == (0, True)
    # the cached vector denies sub-page 1 in every version
    assert p.access(WRITE, linear=LINEAR + 0x80)[:2] == (48, 0x1AA)
    # and that violation dropped the mapping
    assert p.access(WRITE)[::6] == (48, False)
    set_up(p, "PTE=0x37")
    assert p.access(WRITE).reason == 0
    set_up(p, "PTE raw=0")
    assert p.access(WRITE)[::6] == (0, True)
    p.invept()
    assert p.access(WRITE)[::6] == (48, False)


def test_a_spurious_violation_happens_once() -> None:
    p = Processor(model=True)
    set_up(p, "PTE=0x35|b61; vec=1")
    assert p.access(WRITE).reason == 0
    set_up(p, "vec=5")
    assert p.access(WRITE, linear=LINEAR + 0x80)[::6] == (48, True)
    assert p.access(WRITE, linear=LINEAR + 0x80)[::6] == (0, False)


def test_a_read_leaves_no_right_to_write() -> None:
    p = Processor(model=True)
    set_up(p, "PTE=0x35|b61; vec=1")
    assert p.access(READ).reason == 0
    assert p.access(WRITE, linear=LINEAR + 0x80).reason == 48
    assert p.access(WRITE).reason == 0
    assert p.access(WRITE, linear=LINEAR + 0x7C).reason == 48


def test_a_write_to_a_clean_page_walks_to_set_the_flag() -> None:
    p = Processor(model=True)
    set_up(p, "EPTP.AD=1")
    p.access(READ)
    assert p.peek(p.leaf()) & 0x300 == 0x100
    p.access(WRITE)
    assert p.peek(p.leaf()) & 0x300 == 0x300
    # a dirty flag that software clears stays clear while the mapping is remembered
    set_up(p, "PTE=0x137")
    assert p.access(WRITE).reason == 0
    assert p.peek(p.leaf()) & 0x300 == 0x100
    p.invept()
    p.access(WRITE)
    assert p.peek(p.leaf()) & 0x300 == 0x300


def test_guest_translations_are_remembered_until_removed() -> None:
    p = Processor(model=True)
    assert p.access(WRITE).gpa == LINEAR
    p.guest(GUEST_PTE, LINEAR + 0x1000 | 0x63)
    assert p.access(WRITE)[2::4] == (LINEAR, True)
    tlb.invlpg(p.m, VCPU, np.int64(LINEAR))
    assert p.access(WRITE)[2::4] == (LINEAR + 0x1000, False)
    p.guest(GUEST_PTE, 0)
    assert p.access(READ)[::6] == (0, True)
    trail, _, _ = instruction.scratch()
    control_registers.move_to_cr3(p.m, VCPU, np.int64(p.control(ctl.V_CR3)), trail)
    assert p.access(READ).reason == -14


def test_a_stale_page_fault_drops_its_mapping() -> None:
    p = Processor(model=True)
    p.guest(GUEST_PTE, LINEAR | 0x61)
    assert p.access(READ).reason == 0
    p.guest(GUEST_PTE, LINEAR | 0x41 | 0x22)
    p.m.tlb[1:, tlb.E_FACTS] |= tlb.GUEST_DIRTY
    assert p.access(WRITE)[::6] == (-14, True)
    assert p.access(WRITE)[::6] == (0, False)


def test_mapping_of_a_read_refuses_no_write() -> None:
    p = Processor(model=True)
    set_up(p, "PTE=0x35|b61; vec=1")
    assert p.access(READ).reason == 0
    assert p.access(WRITE)[::6] == (0, False)


def test_vpid_tags_combined_mappings() -> None:
    p = Processor(model=True)
    p.vcpu({ctl.V_SECONDARY: ctl.SECONDARY_EPT | ctl.SECONDARY_VPID, ctl.V_VPID: 1})
    assert p.access(READ).gpa == LINEAR
    p.guest(GUEST_PTE, OTHER | 0x63)
    p.vcpu({ctl.V_VPID: 2})
    assert p.access(READ)[2::4] == (OTHER, False)
    p.vcpu({ctl.V_VPID: 1})
    assert p.access(READ)[2::4] == (LINEAR, True)


def test_global_mapping_serves_every_pcid() -> None:
    p = Processor(model=True)
    p.vcpu({ctl.V_CR4: 0x26A0 | 1 << 17})
    p.guest(GUEST_PTE, LINEAR | 0x163)
    assert p.access(READ).gpa == LINEAR
    p.guest(GUEST_PTE, OTHER | 0x163)
    p.vcpu({ctl.V_CR3: GUEST_PML4 | 3})
    assert p.access(READ)[2::4] == (LINEAR, True)
    p.m.tlb[1:, 0] = 0
    assert p.access(READ)[2::4] == (OTHER, False)


def test_write_after_a_read_sets_the_guests_dirty_flag() -> None:
    p = Processor(model=True)
    p.guest(GUEST_PTE, LINEAR | 0x23)
    assert p.access(READ).reason == 0
    assert p.guest_word(GUEST_PTE) & 0x40 == 0
    assert p.access(WRITE).reason == 0
    assert p.guest_word(GUEST_PTE) & 0x40


# What each removal leaves of: a physical, a combined and a linear mapping of VPID 1, PCID 0; a global combined one;
# one of VPID 2; one of PCID 3.
NAMES = ("physical", "combined", "linear", "global", "vpid2", "pcid3")
EVERYTHING = set(NAMES)


def populate() -> Processor:
    p = Processor(model=True)
    p.vcpu({ctl.V_SECONDARY: ctl.SECONDARY_EPT | ctl.SECONDARY_SPP | ctl.SECONDARY_VPID, ctl.V_CR4: 0x26A0 | 1 << 17})
    trail, _, _ = instruction.scratch()
    page = np.int64(LINEAR >> 12)

    def add(kind: int, vpid: int, pcid: int, facts: int, at: np.int64) -> None:
        p.vcpu({ctl.V_VPID: vpid, ctl.V_CR3: p.control(ctl.V_CR3) & ~0xFFF | pcid})
        cached_check.check(p.m, VCPU, np.int64(LINEAR), np.int64(8), np.int64(acc.describe(READ)), trail)
        tlb.remember(p.m, VCPU, kind, at, page, np.int64(facts | 12 << tlb.GUEST_SIZE_AT), trail)

    add(tlb.PHYSICAL, 1, 0, 1, page)
    add(tlb.COMBINED, 1, 0, 1, page)
    add(tlb.LINEAR, 1, 0, 1, page)
    add(tlb.COMBINED, 1, 0, 1 | tlb.GUEST_GLOBAL, page + 1)
    add(tlb.COMBINED, 2, 0, 1, page)
    add(tlb.COMBINED, 1, 3, 1, page)
    p.vcpu({ctl.V_VPID: 1, ctl.V_CR3: p.control(ctl.V_CR3) & ~0xFFF})
    return p


def left(p: Processor) -> set[str]:
    found = set()
    for row in p.m.tlb[1:]:
        if row[tlb.E_GENERATION] != p.m.tlb[0, tlb.GENERATION]:
            continue
        kind, space = int(row[tlb.E_KIND]) & 0xFF, int(row[tlb.E_SPACE])
        if kind == tlb.PHYSICAL:
            found.add("physical")
        elif kind == tlb.LINEAR:
            found.add("linear")
        elif space & 0xFFFF == 2:
            found.add("vpid2")
        elif space >> 16 == 3:
            found.add("pcid3")
        else:
            found.add("global" if row[tlb.E_FACTS] & tlb.GUEST_GLOBAL else "combined")
    return found


ZERO = np.int64(0)


def invept(kind: int, eptp: str) -> Callable[[Processor], object]:
    def run(p: Processor) -> object:
        word = p.control(ctl.V_EPTP) if eptp == "this" else 0x7000_001E
        return invalidate.invept(p.m, VCPU, invalidate.ROOT, 0, np.int64(kind), np.int64(word))

    return run


def invvpid(kind: int, vpid: int, linear: int = LINEAR) -> Callable[[Processor], object]:
    return lambda p: invalidate.invvpid(
        p.m, VCPU, invalidate.ROOT, 0, np.int64(kind), np.int64(vpid), np.int64(signed(linear)), 48
    )


@pytest.mark.parametrize(
    ("remove", "gone"),
    [
        (invept(1, "this"), EVERYTHING - {"linear"}),
        (invept(1, "other"), set()),
        (invept(2, "other"), EVERYTHING - {"linear"}),
        (invvpid(0, 1), {"combined", "linear", "pcid3"}),
        (invvpid(0, 1, LINEAR + 0x1000), {"global"}),
        (invvpid(0, 1, LINEAR + 0x2000), set()),
        (invvpid(0, 2), {"vpid2"}),
        (invvpid(1, 1), {"combined", "linear", "global", "pcid3"}),
        (invvpid(1, 2), {"vpid2"}),
        (invvpid(1, 3), set()),
        (invvpid(2, 0), {"combined", "linear", "global", "pcid3", "vpid2"}),
        (invvpid(3, 1), {"combined", "linear", "pcid3"}),
        (lambda p: tlb.invlpg(p.m, VCPU, np.int64(LINEAR)), {"combined", "linear"}),
        (lambda p: tlb.invlpg(p.m, VCPU, np.int64(LINEAR + 0x1000)), {"global"}),
        (lambda p: tlb.load_cr3(p.m, VCPU), {"combined", "linear"}),
        (lambda p: tlb.invpcid(p.m, VCPU, 0, np.int64(3), np.int64(LINEAR)), {"pcid3"}),
        (lambda p: tlb.invpcid(p.m, VCPU, 0, np.int64(3), np.int64(0)), set()),
        (lambda p: tlb.invpcid(p.m, VCPU, 1, np.int64(0), np.int64(0)), {"combined", "linear"}),
        (lambda p: tlb.invpcid(p.m, VCPU, 2, ZERO, ZERO), {"combined", "linear", "global", "pcid3"}),
        (lambda p: tlb.invpcid(p.m, VCPU, 3, ZERO, ZERO), {"combined", "linear", "pcid3"}),
        (lambda p: tlb.violated(p.m, VCPU, np.int64(LINEAR), np.int64(LINEAR)), {"physical", "combined"}),
        (lambda p: tlb.violated(p.m, VCPU, np.int64(LINEAR), tlb.EVERY), {"physical"}),
        (lambda p: tlb.transition(p.m, VCPU), set()),
        (lambda p: tlb.flush(p.m), EVERYTHING),
        (lambda p: tlb.remove_ept(p.m, np.int64(1), tlb.EVERY), set()),
        (
            lambda p: tlb.remove_linear(p.m, np.int64(1), tlb.EVERY, tlb.EVERY, tlb.EVERY, tlb.GLOBALS_TOO, tlb.EVERY),
            set(),
        ),
        (lambda p: tlb.remove_linear(p.m, VCPU, tlb.EVERY, tlb.EVERY, tlb.EVERY, tlb.GLOBALS_TOO, np.int64(9)), set()),
    ],
)
def test_removals(remove: Callable[[Processor], object], gone: set[str]) -> None:
    p = populate()
    assert left(p) == EVERYTHING
    remove(p)
    assert left(p) == EVERYTHING - gone


def test_vpid_0_survives_no_transition_and_no_other_vpid_removes_it() -> None:
    p = Processor(model=True)
    p.access(READ)
    tlb.remove_vpid(p.m, VCPU, tlb.EVERY, tlb.GLOBALS_TOO)
    assert "combined" in left(p)
    tlb.transition(p.m, VCPU)
    assert left(p) == {"physical"}


def test_invlpg_takes_all_of_a_large_page() -> None:
    p = Processor(model=True)
    p.guest(0xC00000 + 32, 0x8000E3)
    p.access(READ)
    assert "combined" in left(p)
    tlb.invlpg(p.m, VCPU, np.int64(LINEAR + 0x200000))
    assert "combined" in left(p)
    tlb.invlpg(p.m, VCPU, np.int64(LINEAR + 0x100000))
    assert "combined" not in left(p)


def test_tags_keep_address_spaces_apart() -> None:
    p = Processor(model=True)
    p.vcpu({ctl.V_SECONDARY: ctl.SECONDARY_EPT | ctl.SECONDARY_VPID, ctl.V_VPID: 1})
    p.access(READ)
    set_up(p, "PTE raw=0")
    for word, value in ((ctl.V_VPID, 2), (ctl.V_NESTED, 1), (ctl.V_EPTP, p.table() | 0x1E)):
        before = p.control(word)
        # with another VPID the combined mapping does not serve, the physical one does
        p.vcpu({word: value})
        assert p.access(READ)[::6] == ((0, True) if word == ctl.V_VPID else (48, False))
        p.vcpu({word: before})
    assert p.access(READ)[::6] == (0, True)


def test_a_full_set_replaces_in_turn() -> None:
    p = Processor(model=True)
    trail, _, _ = instruction.scratch()
    cached_check.check(p.m, VCPU, np.int64(LINEAR), np.int64(8), np.int64(acc.describe(READ)), trail)
    same_set = [page for page in range(1 << 15) if tlb.first_way(0, np.int64(page)) == tlb.first_way(0, ZERO)]
    assert len(same_set) > 2 * tlb.WAYS
    for page in same_set:
        tlb.remember(p.m, VCPU, tlb.PHYSICAL, np.int64(page), ZERO, ZERO, trail)
        assert tlb.find(p.m, VCPU, tlb.PHYSICAL, np.int64(page)) != tlb.MISSING
    assert np.count_nonzero(p.m.tlb[1:, tlb.E_GENERATION]) == tlb.WAYS


# Random changes, each flushed: the cache and a machine without one always agree.
WORDS = st.one_of(
    st.tuples(
        st.just("PTE"), st.sampled_from([0x30, 0x31, 0x33, 0x34, 0x35, 0x37, 0x3F, 1 << 61 | 0x35, 1 << 61 | 0x31])
    ),
    st.tuples(st.just("PDE"), st.sampled_from([0, 5, 7, 0x405, 15])),
    st.tuples(st.just("vec"), st.integers(0, (1 << 64) - 1).map(lambda v: v & 0x5555_5555_5555_5555)),
    st.tuples(st.just("vec"), st.just(2)),
    st.tuples(st.just("L2E"), st.sampled_from([0, 1, 3])),
    st.tuples(st.just("gPTE"), st.sampled_from([0, 0x63, 0x61, 0x43, 0x23, 0x67, 1 << 63 | 0x63, 1 << 51 | 0x63])),
    st.tuples(st.just("gPTpage.PTE"), st.sampled_from([0x30, 0x31, 0x35, 0x37])),
)
ACCESSES = st.tuples(
    st.sampled_from([READ, WRITE, WRITE, WRITE, EXECUTE]), st.integers(0, 0x1010), st.sampled_from([1, 2, 8, 16, 64])
)
STEPS = st.lists(st.one_of(WORDS.map(lambda w: ("set", *w)), ACCESSES.map(lambda a: ("access", *a))), max_size=40)


def apply(p: Processor, name: str, value: int) -> None:
    """Change one entry, and flush as software must."""
    if name == "PDE":
        p.poke(p.tables["PD"] + 32, p.tables["PT"] | value if value else 0)
    elif name == "L2E":
        p.poke(p.tables["L2"] + 32, p.tables["L1"] | value if value else 0)
    elif name == "gPTE":
        p.guest(GUEST_PTE, LINEAR | value)
    else:
        set_up(p, f"{name}={value}")
    if p.m.tlb.shape[0]:
        p.invept()
        tlb.remove_linear(p.m, VCPU, ZERO, tlb.EVERY, tlb.EVERY, tlb.GLOBALS_TOO, tlb.EVERY)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.booleans())
def test_a_flushed_cache_changes_no_answer(steps: list[tuple[str, int, int]], flags: bool) -> None:
    machines = (Processor(model=True), Processor(model=False))
    for p in machines:
        if flags:
            set_up(p, "EPTP.AD=1")
    for step in steps:
        if step[0] == "set":
            for p in machines:
                apply(p, str(step[1]), step[2])
        else:
            _, access, offset, size = step
            results = [p.access(access, size, LINEAR + offset) for p in machines]
            assert results[0] == results[1]
            assert not results[0].stale
    for name in ("PT", "PD", "PML4", "PDPT", "gPT", "gUpper"):
        assert [machines[0].peek(machines[0].tables[name] + 8 * i) for i in range(16)] == [
            machines[1].peek(machines[1].tables[name] + 8 * i) for i in range(16)
        ]
    assert machines[0].guest_word(GUEST_PTE) == machines[1].guest_word(GUEST_PTE)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(st.integers(0, 31).map(lambda s: ("bit", s)), st.integers(0, 31).map(lambda s: ("write", s))),
        max_size=60,
    )
)
def test_no_sub_page_is_written_that_no_vector_ever_allowed(steps: list[tuple[str, int]]) -> None:
    """Stale or not: vectors only lose bits here, so what the first one denies stays denied for ever."""
    p = Processor(model=True)
    first = 0x5555_5555_0000_5555
    vector = first
    set_up(p, f"PTE=0x35|b61; vec={first}")
    for what, subpage in steps:
        if what == "bit":
            vector &= ~(1 << 2 * subpage)
            set_up(p, f"vec={vector}")
            continue
        result = p.access(WRITE, linear=LINEAR + 128 * subpage)
        assert result.reason == 48 or first >> 2 * subpage & 1
        assert result.reason == 0 or not vector >> 2 * subpage & 1
