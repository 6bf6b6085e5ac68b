"""Machines, traces and raw tables for the engine's tests, and what a test may say about a whole machine."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.words import unsigned
from engine.cpu import frames, host_physical_memory
from engine.cpu.ept import TRAIL_ROWS
from engine.errors import EngineError
from engine.kvm import mapping
from engine.kvm.protections import ProtectedObject
from engine.kvm.slot_files import SlotFile
from engine.kvm.slots import SlotSpec, slot_table
from engine.machine import SubpageRange, VirtualMachine, creation
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.state.frame_store import Draft, FrameStore, blocks_of
from engine.trace.columns import TraceChunk
from engine.trace.results import TraceResult
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest

READ, WRITE, EXECUTE = acc.READ, acc.WRITE, acc.EXECUTE
PAGE = 4096
FULL = 0xFFFF_FFFF
MIB = 1 << 20
PROFILES = ("kvm-2019", "kvm-latest")

Blocks = dict[int, tuple[str, bytes]]


# ---- machines


class Opened:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


def machine(
    profile: str = "kvm-2019",
    *,
    slots: Sequence[SlotSpec] = (SlotSpec(0, 0, 4 * MIB),),
    spp: bool = True,
    vcpus: Sequence[int] = (0,),
    host: HostConfig | None = None,
    **config: Any,
) -> VirtualMachine:
    """A machine with one slot of 4 MiB at 0 and sub-page protection on, unless told otherwise."""
    settings = VmConfig(profile=profile, vcpus=tuple(VcpuConfig(i) for i in vcpus), host=host or HostConfig(), **config)
    return VirtualMachine.create(settings, slots, spp=spp)


def behind(path: Path, offset: int = 0) -> SlotFile:
    """A file behind a slot, open."""
    return SlotFile(str(path), offset, path.stat().st_size, path.stat().st_mtime_ns, Opened(path))


def set_map(vm: VirtualMachine, gfn: int, access: int, npages: int = 1) -> None:
    """SET one value on consecutive pages."""
    vm.set_subpages([SubpageRange(gfn, npages, access)])


def protect(vm: VirtualMachine, name: str, *ranges: tuple[int, int]) -> None:
    """Protect (gpa, size) ranges as one object that has the protection's name."""
    vm.protect(name, [ProtectedObject(name, gpa, size) for gpa, size in ranges])


def maps(vm: VirtualMachine, gfn: int, npages: int = 1, layer: str = "effective") -> list[int]:
    """One layer of the maps as plain integers."""
    return [int(word) for word in vm.subpages(gfn, npages, layer)]


def store_word(vm: VirtualMachine, gpa: int, value: int, size: int = 8) -> None:
    """A word into guest memory."""
    vm.write_memory(gpa, value.to_bytes(size, "little"))


def load_word(vm: VirtualMachine, gpa: int, size: int = 8) -> int:
    """A word of guest memory."""
    return int.from_bytes(vm.read_memory(gpa, size), "little")


# ---- traces


def word1(size: int = 8, access: int = WRITE, vcpu: int = 0) -> int:
    """The second word of a record."""
    return size | access << 16 | vcpu << 32


def records(rows: Iterable[int | Sequence[int]]) -> np.ndarray:
    """uint64[n, 2] of rows that are a GPA or (gpa, size, access, vcpu) with defaults for what is left out."""
    pairs = [(row, word1()) if isinstance(row, int) else (row[0], word1(*row[1:])) for row in rows]
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


def chunk(
    rows: Iterable[int | Sequence[int]] | np.ndarray,
    gva: Sequence[int] | None = None,
    carry: Mapping[str, np.ndarray] | None = None,
) -> TraceChunk:
    """One chunk of a trace."""
    words = rows if isinstance(rows, np.ndarray) else records(rows)
    return TraceChunk(words, None if gva is None else np.array(gva, dtype=np.uint64), dict(carry or {}))


def replay(vm: VirtualMachine, *chunks: TraceChunk | Sequence[Any], **options: Any) -> TraceResult:
    """Replay chunks, or lists of rows, in one transaction."""
    with vm.replay(ReplayOptions(**options)) as run:
        for part in chunks:
            if not run.feed(part if isinstance(part, TraceChunk) else chunk(part)):
                break
        return run.finish()


TOTALS = ("records", "writes", "violations", "page_granular_violations", "mmio", "exits", "by_object")


def totals(result: TraceResult) -> dict[str, Any]:
    """Everything that is counted."""
    return {name: getattr(result, name) for name in TOTALS}


def exits(result: TraceResult, *names: str) -> list[tuple[Any, ...]]:
    """Exit records as tuples of the named columns."""
    columns = [result.exit_columns.column(name).tolist() for name in names]
    return list(zip(*columns, strict=True))


# ---- the whole machine


def picture(vm: VirtualMachine) -> tuple[str, Blocks]:
    """Everything that is durable: the head as JSON, and every block."""
    state = vm.state.current
    blocks = {block: (kind, data) for block, kind, data in named_blocks(state.snapshot.machine)}
    return json.dumps(vm.head(), sort_keys=True), blocks


def named_blocks(m: frames.Machine) -> Iterator[tuple[int, str, bytes]]:
    """(block, array, bytes) of every frame in use."""
    for frame, kind, data in blocks_of(m, None):
        yield frame, frames.KIND_NAMES[kind], data


@contextmanager
def unchanged(vm: VirtualMachine) -> Iterator[None]:
    """The machine is the same afterwards, and takes changes."""
    before = picture(vm)
    yield
    assert picture(vm) == before
    assert_sound(vm)
    assert vm.state.writer.acquire(blocking=False), "the writer was not let go"
    vm.state.writer.release()


