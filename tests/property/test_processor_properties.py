"""What holds of every kind of access, by GPA and by linear address, on tables with random raw entries."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.arch import access as acc
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from engine.trace.columns import TraceChunk
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest, AccessResult
from tests.engine.builders import store_word
from tests.property.operations import Draw, drawing, small

PAGE = 0x1000
FIRST, PAGES = 0x20000, 3
PML4, PDPT, PD, PT = 0x10000, 0x11000, 0x12000, 0x13000
LINEAR = 0x4000_0000
ALL = 0x5555_5555_5555_5555
SPP = 1 << 61
LEAVES = (0x30, 0x31, 0x33, 0x34, 0x35, 0x37, 0x32, 0x3F, SPP | 0x35, SPP | 0x31, SPP | 0x34, 1 << 58 | 0x35)
GUEST_ENTRIES = (0, 1, 3, 7, 0x63, 0x67, 0x61, 0x43, 1 << 63 | 0x63, 1 << 50 | 0x63)
VECTORS = (0, ALL, 1, 4, 2, 0x5555_5555_0000_0001)
EVERY_KIND = tuple(
    (kind, access, linear)
    for kind, accesses in enumerate(acc.KIND_ACCESSES)
    for access in accesses
    for linear in (0, 1, 3, 5, 15)
    if linear or acc.UNTRANSLATED_KINDS >> kind & 1
)


def machine(*, model: bool = False) -> VirtualMachine:
    """A VM whose first vCPU has four-level paging over three pages with sub-page tables of their own."""
    vm = VirtualMachine.create(
        VmConfig(maxphyaddr=40, translation_cache="model" if model else "off"), [SlotSpec(0, 0, 1 << 20)], spp=True
    )
    entries = {PML4: PDPT | 7, PDPT + 8: PD | 7, PD: PT | 7}
    for page in range(PAGES):
        entries[PT + 8 * page] = FIRST + page * PAGE | 7
    for gpa, entry in entries.items():
        store_word(vm, gpa, entry)
    vm.vcpus.set_vmcs(0, {"cr3": PML4})
    for page in range(PAGES):
        vm.access(AccessRequest(FIRST + page * PAGE))
    for level in (4, 3, 2):
        vm.tables.set_sppt_entry(level, FIRST, vm.tables.new_frame() | 1)
    return vm


def change(vm: VirtualMachine, what: tuple[str, int, int]) -> None:
    """One entry by name; the processor is told, as software must."""
    name, page, value = what
    gpa = FIRST + page * PAGE
    if name == "leaf":
        vm.tables.set_ept_entry(1, gpa, gpa | value)
    elif name == "vector":
        vm.tables.set_sppt_entry(1, gpa, value)
    else:
        store_word(vm, PT + 8 * page, gpa | value if value else 0)
    vm.vcpus.invept(0, 2, 0)
    vm.vcpus.invvpid(0, 2, 0, 0)


def draw_change(draw: Draw) -> tuple[str, int, int]:
    name, values = (("leaf", LEAVES), ("vector", VECTORS), ("guest", GUEST_ENTRIES))[draw(0, 2)]
    return name, draw(0, PAGES - 1), values[draw(0, len(values) - 1)]


def draw_request(draw: Draw, *, by_linear: bool) -> AccessRequest:
    kind, access, linear = EVERY_KIND[draw(0, len(EVERY_KIND) - 1)]
    offset, size = draw(0, PAGES * PAGE - 70), (1, 2, 8, 64)[draw(0, 3)]
    data = bytes(draw(1, 255) for _ in range(size)) if access == acc.WRITE else None
    if by_linear and kind not in (acc.PAGING_READ, acc.PAGING_UPDATE) and draw(0, 1):
        return AccessRequest(None, size, access, gva=LINEAR + offset, data=data, kind=kind)
    return AccessRequest(FIRST + offset, size, access, data=data, kind=kind, linear=linear)


def told(result: AccessResult) -> list[Any]:
    columns = ("reason", "qualification", "gpa", "denied", "resolution")
    exits = [result.exits.column(name).tolist() for name in columns]
    return [result.allowed, result.lands, result.exception, result.error_code, result.gpa, result.data, exits]


@small
@given(data=st.data())
def test_what_is_permitted_does_not_exit_and_what_is_denied_does_not_land(data: st.DataObject) -> None:
    draw = drawing(data)
    vm = machine()
    for _ in range(draw(1, 6)):
        change(vm, draw_change(draw))
        request = draw_request(draw, by_linear=False)
        assert request.gpa is not None
        before = vm.read_memory(FIRST, PAGES * PAGE)
        said = vm.walk(request.gpa, request.access, request.size, kind=request.kind, linear=request.linear)
        result = vm.access(request)
        first = [result.exits.column(name).tolist()[:1] for name in ("reason", "qualification", "gpa", "denied")]
        after = vm.read_memory(FIRST, PAGES * PAGE)
        if said.outcome == "allowed":
            assert result.allowed and len(result.exits) == 0 and result.lands
        else:
            assert first == [[said.reason], [said.qualification], [said.exit_gpa], [said.denied]]
        if not result.allowed:
            assert not result.lands and after == before
        elif request.data:
            at = request.gpa - FIRST
            assert after == before[:at] + request.data + before[at + request.size :]


@small
@given(data=st.data())
def test_adding_a_permission_adds_no_exit(data: st.DataObject) -> None:
    draw = drawing(data)
    vm = machine()
    page = draw(0, PAGES - 1)
    gpa = FIRST + page * PAGE
    leaf = LEAVES[draw(0, len(LEAVES) - 1)]
    vector = VECTORS[draw(0, len(VECTORS) - 1)]
    change(vm, ("leaf", page, leaf))
    change(vm, ("vector", page, vector))
    requests = [
        (gpa + draw(0, PAGE - 64), *EVERY_KIND[draw(0, len(EVERY_KIND) - 1)], (1, 8, 64)[draw(0, 2)]) for _ in range(8)
    ]

    def allowed() -> list[bool]:
        return [
            vm.walk(at, access, size, kind=kind, linear=linear).outcome == "allowed"
            for at, kind, access, linear, size in requests
        ]

    before = allowed()
    for more in (("vector", vector | 1 << 2 * draw(0, 31)), ("leaf", leaf | 1), ("leaf", leaf | 3), ("leaf", leaf | 7)):
        change(vm, (more[0], page, more[1]))
        after = allowed()
        assert all(now or not then for then, now in zip(before, after, strict=True)), more
        before = after


@small
@given(data=st.data())
def test_a_flushed_cache_changes_no_answer(data: st.DataObject) -> None:
    draw = drawing(data)
    cached, plain = machine(model=True), machine()
    for _ in range(draw(2, 14)):
        if draw(0, 2) == 0:
            what = draw_change(draw)
            for vm in (cached, plain):
                change(vm, what)
            continue
        request = draw_request(draw, by_linear=True)
        first, second = cached.access(request), plain.access(request)
        assert told(first) == told(second), request
        assert not first.stale
    assert cached.read_memory(FIRST, PAGES * PAGE) == plain.read_memory(FIRST, PAGES * PAGE)
    assert cached.read_memory(PT, PAGE) == plain.read_memory(PT, PAGE)


def draw_records(draw: Draw, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    requests = [draw_request(draw, by_linear=False) for _ in range(count)]
    return np.concatenate([request.record() for request in requests])


@small
@given(data=st.data())
def test_kinds_in_one_chunk_or_many(data: st.DataObject) -> None:
    draw = drawing(data)
    changes = [draw_change(draw) for _ in range(draw(0, 4))]
    records = draw_records(draw, draw(2, 20))
    cuts = [0, *sorted(draw(0, len(records)) for _ in range(draw(1, 3))), len(records)]
    answers = []
    for bounds in ([0, len(records)], cuts):
        vm = machine()
        for what in changes:
            change(vm, what)
        with vm.replay(ReplayOptions(include="all")) as run:
            for start, end in pairwise(bounds):
                run.feed(TraceChunk(records[start:end].copy(), None, {}, kinds=True))
            result = run.finish()
        columns = {name: column.tolist() for name, column in result.exit_columns.columns.items()}
        answers.append((result.violations, result.exits, columns, [vm.tables.ept_entry(1, FIRST).raw]))
    assert answers[0] == answers[1]


# ---- compiled or not (see test_machine_properties)


def outcome(draw: Draw) -> list[str]:
    """What a machine answers to random changes and accesses, as text."""
    vm = machine(model=bool(draw(0, 1)))
    answers = []
    for _ in range(60):
        if draw(0, 3) == 0:
            change(vm, draw_change(draw))
        else:
            answers.append(repr(told(vm.access(draw_request(draw, by_linear=True)))))
    with vm.replay(ReplayOptions(include="all")) as run:
        run.feed(TraceChunk(draw_records(draw, 60), None, {}, kinds=True))
        answers.append(repr({name: c.tolist() for name, c in run.finish().exit_columns.columns.items()}))
    return answers
