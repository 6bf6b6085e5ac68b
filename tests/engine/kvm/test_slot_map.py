"""Memory slots as one map: order, neighbours, and a change that costs the same however many slots there are."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from engine.errors import InvalidValue
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec, slot_table
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from service.runtime.changes import changes_of

PAGE = 4096


def test_map_is_what_a_list_of_slots_would_be() -> None:
    """Random changes against the plain rule: every other slot is looked at."""
    chance = random.Random(5)
    found, model = SlotMap(), dict[int, SlotSpec]()
    for _ in range(1500):
        spec = SlotSpec(
            chance.randrange(12),
            chance.randrange(40) * PAGE,
            chance.randrange(1, 5) * PAGE,
            read_only=chance.random() < 0.3,
            log_dirty=chance.random() < 0.3,
            address_space=int(chance.random() < 0.3),
        )
        if chance.random() < 0.2 and model:
            key = chance.choice(sorted(model))
            before, found = found, found.without(key)
            del model[key]
            assert found.changed_since(before) == [key]
        elif any(
            other.key != spec.key and other.address_space == spec.address_space and other.overlaps(spec)
            for other in model.values()
        ):
            with pytest.raises(InvalidValue, match="must not overlap slot") as caught:
                found.with_slot(spec)
            assert caught.value.errno == "EEXIST"
        else:
            before, found = found, found.with_slot(spec)
            model[spec.key] = spec
            assert found.changed_since(before) == [spec.key]
        assert dict(found) == model and found.logged == sum(s.log_dirty for s in model.values())
        assert found.table.tolist() == slot_table(model.values()).tolist()
        assert sorted(json.loads(found.json)) == sorted(s.row() for s in model.values())
        gfn = chance.randrange(48)
        every = (s for s in model.values() if not s.address_space)
        assert found.holding(gfn) == next((s for s in every if s.gfn <= gfn < s.gfn + s.pages), None)
    again = SlotMap.of(model.values())
    assert again.table.tolist() == found.table.tolist() and again.logged == found.logged


def test_changes_over_several_maps() -> None:
    first = SlotMap.of([SlotSpec(n, n * PAGE, PAGE) for n in range(5)])
    last = first.without(3).with_slot(SlotSpec(9, 99 * PAGE, PAGE)).with_slot(SlotSpec(0, 50 * PAGE, PAGE))
    assert last.changed_since(first) == [0, 3, 9]
    assert first.changed_since(first) == []


def lines_run(work: Callable[[], Any]) -> int:
    """How many lines of the engine and of the service run; kernels apart, which are compiled."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if ("/engine/" not in name and "/service/" not in name) or "/cpu/" in name:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_one_slot_costs_the_same_however_many_there_are() -> None:
    """Making it, telling what has changed, and the head for the store."""

    def lines(count: int) -> int:
        vm = VirtualMachine.create(VmConfig(profile="kvm-latest"))
        for slot in range(count):
            vm.set_slot(SlotSpec(slot, slot << 20, PAGE))

        def work() -> None:
            after = vm.successor()
            after.set_slot(SlotSpec(count, count << 20, PAGE))
            assert len(list(changes_of(vm, after))) == 1
            after.head_json()
            vm.withdraw(after)

        return lines_run(work)

    assert lines(10) == lines(400) > 50


def test_the_text_of_the_head_is_the_head() -> None:
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, PAGE), SlotSpec(1, 1 << 20, PAGE, read_only=True)])
    vm.set_slot(SlotSpec(0, 1 << 30, PAGE))
    assert json.loads(vm.head_json()) == json.loads(json.dumps(vm.head()))
    assert VirtualMachine.restore(vm.head(), {b[:2]: b[2] for b in vm.changed_blocks()}).slots() == vm.slots()
