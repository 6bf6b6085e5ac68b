"""Footprints of the recorded traces, and thousands of policies on them. The parts of a recorded policy, moved about."""

from __future__ import annotations

import random

import numpy as np

from bench.data import CHUNK, Policy, Trace, load_policy
from engine.footprint.build import Builder
from engine.footprint.costs import Costs
from engine.footprint.places import Footprint, Origin
from engine.footprint.question import Question
from engine.kvm.protections import ProtectedObject, Protection
from engine.kvm.slots import SlotSpec
from engine.trace.columns import TraceChunk

RAM = Question((SlotSpec(0, 0, 1 << 30),))
_SPREAD = 1 << 20


class Building:
    """A trace reduced to its places, records in memory to columns in order."""

    def __init__(self, trace: Trace, level: str) -> None:
        self._chunks = [
            TraceChunk(np.array(trace.records[at : at + CHUNK]), None, {}) for at in range(0, len(trace), CHUNK)
        ]
        self._level = level
        self.footprint: Footprint
        self.table_bytes = 0

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        builder = Builder(self._level)
        for chunk in self._chunks:
            builder.feed(chunk)
        self.table_bytes = builder.nbytes
        self.footprint = builder.finish(Origin("", 0, "packed", ("gpa", "size", "access")))


class Costing:
    """So many policies on one footprint, all at once or each in a call of its own; the table of the places is there
    already."""

    def __init__(self, footprint: Footprint, count: int, *, alone: bool = False) -> None:
        draw = random.Random(count)
        objects = _objects(load_policy("kernel_control_data"))
        self._costs = Costs(footprint, RAM)
        self._policies = [
            Protection(f"{number}", tuple(_moved(draw, item) for item in objects)) for number in range(count)
        ]
        self.count = count
        self.calls = [[policy] for policy in self._policies] if alone else [self._policies]

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        for policies in self.calls:
            self._costs.of(policies)

    def violations(self, policy: Policy) -> int:
        """What a recorded policy costs."""
        return self._costs.of([Protection(policy.name, tuple(_objects(policy)))])[0].violations


def _objects(policy: Policy) -> list[ProtectedObject]:
    return [ProtectedObject(item["name"], int(str(item["gpa"]), 0), int(item["size"])) for item in policy.objects]


def _moved(draw: random.Random, item: ProtectedObject) -> ProtectedObject:
    gpa = max(0, item.gpa + 8 * draw.randrange(-_SPREAD // 8, _SPREAD // 8))
    return ProtectedObject(item.name, gpa, draw.choice([8, 64, 200, 4096, item.size]))
