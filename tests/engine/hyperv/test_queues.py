"""KVM's queues: the printed sequences, and which targets flush when."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.arch import controls as ctl
from engine.arch.hypercall import EVERYTHING
from engine.hyperv import flush_execution, notes, queues
from engine.hyperv.flush_execution import Facts

from .flush_machine import ALL, FlushMachine, words

KVM = Facts("kvm")
TARGET = 1
PAGES = [0x7F0010000000 + 0x1000 * i for i in range(16)]
FULL = EVERYTHING


def list_call(machine: FlushMachine, count: int) -> None:
    done = machine.slow(count << 32 | 3, words(0, 2, 1 << TARGET, *PAGES[:count]))
    assert done.flushed == () and done.targeted == (TARGET,)


def space_call(machine: FlushMachine) -> None:
    assert machine.slow(2, words(0, 2, 1 << TARGET)).targeted == (TARGET,)


def asleep() -> FlushMachine:
    machine = FlushMachine()
    machine.run_elsewhere(TARGET)
    return machine


@pytest.mark.parametrize(
    ("name", "calls", "queued", "statistic", "full"),
    [
        ("Q01", (7, 7, 7), [*PAGES[:7], *PAGES[:7], FULL], 15, True),
        ("Q02", (15, 1), [*PAGES[:15], FULL], 16, True),
        ("Q03", (15, 1, 1), [*PAGES[:15], FULL], 16, True),
        ("Q04", (0, 1), [FULL, PAGES[0]], 1, True),
        ("Q07", (16,), [FULL], 1, True),
        ("one place is kept", (8, 8), [*PAGES[:8], FULL], 9, True),
        ("seven and eight fit", (7, 8), [*PAGES[:7], *PAGES[:8]], 15, False),
    ],
)
def test_sequences(name: str, calls: tuple[int, ...], queued: list[int], statistic: int, full: bool) -> None:
    machine = asleep()
    for count in calls:
        list_call(machine, count) if count else space_call(machine)
    assert machine.queue(TARGET) == tuple(queued)
    assert machine.held(TARGET) == ALL
    assert flush_execution.service(machine.m, TARGET, False, KVM) == statistic
    assert notes.statistic(machine.m, TARGET, ctl.V_HV_FLUSHES) == statistic
    assert machine.held(TARGET) == ("" if full else ALL)
    assert machine.queue(TARGET) == ()
    assert flush_execution.service(machine.m, TARGET, False, KVM) == 0


def test_an_unrelated_full_flush_does_what_was_queued() -> None:  # Q05
    machine = asleep()
    list_call(machine, 3)
    flush_execution.full_flush(machine.m, TARGET, False)
    assert flush_execution.service(machine.m, TARGET, False, KVM) == 0
    assert notes.statistic(machine.m, TARGET, ctl.V_HV_FLUSHES) == 1
    assert machine.held(TARGET) == ""


def test_each_mode_has_its_queue() -> None:  # Q06
    machine = asleep()
    queues.enqueue(machine.m.queues, TARGET, queues.NESTED_QUEUE, PAGES[:2])
    assert flush_execution.service(machine.m, TARGET, False, KVM) == 0
    assert machine.queue(TARGET, queues.NESTED_QUEUE) == tuple(PAGES[:2])
    # a transition asks again, because the request was used up by the other mode
    queues.request(machine.m.queues, TARGET)
    assert flush_execution.service(machine.m, TARGET, True, KVM) == 2
    assert machine.queue(TARGET, queues.NESTED_QUEUE) == ()


def test_a_running_target_has_flushed_when_the_call_returns() -> None:
    machine = FlushMachine()
    done = machine.slow(2, words(0, 2, 1 << TARGET))
    assert done.flushed == (TARGET,)
    assert machine.held(TARGET) == "" and machine.queue(TARGET) == ()


def test_a_range_that_cannot_be_an_address_is_not_counted() -> None:
    machine = FlushMachine()
    done = machine.slow(2 << 32 | 3, words(0, 2, 1, 0xAAAAAAAAAAAAA000, 0x7F0000001000))
    assert done.effects[0].flushes == 1


def test_without_nested_paging_every_flush_is_full() -> None:
    machine = FlushMachine(facts=replace(KVM, ept=False))
    done = machine.slow(1 << 32 | 3, words(0, 2, 1, PAGES[0]))
    assert machine.held(0) == "" and done.effects[0].flushes == 1


def test_the_last_pages_of_all_look_like_everything() -> None:
    machine = FlushMachine()
    assert machine.slow(1 << 32 | 3, words(0, 2, 1, FULL)).flushed == (0,)
    assert machine.held(0) == ""


def test_the_specification_with_queues_drops_large_ranges_whole() -> None:
    machine = FlushMachine("tlfs", "kvm")
    done = machine.slow(1 << 32 | 3, words(0, 0xA, 1, 0x7F0000200807))
    assert machine.held(0) == "" and not any(len(effect.left) for effect in done.effects)
    assert np.all(machine.m.queues[0, :, 0] == 0)
