"""Accesses that are alike but for place and length are replayed as columns, and come to what packed records come to."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.cpu import fastpath
from engine.cpu.frames import FIRST_VCPU_FRAME, write_word
from engine.errors import TraceError
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.trace.columns import CHUNK_RECORDS, Columns, TraceChunk
from engine.trace.readers import open_trace
from engine.trace.session import LOG_ROWS, ReplayOptions
from tests.engine.builders import (
    EXECUTE,
    MIB,
    READ,
    WRITE,
    edit,
    exits,
    machine,
    picture,
    protect,
    records,
    replay,
    set_map,
    totals,
)

HEADS = {
    "writes": WRITE,
    "reads": READ,
    "fetches": EXECUTE,
    "of vCPU 3": WRITE | 3 << 16,
    "by KVM": WRITE | acc.record_bits(acc.DATA, acc.LINEAR_VALID, acc.EMULATED) >> 16,
    "of known length": WRITE | acc.record_bits(acc.DATA, acc.LINEAR_VALID, insn_len=5) >> 16,
    "of the paging unit": READ | acc.record_bits(acc.PAGING_READ, acc.LINEAR_VALID) >> 16,
}
NAMES = ("skip", "allow", "grant", "stop")


def guest() -> VirtualMachine:
    slots = [SlotSpec(0, 0, 4 * MIB), SlotSpec(1, 0x1000 << 12, MIB, read_only=True)]
    vm = machine(slots=slots, vcpus=(0, 3))
    for page, mask in ((5, 0xFF00_FFFF), (7, 0), (9, 0x7FFF_FFFF)):
        set_map(vm, page, mask)
    protect(vm, "p", (0x6080, 0x100), (0x5800, 1))
    return vm


def drawn(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Stretches in one page or two, whole and protected, allowed and refused, within a page and across two."""
    rng = np.random.default_rng(seed)
    pages = np.repeat(rng.choice([4, 5, 6, 7, 9, 8, 1024, 0x1005], size=count), rng.integers(1, 120, count))[:count]
    offsets = np.where(rng.random(count) < 0.7, rng.integers(0, 8, count) * 8, rng.integers(0, 4096, count))
    sizes = rng.choice([1, 8, 64, 130, 255], size=count, p=[0.2, 0.6, 0.1, 0.05, 0.05])
    return (pages * 4096 + offsets).astype(np.uint64), sizes.astype(np.uint8)


def columns(gpa: np.ndarray, size: np.ndarray, head: int, gva: Any = None, **more: Any) -> TraceChunk:
    return TraceChunk(None, gva, {}, kinds=True, columns=Columns(gpa, size, head << 16), **more)


def outcome(vm: VirtualMachine, chunks: list[TraceChunk], options: dict[str, Any], *, forgetting: bool = False) -> Any:
    with vm.replay(ReplayOptions(include="all", **options)) as run:
        for part in chunks:
            if forgetting:
                fastpath.forget_all(run._replay._draft.machine)
            if not run.feed(part):
                break
        result = run.finish()
    return totals(result), result.stopped_at, exits(result, *result.exit_columns.columns), picture(vm)[1]


CASES = [(head, name) for head in HEADS for name in (NAMES if head == "writes" else NAMES[:1])]


@pytest.mark.parametrize(("head", "on_violation"), CASES)
def test_columns_are_served_like_packed_records(head: str, on_violation: str) -> None:
    options = {"on_violation": on_violation}
    gpa, size = drawn(len(head), 400)
    whole = columns(gpa, size, HEADS[head])
    packed = TraceChunk(whole.copy().records, None, {}, kinds=True)
    ones = [TraceChunk(packed.records[i : i + 1], None, {}, kinds=True) for i in range(len(packed))]
    pieces = [columns(gpa[at : at + 150], size[at : at + 150], HEADS[head]) for at in range(0, len(gpa), 150)]
    expected = outcome(guest(), ones, options, forgetting=True)
    assert expected == outcome(guest(), [packed], options)
    assert expected == outcome(guest(), [whole], options)
    assert expected == outcome(guest(), pieces, options)


def test_a_nested_guest_passes_by_what_the_next_vcpu_is_refused() -> None:
    """Two write the same sub-page in turn; the fast path knows the refusal, which is not of a nested guest."""
    vm = guest()
    edit(vm, lambda m: write_word(m, FIRST_VCPU_FRAME + 1, ctl.V_GUEST_MODE, 1))
    allowed, refused, nested = (0x5000, 8, WRITE, 0), (0x5880, 8, WRITE, 0), (0x5880, 8, WRITE, 3)
    result = replay(vm, records([allowed, refused, *([nested, refused, refused] * 20)]))
    assert (result.violations, result.unenforced_writes, result.page_granular_violations) == (41, 20, 62)
    assert set(result.exit_columns.column("vcpu").tolist()) == {0}


def test_refused_writes_are_listed_when_the_log_is_full_and_emptied() -> None:
    """More than the log has room for, with addresses that the records have beside them."""
    count = 2 * LOG_ROWS + 5
    gpa, gva = np.full(count, 0x7008, dtype=np.uint64), np.arange(count, dtype=np.uint64) + np.uint64(1 << 40)
    chunk = columns(gpa, np.full(count, 8, dtype=np.uint8), WRITE, gva=gva)
    result = replay(guest(), chunk)
    found = result.exit_columns
    assert result.violations == len(found) == count
    assert found.column("index").tolist() == list(range(count)) and (found.column("gva") == gva).all()


