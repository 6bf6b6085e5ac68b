"""Machines, policies and traces made up from a seed, and what a replay says of them beside what a footprint does."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.arch import access as acc
from engine.footprint.build import Builder
from engine.footprint.costs import Cost, Costs
from engine.footprint.places import Footprint, Origin
from engine.footprint.question import Question
from engine.kvm.protections import ProtectedObject, ProtectedPages, Protection
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from engine.trace.columns import TraceChunk
from engine.trace.results import TraceResult
from engine.trace.session import ReplayOptions

PAGE = 4096
ORIGIN = Origin("00" * 32, 0, "packed", ("gpa",))
KINDS = [(access, kind) for kind, some in enumerate(acc.KIND_ACCESSES) for access in some]


@dataclass(frozen=True)
class Scene:
    """A guest, a policy, and what the guest does: uint64[n, 2] records with kinds."""

    question: Question
    policy: Protection
    records: np.ndarray


def scene(seed: int, profile: str, count: int = 120) -> Scene:
    """Slots with holes between them, read-only and large ones; objects and ranges in them; records all around."""
    draw = random.Random(seed)
    slots = _slots(draw)
    pages = [page for slot in slots for page in (slot.gfn, slot.gfn + 1, slot.gfn + slot.pages - 1)]
    pages += [slot.gfn + draw.randrange(slot.pages) for slot in slots for _ in range(3)]
    records = [_record(draw, draw.choice(pages)) for _ in range(count)]
    return Scene(Question(tuple(slots), profile), _policy(draw, slots), np.array(records, dtype=np.uint64))


def _slots(draw: random.Random) -> list[SlotSpec]:
    slots, gfn = [], draw.choice([0, 3])
    for number in range(draw.randrange(1, 6)):
        gfn += draw.choice([0, 0, 1, 2])
        size = 4096
        pages = draw.randrange(1, 6)
        if draw.random() < 0.3:
            size, pages = draw.choice([1 << 21, 1 << 30]), draw.randrange(1, 1200)
        slots.append(SlotSpec(number, gfn * PAGE, pages * PAGE, draw.random() < 0.25, size))
        gfn += pages
    return slots


def _policy(draw: random.Random, slots: list[SlotSpec]) -> Protection:
    objects = []
    for number in range(draw.randrange(1, 6)):
        slot = draw.choice(slots)
        size = min(draw.choice([1, 8, 100, 128, 200, 4096, 9000]), slot.size)
        gpa = slot.gpa + draw.choice([0, slot.size - size, draw.randrange(slot.size - size + 1)])
        name = f"object {draw.choice([number, number, 0])}"
        objects.append(ProtectedObject(name, gpa, size, draw.choice(["subpage", "subpage", "subpage", "page"])))
    ranges = []
    for _ in range(draw.randrange(3)):
        slot = draw.choice(slots)
        pages = draw.randrange(1, min(slot.pages, 3) + 1)
        access = draw.choice([0, 0xFFFF_FFFF, 0xFFFF_0000, draw.randrange(1 << 32)])
        ranges.append(ProtectedPages(slot.gfn + draw.randrange(slot.pages - pages + 1), pages, access))
    return Protection("policy", tuple(objects), tuple(ranges))


def _record(draw: random.Random, page: int) -> tuple[int, int]:
    size = draw.choice([1, 2, 4, 8, 8, 8, 16, 64, 200, 4096, draw.randrange(1, 65536)])
    offset = draw.choice([0, PAGE - 4, draw.randrange(PAGE), draw.randrange(-3 * PAGE, PAGE), -draw.randrange(300)])
    access, kind = draw.choice([(acc.WRITE, acc.DATA)] * 6 + KINDS)
    linear = draw.choice([acc.LINEAR_VALID, acc.LINEAR_VALID | draw.randrange(acc.LINEAR_BITS + 1)])
    source = acc.GUEST
    if kind == acc.DATA and access != acc.EXECUTE and draw.random() < 0.2:
        source, linear = draw.choice([acc.EMULATED, acc.HOST]), acc.LINEAR_VALID
    elif acc.UNTRANSLATED_KINDS >> kind & 1 and draw.random() < 0.2:
        linear = 0
    word = size | access << 16 | acc.record_bits(kind, linear, source, draw.randrange(16))
    return max(0, page * PAGE + offset), word


def footprint_of(records: np.ndarray, level: str, origin: Origin = ORIGIN) -> Footprint:
    """The footprint of records."""
    builder = Builder(level)
    builder.feed(TraceChunk(records.copy(), None, {}, kinds=True))
    return builder.finish(origin)


def replayed(question: Question, policy: Protection, records: np.ndarray) -> TraceResult:
    """What a replay says, on a machine with these slots and this policy."""
    vm = VirtualMachine.create(VmConfig(profile=question.profile, maxphyaddr=52), question.memory_slots or (), spp=True)
    vm.protect(policy.name, policy.objects, policy.ranges)
    with vm.replay(ReplayOptions(max_exit_records=0)) as run:
        run.feed(TraceChunk(records.copy(), None, {}, kinds=True))
        return run.finish()


def answers(result: TraceResult) -> dict[str, Any]:
    """What a footprint answers, of a replay."""
    return {
        "violations": result.violations,
        "page_granular_violations": result.page_granular_violations,
        "mmio": result.mmio,
        "unenforced_writes": result.unenforced_writes,
        "by_object": {
            name: (hits.violations, hits.collateral, hits.first_index, hits.subpages)
            for name, hits in result.by_object.items()
        },
    }


def said(cost: Cost) -> dict[str, Any]:
    """The same of a cost."""
    return {
        "violations": cost.violations,
        "page_granular_violations": cost.page_granular_violations,
        "mmio": cost.mmio,
        "unenforced_writes": cost.unenforced_writes,
        "by_object": {
            name: (hits.violations, hits.collateral, None if hits.first is None else hits.first.record, hits.subpages)
            for name, hits in cost.by_object.items()
        },
    }


def cost_of(records: np.ndarray, level: str, question: Question, policy: Protection) -> Cost:
    """What one policy costs on the footprint of records."""
    return Costs(footprint_of(records, level), question).of([policy])[0]


def records_moved(records: np.ndarray, item: ProtectedObject, to: int) -> np.ndarray:
    """The trace of a guest in which an object is elsewhere."""
    gpa, size = records[:, 0].astype(np.int64), (records[:, 1] & np.uint64(0xFFFF)).astype(np.int64)
    own = (gpa < item.gpa + item.size) & (gpa + size > item.gpa)
    other = records.copy()
    other[:, 0] = np.where(own, gpa + to - item.gpa, gpa)
    return other
