"""The recorded traces, reduced: what is known of them stays so."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from engine.footprint.advice import MOVE, advise, applied
from engine.footprint.build import Builder
from engine.footprint.costs import Costs
from engine.footprint.places import LEVELS, Footprint, Origin
from engine.footprint.question import Question
from engine.kvm.protections import ProtectedObject, ProtectedPages, Protection
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from engine.trace.readers import open_trace
from engine.trace.results import TraceResult
from engine.trace.session import ReplayOptions
from tests.engine.footprint.asking import answers, records_moved, said
from tests.support import recorded

TRUTH = json.loads(recorded.TRUTH.read_text(encoding="utf-8"))
MACHINE = VmConfig()
PLACES = {
    ("boot", "spans"): 120_419,
    ("boot", "bytes"): 4_144_606,
    ("user", "spans"): 16_479,
    ("user", "bytes"): 265_868,
}
RAM = Question((SlotSpec(0, 0, 1 << 30),))


@cache
def footprint(trace: str, level: str) -> Footprint:
    builder = Builder(level)
    with recorded.trace(trace).open("rb") as file:
        for chunk in open_trace("parquet", file):
            builder.feed(chunk)
    return builder.finish(Origin("", 0, "parquet", ("gpa", "size")))


def policy(name: str) -> Protection:
    document = json.loads(recorded.policy(name).read_text(encoding="utf-8"))
    objects = [
        ProtectedObject(o["name"], int(str(o["gpa"]), 0), int(o["size"]), o.get("granularity", "subpage"))
        for o in document["objects"]
    ]
    ranges = [ProtectedPages(*(int(str(value), 0) for value in row)) for row in document.get("pages", ())]
    return Protection(name, tuple(objects), tuple(ranges))


@pytest.mark.jit
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("trace", ["boot", "user"])
def test_places_are_as_many_as_were_counted_by_others(trace: str, level: str) -> None:
    found = footprint(trace, level)
    assert len(found) == PLACES[trace, level]
    assert found.records == TRUTH["kernel_control_data"][f"{trace}.parquet"]["records"]


@pytest.mark.jit
@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize("trace", ["boot", "user"])
def test_ground_truth_without_a_replay(trace: str, name: str) -> None:
    wanted: dict[str, Any] = TRUTH[name][f"{trace}.parquet"]
    for level in LEVELS:
        (cost,) = Costs(footprint(trace, level), RAM).of([policy(name)])
        assert (cost.violations, cost.page_granular_violations) == (
            wanted["violations"],
            wanted["page_granular_violations"],
        )
        first = wanted["first_indices"][0] if wanted["first_indices"] else None
        assert (cost.first.record if cost.first else None) == first
        for key, item in cost.by_object.items():
            known = wanted["by_object"].get(key, {"violations": 0, "collateral": 0})
            assert item.violations == known["violations"]
            assert item.collateral in ((known["collateral"],) if level == "bytes" else (None, known["collateral"]))


def replayed(wanted: Protection, change: Callable[[np.ndarray], np.ndarray] = lambda records: records) -> TraceResult:
    """A replay of the boot, of a guest that is changed so."""
    vm = VirtualMachine.create(MACHINE, RAM.memory_slots or (), spp=True)
    vm.protect(wanted.name, wanted.objects, wanted.ranges)
    with recorded.trace("boot").open("rb") as file, vm.replay(ReplayOptions(max_exit_records=0)) as run:
        for chunk in open_trace("parquet", file):
            run.feed(chunk.moved(change(chunk.records), chunk.gva))
        return run.finish()


@pytest.mark.jit
def test_policies_drawn_at_random_cost_what_their_replays_say() -> None:
    draw = random.Random(7)
    objects = policy("kernel_control_data").objects
    wanted = [
        Protection(
            f"{number}",
            tuple(
                replace(item, gpa=item.gpa + 8 * draw.randrange(-(1 << 15), 1 << 15), size=draw.choice([8, 200, 5000]))
                for item in objects
            ),
        )
        for number in range(10)
    ]
    costs = Costs(footprint("boot", "bytes"), RAM).of(wanted)
    for item, cost in zip(wanted, costs, strict=True):
        assert said(cost) == answers(replayed(item))


@pytest.mark.jit
def test_advice_on_the_boot_keeps_its_word() -> None:
    wanted = policy("kernel_control_data")
    report = advise(footprint("boot", "bytes"), wanted, RAM)
    assert {edit.action for edit in report.advice} == {MOVE}
    for edit in report.advice:
        assert edit.to is not None and edit.saves > 0
        item = next(item for item in wanted.objects if item.name == edit.object)
        result = replayed(
            applied(wanted, edit), lambda records, item=item, to=edit.to: records_moved(records, item, to)
        )
        assert said(edit.cost) == answers(result)
