"""Traces with operations that ask: the same as without asking, and loads of CR3 that somebody watches."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from engine.errors import TraceError
from engine.machine import VirtualMachine
from engine.trace.interactive import Load
from engine.trace.interactive_timed import InteractiveTimedReplay
from engine.trace.readers import open_trace
from engine.trace.results import TraceResult
from engine.trace.session import ReplayOptions
from tests.engine.builders import assert_sound, exits, picture, set_map, totals
from tests.engine.hyperv.flush_traces import (
    GVA,
    NEW,
    OLD,
    OTHER_SPACE,
    Row,
    access,
    flush,
    invlpg,
    mov_cr3,
    parts,
    replayed,
)
from tests.engine.hyperv.guests import CR3, hyperv_guest

LISTED = ("index", "reason", "qualification", "gpa", "gva", "denied", "resolution", "stale")
OPEN = 0x13000
Answer = tuple[str, int | None]


def guest() -> VirtualMachine:
    """The lower half of the old frame may be written, and the upper half of the new one."""
    vm = hyperv_guest((0, 5, 65), flush_policy="kvm")
    vm.enable_spp()
    set_map(vm, OLD >> 12, 0xFFFF)
    set_map(vm, NEW >> 12, 0xFFFF_0000)
    return vm


def load_of(vcpu: int, value: int) -> Row:
    """A load whose operand is its address space."""
    return {"op": 2, "vcpu": vcpu, "address_space": value}


def ask(
    vm: VirtualMachine,
    rows: Sequence[Row],
    answer: Callable[[VirtualMachine, Any], Answer] = lambda vm, asked: ("allow", None),
    watched: Callable[[int], bool] = lambda vcpu: True,
    split: int = 0,
    most: int | None = None,
) -> TraceResult:
    """Replay and answer; ``answer`` is given a Load or exit records."""
    body = "".join(json.dumps({"op": 0, **row}) + "\n" for row in rows).encode()
    chunks = iter([part for found in open_trace("ndjson", io.BytesIO(body)) for part in parts(found, split or 1000)])
    earlier: InteractiveTimedReplay | None = None
    given: Answer | None = None
    while True:
        with vm.replay(ReplayOptions(on_violation="ask"), earlier, watched) as run:
            assert isinstance(run.replay, InteractiveTimedReplay)
            earlier = run.replay
            going = earlier.finish_chunk() if given is None else earlier.answer(given[0], most, given[1])
            if going and given is not None and most is not None:
                run.pause()
                given = None
                continue
            while going and (part := next(chunks, None)) is not None:
                going = run.feed(part)
            if earlier.paused_at is None:
                return run.finish()
            run.pause()
        given = answer(vm, earlier.load or earlier.asked)


def drawn(seed: int, count: int = 60) -> list[Row]:
    """Accesses of three vCPUs to two pages whose frames change, and what flushes a translation, or does not."""
    chance = random.Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        vcpu, gva = chance.randrange(3), GVA + 0x1000 * chance.randrange(2)
        offset = chance.choice((0, 8, 0x7F8, 0x7FC, 0x800, 0xFF8))
        row = access(vcpu, chance.choice((OLD, OLD, NEW, OPEN)) + offset, gva + offset, access=chance.choice((0, 1, 1)))
        if chance.random() < 0.2:
            row["address_space"] = chance.choice((CR3, OTHER_SPACE))
        rows.append(row)
        if chance.random() < 0.3:
            operations = (flush(chance.choice((0, 5))), invlpg(vcpu, gva), mov_cr3(vcpu, CR3))
            rows.append(chance.choice((*operations, mov_cr3(vcpu, OTHER_SPACE), mov_cr3(vcpu, 1 << 60))))
            if chance.random() < 0.2:
                rows.append(load_of(vcpu, CR3))
    return rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("action", ["skip", "allow", "grant", "stop"])
def test_always_the_same_answer(seed: int, action: str) -> None:
    """Comes to what a replay does under that name; loads that are watched take place as recorded."""
    plain, asked = guest(), guest()
    rows = drawn(seed)
    known = replayed(plain, rows, split=25, on_violation=action)
    loads = 0

    def answer(vm: VirtualMachine, what: Any) -> Answer:
        nonlocal loads
        loads += isinstance(what, Load)
        return ("allow" if isinstance(what, Load) else action), None

    found = ask(asked, rows, answer, lambda vcpu: vcpu != 1, split=25, most=(None, 0, 3)[seed % 3])
    assert totals(found) == totals(known) and known.violations and found.stopped_at == known.stopped_at
    assert exits(found, *LISTED) == exits(known, *LISTED)
    if action != "grant":  # the entry of a granted access counts as made by it
        assert found.translations == known.translations
    assert found.translations.stale == known.translations.stale
    assert asked.counters() == plain.counters() and picture(asked) == picture(plain)
    assert loads or action == "stop"
    assert_sound(asked)


def test_a_load_is_asked_about_before_it_takes_place() -> None:
    vm = guest()
    seen: list[tuple[Load, int]] = []

    def answer(now: VirtualMachine, what: Any) -> Answer:
        seen.append((what, now.vcpus.vmcs(what.vcpu)["cr3"]))
        return "allow", None

    rows = [access(1, OLD), mov_cr3(1, OTHER_SPACE), mov_cr3(0, OTHER_SPACE), load_of(1, CR3)]
    found = ask(vm, rows, answer, lambda vcpu: vcpu == 1)
    assert seen == [(Load(1, 1, OTHER_SPACE), CR3), (Load(3, 1, CR3), OTHER_SPACE)]
    assert found.translations.operations["mov-cr3"] == 3 and vm.vcpus.vmcs(0)["cr3"] == OTHER_SPACE


@pytest.mark.parametrize("row", [mov_cr3(1, CR3), load_of(1, CR3)])
def test_what_is_loaded_may_be_another_value(row: Row) -> None:
    vm = guest()
    found = ask(vm, [row], lambda now, what: ("allow", OTHER_SPACE))
    assert vm.vcpus.vmcs(1)["cr3"] == OTHER_SPACE
    assert found.translations.operation_records[0].operand == OTHER_SPACE
    # One that CR3 cannot have is what it is in a guest: an exception.
    found = ask(vm, [row], lambda now, what: ("allow", 1 << 60))
    assert vm.vcpus.vmcs(1)["cr3"] == OTHER_SPACE and found.translations.operation_records[0].outcome == "exception"


def test_a_load_may_be_left_out_asked_about_again_or_end_the_replay() -> None:
    vm = guest()
    assert ask(vm, [mov_cr3(1, OTHER_SPACE)], lambda now, what: ("skip", None)).translations.operations["mov-cr3"] == 0
    assert vm.vcpus.vmcs(1)["cr3"] == CR3
    answers = iter([("retry", None), ("retry", None), ("stop", None)])
    found = ask(vm, [access(0, OPEN), mov_cr3(1, OTHER_SPACE), access(0, OPEN)], lambda now, what: next(answers))
    assert (found.stopped_at, found.records) == (1, 1) and vm.vcpus.vmcs(1)["cr3"] == CR3


def test_the_machine_may_change_while_a_load_waits() -> None:
    """What was flushed by somebody else is not stale, and not said to have been made by the trace."""
    vm = guest()

    def answer(now: VirtualMachine, what: Any) -> Answer:
        if isinstance(what, Load):
            now.vcpus.invept(0, 2, 0)
            set_map(now, NEW >> 12, 0xFFFF_FFFF)
        return "skip", None

    found = ask(vm, [access(0, OLD), mov_cr3(1, CR3), access(0, NEW)], answer)
    assert found.translations.stale == 0 and found.violations == 0 and found.records == 2


def test_what_is_no_operation_is_refused() -> None:
    vm = guest()
    with pytest.raises(TraceError, match="id of a vCPU") as caught:
        ask(vm, [access(0, OPEN), mov_cr3(7, CR3)])
    assert caught.value.index == 1
