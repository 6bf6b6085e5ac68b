"""What holds for every call: nothing required stays, all ways agree on it, and what is malformed changes nothing."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.arch import hypercall as hv
from engine.hyperv import flush_execution
from engine.hyperv.caller import Caller
from engine.hyperv.outcome import Outcome

from .flush_machine import ALL, ENTRIES, INPUT, PAGE, VP_INDICES, FlushMachine, names, words

SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ADDRESSES = [linear for _, linear, _, _ in ENTRIES.values()]

masks = st.integers(1, 15)
spaces = st.sampled_from([0x1000, 0x2000, 0x3000])
ranges = st.builds(
    lambda base, offset, count: (base + offset * 0x1000) & ~0xFFF & ((1 << 64) - 1) | count,
    st.sampled_from(ADDRESSES),
    st.integers(-3, 600),
    st.sampled_from([0, 1, 2, 0x7FF, 0x800, 0xFFF]),
)
large = st.builds(
    lambda base, count, size: base & ~0x1FFFFF | size << 12 | 1 << 11 | count,
    st.sampled_from(ADDRESSES),
    st.integers(0, 0x7FF),
    st.integers(0, 1),
)


@st.composite
def flushes(draw: st.DrawFn) -> tuple[int, bytes]:
    """A call that the specification takes: input value and block."""
    flags = draw(st.sampled_from([0, 2]))
    space, listed, sparse = draw(spaces), draw(st.booleans()), draw(st.booleans())
    extended = listed and draw(st.booleans())
    if not listed:
        flags |= draw(st.sampled_from([0, 4]))
    flags |= 8 if extended else 0
    items = draw(st.lists(st.one_of(ranges, large) if extended else ranges, min_size=1, max_size=20)) if listed else []
    code = (hv.LIST_EX if listed else hv.SPACE_EX) if sparse else (hv.LIST if listed else hv.SPACE)
    if sparse:
        everyone = draw(st.booleans())
        banks = [] if everyone else [draw(masks)]
        head = [space, flags, int(everyone), 0 if everyone else 1, *banks]
    else:
        banks = []
        head = [space, flags | draw(st.sampled_from([0, 1])), draw(masks)]
    control = code | len(banks) << hv.VARIABLE_SHIFT | len(items) << hv.REPS_SHIFT
    return control, words(*head, *items)


def required(done: Outcome) -> dict[int, str]:
    return {effect.vp.vp_index: names(effect.required) for effect in done.effects if len(effect.required)}


@SLOW
@given(flushes())
def test_every_way_removes_what_is_required(call: tuple[int, bytes]) -> None:
    wanted: dict[int, str] | None = None
    for way in ("exact", "kvm", "paranoid"):
        machine = FlushMachine("tlfs", way)
        done = machine.slow(*call)
        assert done.outcome == "completed" and hv.status_of(done.result or 0) == hv.Status.SUCCESS
        assert not any(len(effect.left) for effect in done.effects)
        wanted = required(done) if wanted is None else wanted
        assert required(done) == wanted
        for vp in machine.vps:
            kept = set(machine.held(vp.position))
            if way == "exact":
                assert kept == set(ALL) - set(wanted.get(vp.vp_index, ""))
            assert not kept & set(wanted.get(vp.vp_index, ""))


@SLOW
@given(flushes(), st.sets(st.sampled_from(VP_INDICES[1:])))
def test_what_stays_on_a_halted_vp_goes_before_it_runs(call: tuple[int, bytes], halted: set[int]) -> None:
    machine = FlushMachine("tlfs", "kvm")
    machine.run_elsewhere(*halted)
    done = machine.slow(*call)
    assert all(effect.queued for effect in done.effects if len(effect.left))
    for vp in machine.vps:
        flush_execution.service(machine.m, vp.position, False, machine.context.facts)
        assert not set(machine.held(vp.position)) & set(required(done).get(vp.vp_index, ""))


@SLOW
@given(st.lists(ranges, min_size=1, max_size=12), st.data())
def test_a_list_in_parts_removes_the_same(items: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(items)))
    for policy in ("kvm", "tlfs"):
        whole, parts = FlushMachine(policy), FlushMachine(policy)
        whole.slow(len(items) << 32 | hv.LIST, words(0x1000, 0, 1, *items))
        for part in (items[:cut], items[cut:]):
            if part:
                parts.slow(len(part) << 32 | hv.LIST, words(0x1000, 0, 1, *part))
        assert whole.held(0) == parts.held(0)


@SLOW
@given(st.lists(ranges, min_size=2, max_size=8), st.data())
def test_a_list_resumed_removes_the_rest(items: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(1, len(items) - 1))
    resumed, rest = FlushMachine("tlfs"), FlushMachine("tlfs")
    block = words(0x1000, 0, 1, *items)
    assert resumed.slow(start << 48 | len(items) << 32 | hv.LIST, block).result == len(items) << 32
    rest.slow(len(items) - start << 32 | hv.LIST, words(0x1000, 0, 1, *items[start:]))
    assert resumed.held(0) == rest.held(0)


@SLOW
@given(st.integers(0, 511), st.sampled_from(["C", "G"]))
def test_a_page_inside_a_large_one_drops_it_whole(page: int, name: str) -> None:
    machine = FlushMachine("tlfs")
    machine.slow(1 << 32 | hv.LIST, words(0x1000, 0, 1, ENTRIES[name][1] + page * 0x1000))
    assert machine.held(0) == ALL.replace(name, "")


# Malformed: any input value over any block

codes = st.one_of(st.sampled_from(sorted(hv.CALLS)), st.integers(0, 0xFFFF))
controls = st.builds(
    lambda code, fast, variable, nested, reps, start, reserved: (
        code | fast << 16 | variable << 17 | nested << 31 | reps << 32 | start << 48 | reserved
    ),
    codes,
    st.booleans(),
    st.one_of(st.integers(0, 3), st.integers(0, 0x3FF)),
    st.booleans(),
    st.one_of(st.integers(0, 3), st.integers(0, 0xFFF)),
    st.one_of(st.just(0), st.integers(0, 0xFFF)),
    st.one_of(st.just(0), st.sampled_from([1 << 27, 1 << 30, 1 << 44, 1 << 47, 1 << 60, 1 << 63])),
)
gpas = st.one_of(st.integers(INPUT - 16, INPUT + 2 * PAGE + 16), st.sampled_from([0, 0xDEAD000, (1 << 64) - 8]))
blocks = st.lists(
    st.one_of(st.integers(0, 4), st.sampled_from([0x1000, 1 << 63, *ADDRESSES]), st.integers(0, (1 << 64) - 1)),
    max_size=12,
)
KVM_STATUSES = {0, 2, 3}
TLFS_STATUSES = {0, 2, 3, 4, 5}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(controls, gpas, blocks, st.sampled_from(["kvm", "tlfs"]))
def test_any_bytes_end_in_a_status(control: int, gpa: int, block: list[int], policy: str) -> None:
    machine = FlushMachine(policy)
    machine.write(words(*block))
    before = machine.state()
    done = machine.call(Caller(rcx=control, rdx=gpa, r8=gpa, xmm=tuple(((block or [0]) * 6)[:6])))
    assert done.outcome in ("completed", "intercepted")
    if done.outcome == "intercepted":
        assert policy == "tlfs" and machine.state() == before
        return
    assert done.result is not None
    status, reps = hv.status_of(done.result), hv.reps_of(done.result)
    assert status in (KVM_STATUSES if policy == "kvm" else TLFS_STATUSES)
    if status != hv.Status.SUCCESS:
        assert reps == 0 and machine.state() == before and not done.effects
    else:
        assert reps == done.control.reps


@SLOW
@given(flushes(), st.integers(0, 63))
def test_a_reserved_bit_is_refused(call: tuple[int, bytes], bit: int) -> None:
    if not hv.RESERVED_WITH_NESTED >> bit & 1:
        return
    for policy in ("kvm", "tlfs"):
        machine = FlushMachine(policy)
        before = machine.state()
        assert machine.slow(call[0] | 1 << bit, call[1]).result == hv.Status.INVALID_HYPERCALL_INPUT
        assert machine.state() == before


@SLOW
@given(st.integers(0, 15), st.integers(0, 8))
def test_a_set_with_other_banks_than_it_says(banks: int, variable: int) -> None:
    for policy, status in (("kvm", 3), ("tlfs", 5)):
        machine = FlushMachine(policy)
        done = machine.slow(variable << 17 | hv.SPACE_EX, words(0, 2, 0, banks, *[1] * variable))
        if banks.bit_count() != variable:
            assert done.result == status
        elif variable:
            assert done.result == 0