def test_a_replay_stops_and_goes_on_within_columns() -> None:
    gpa, size = drawn(5, 300)
    whole, vm = columns(gpa, size, WRITE), guest()
    expected = replay(guest(), columns(gpa, size, WRITE))
    stopped = start = 0
    violations: list[tuple[Any, ...]] = []
    while True:
        result = replay(vm, whole, on_violation="stop", start=start)
        violations += exits(result, "index", "gpa", "denied")
        if result.stopped_at is None:
            break
        stopped, start = stopped + 1, result.stopped_at + 1
    assert stopped == expected.violations > 3
    assert violations == exits(expected, "index", "gpa", "denied")


@pytest.mark.parametrize(
    ("size", "head", "gpa", "field"),
    [
        (0, WRITE, 0x4000, "size"),
        (8, 3, 0x4000, "access"),
        (8, WRITE | 1 << 16, 0x4000, "vcpu"),
        (8, WRITE, (1 << 52) - 1, "gpa"),
        (8, WRITE, (1 << 64) - 1, "gpa"),
    ],
)
def test_what_is_no_access_is_refused_with_its_index(size: int, head: int, gpa: int, field: str) -> None:
    """As a packed record, and where blocks of others come before."""
    gpas, sizes = np.full(200, 0x4000, dtype=np.uint64), np.full(200, 8, dtype=np.uint8)
    gpas[150], sizes[150] = gpa, size
    wrong = 0 if head != WRITE else 150
    whole = columns(gpas, sizes, head)
    for chunk in (whole, TraceChunk(whole.copy().records, None, {}, kinds=True)):
        with pytest.raises(TraceError) as refused:
            replay(guest(), chunk)
        assert (refused.value.index, refused.value.field) == (wrong, field)


def arrow(**given: Any) -> list[TraceChunk]:
    """The chunks of a body with some columns."""
    sink = io.BytesIO()
    table = pa.table(given)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return [chunk.copy() for chunk in open_trace("arrow", io.BytesIO(sink.getvalue()))]


GPA = np.arange(0, 4096, 16, dtype=np.uint64)


@pytest.mark.parametrize(
    ("more", "above"),
    [
        ({}, WRITE << 16),
        ({"size": np.full(256, 255, np.uint8)}, WRITE << 16),
        ({"size": np.full(256, 3, np.int64)}, WRITE << 16),
        ({"access": np.full(256, READ, np.uint8), "vcpu": np.full(256, 3, np.uint16)}, 3 << 32),
        ({"source": np.full(256, 2, np.uint8), "insn_len": np.full(256, 7, np.uint8)}, 2 << 48 | 7 << 50 | WRITE << 16),
        ({"kind": np.full(256, acc.PAGING_READ, np.uint8)}, acc.PAGING_READ << 24),
    ],
)
def test_what_is_alike_stays_columns(more: dict[str, np.ndarray], above: int) -> None:
    (chunk,) = arrow(gpa=GPA, **more)
    assert chunk.columns is not None and chunk.columns.above == above
    assert chunk.columns.gpa.tolist() == GPA.tolist()
    assert chunk.columns.size.tolist() == more.get("size", np.full(256, 8)).tolist()
    assert [chunk.at(i) for i in range(256)] == [tuple(row) for row in chunk.records.view(np.int64).tolist()]
    assert chunk.vcpus() == {above >> 32 & 0xFFFF} and len(chunk) == 256


@pytest.mark.parametrize(
    "more",
    [
        {"size": np.r_[np.full(255, 8), 256].astype(np.uint16)},
        {"access": np.r_[np.ones(255), 0].astype(np.uint8)},
        {"vcpu": np.r_[np.zeros(255), 3].astype(np.uint16)},
        {"source": np.r_[np.zeros(255), 1].astype(np.uint8)},
    ],
)
def test_what_differs_in_more_than_place_and_length_is_packed(more: dict[str, np.ndarray]) -> None:
    (chunk,) = arrow(gpa=GPA, **more)
    assert chunk.columns is None
    ((name, values),) = more.items()
    shift = {"size": 0, "access": 16, "vcpu": 32, "source": 48}[name]
    assert (chunk.records[:, 1] >> np.uint64(shift) & np.uint64(0xFFFF)).tolist()[-1] == values[-1]


def test_bodies_that_change_on_the_way_keep_their_order() -> None:
    """A column that is the same in one chunk and not in the next; what one leaves in the buffer is not of the other."""
    count = 3 * CHUNK_RECORDS
    vcpu = np.zeros(count, dtype=np.uint16)
    vcpu[CHUNK_RECORDS : 2 * CHUNK_RECORDS : 2] = 3
    vcpu[2 * CHUNK_RECORDS :] = 3
    gpa = np.arange(count, dtype=np.uint64)
    chunks = arrow(gpa=gpa, vcpu=vcpu)
    assert [chunk.columns is None for chunk in chunks] == [False, True, False]
    found = np.concatenate([chunk.records for chunk in chunks])
    assert (found[:, 0] == gpa).all()
    assert (found[:, 1] == (vcpu.astype(np.uint64) << np.uint64(32) | np.uint64(8 | 1 << 16))).all()


def test_gpa8_bodies_are_columns() -> None:
    (chunk,) = (chunk.copy() for chunk in open_trace("packed", io.BytesIO(GPA.tobytes()), record="gpa8"))
    assert chunk.columns is not None and set(chunk.columns.size.tolist()) == {8}