@contextmanager
def refused(
    vm: VirtualMachine, kind: type[EngineError], field: str | None, value: Any, rule: str, errno: str | None = None
) -> Iterator[None]:
    """The call raises that error, names field, value and rule, and changes nothing."""
    with unchanged(vm), pytest.raises(kind, match=rule) as caught:
        yield
    assert (caught.value.field, caught.value.value) == (field, value)
    assert str(caught.value) == caught.value.rule
    if errno is not None:
        assert caught.value.errno == errno


def assert_sound(vm: VirtualMachine) -> None:
    """What holds of the frames of every published state."""
    m = vm.state.current.snapshot.machine
    used = m.row_of[m.row_of >= 0]
    assert len(np.unique(used)) == len(used), "two frames share a row"
    spare = vm.state.store.spare
    assert len(np.unique(spare)) == len(spare)
    assert not np.intersect1d(used, spare).size, "a row in use is spare"
    free = m.free[: int(m.top[frames.TOP_FREE])]
    places = range(1 + frames.records(m), 1 + vm.config.vcpu_records)
    assert len(places) == m.caps[frames.CAP_PLACES]
    assert sorted([*free, *places]) == np.flatnonzero(m.row_of < 0).tolist()
    assert ((m.kind == frames.FREE) == (m.row_of < 0)).all()
    assert not m.fresh.any()


class Durable:
    """A disk: the head and the blocks of a machine, brought up to date by increments."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.blocks: Blocks = {}

    def save(self, vm: VirtualMachine) -> int:
        """Take what changed; returns how many blocks that were."""
        self.head = json.loads(json.dumps(vm.head()))
        count = 0
        for array, block, data in vm.changed_blocks():
            assert len(data) == frames.FRAME_SIZE
            count += 1
            if array == "free":
                self.blocks.pop(block, None)
            else:
                self.blocks[block] = (array, data)
        return count

    def restore(self) -> VirtualMachine:
        """The machine as it was saved."""
        return VirtualMachine.restore(self.head, {(array, block): data for block, (array, data) in self.blocks.items()})


def round_trip(vm: VirtualMachine) -> VirtualMachine:
    """The machine that comes back from the durable form of this one; both have the same form."""
    head, blocks = picture(vm)
    back = VirtualMachine.restore(json.loads(head), {(array, block): data for block, (array, data) in blocks.items()})
    again, same = picture(back)
    assert same == blocks
    assert {**json.loads(again), "frames": 0} == {**json.loads(head), "frames": 0}
    assert_sound(back)
    return back


# ---- raw access to tables and kernels


def new_trail() -> np.ndarray:
    """Scratch for a walk."""
    return np.zeros((TRAIL_ROWS, 4), dtype=np.int64)


def bare_draft(config: VmConfig | None = None, slots: Sequence[SlotSpec] = ()) -> Draft:
    """A change on top of a new machine that is not yet published."""
    config = config or VmConfig()
    store: FrameStore = creation.new_store(config)
    draft = store.begin(slot_table(slots))
    creation.build(draft, config)
    return draft


def edit(vm: VirtualMachine, change: Callable[[frames.Machine], None]) -> None:
    """Change frames of a machine as a client with raw entries would."""
    with vm.state.change() as draft:
        change(draft.machine)


def leaf(vm: VirtualMachine, gfn: int) -> int | None:
    """The EPT leaf of a page, None where it is not mapped."""
    m = vm.state.current.snapshot.machine
    found, _, _, _, entry = mapping.find_leaf(m, gfn, new_trail())
    return unsigned(entry) if found else None


def store_leaf(vm: VirtualMachine, gfn: int, change: Callable[[int], int]) -> None:
    """Replace the EPT leaf of a mapped page."""

    def write(m: frames.Machine) -> None:
        found, _, table, index, entry = mapping.find_leaf(m, gfn, new_trail())
        assert found
        host_physical_memory.write_entry(m, table, index, np.int64(change(int(entry))))

    edit(vm, write)


def spread(mask: int) -> int:
    """The vector of a mask, by the manual's words alone."""
    return sum(1 << 2 * s for s in range(32) if mask >> s & 1)


def vector(vm: VirtualMachine, gfn: int, tree: int = 0) -> int | None:
    """The SPPL1E that a walk of a tree finds for a page, None where an entry above it is not valid."""
    m = vm.state.current.snapshot.machine
    record = m.rows[m.row_of[frames.FIRST_VCPU_FRAME + tree]]
    table = int(m.caps[frames.CAP_ARENA]) + (int(record[ctl.V_SPPT_ROOT]) << 12)
    for shift in (39, 30, 21):
        entry = int(host_physical_memory.read_entry(m, table, (gfn << 12 >> shift) & 511))
        if not entry & 1:
            return None
        table = entry & bits.ADDRESS
    return unsigned(int(host_physical_memory.read_entry(m, table, gfn & 511)))


def access(vm: VirtualMachine, gpa: int, kind: int = WRITE, **options: Any) -> list[str]:
    """Execute an access; what was done about each exit, and how it ended."""
    result = vm.access(AccessRequest(gpa, access=kind, **options))
    return [*(name for name in resolutions(result) if name != result.resolution), result.resolution]


def resolutions(result: Any) -> list[str]:
    """What was done about each listed exit of a replay result or access result."""
    columns = result.exit_columns if isinstance(result, TraceResult) else result.exits
    names: list[str] = columns.resolution_names()
    return names
