"""Random operations on a machine, compared with the naive model, and every machine taken through its durable form."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.machine import VirtualMachine
from tests.engine.builders import (
    PROFILES,
    Durable,
    machine,
    maps,
    picture,
    replay,
    round_trip,
    totals,
)
from tests.property.comparing import LAYERS, compare
from tests.property.model import PAGE, Model, Refused
from tests.property.operations import (
    FIRST,
    LAST,
    Draw,
    agree,
    do,
    drawing,
    first_slots,
    foretell,
    operation,
    rows,
    small,
)


@pytest.mark.parametrize("profile", PROFILES)
@small
@given(data=st.data())
def test_machine_does_what_the_model_says(profile: str, data: st.DataObject) -> None:
    draw = drawing(data)
    vm, model, disk = machine(profile, slots=[]), Model(profile), Durable()
    steps = first_slots() + [operation(draw) for _ in range(draw(3, 12))]
    for position, step in enumerate(steps):
        before = picture(vm)
        answer = do(vm, step)
        try:
            tally = foretell(model, step)
        except Refused:
            assert isinstance(answer, EngineError), step
            assert picture(vm) == before, step
        else:
            assert not isinstance(answer, EngineError), (step, answer)
            agree(answer, tally)
        if position % 3 == 0:
            disk.save(vm)
    compare(vm, model)
    compare(round_trip(vm), model)
    disk.save(vm)
    assert disk.blocks == picture(vm)[1]
    compare(disk.restore(), model)


def view(vm: VirtualMachine) -> list[Any]:
    """All that can be read of a machine, but for where its tables are: frames are numbered anew by a restore."""
    pages = [gfn for spec in vm.slots() for gfn in range(spec.gfn, spec.gfn + spec.pages)]
    walks = [vm.walk(gfn * PAGE + 124) for gfn in range(FIRST, LAST)]
    return [
        vm.slots(),
        vm.protections(),
        vm.counters(),
        [maps(vm, gfn, layer=layer) for gfn in pages for layer in LAYERS],
        [vm.read_memory(gfn * PAGE, PAGE) for gfn in pages],
        [(walk.outcome, walk.qualification, walk.denied, len(walk.ept), len(walk.sppt)) for walk in walks],
    ]


def furnished(profile: str, draw: Draw) -> VirtualMachine:
    vm = machine(profile, slots=[])
    for step in first_slots() + [operation(draw) for _ in range(6)]:
        do(vm, step)
    return vm


@pytest.mark.parametrize("profile", PROFILES)
@small
@given(data=st.data())
def test_replay_in_one_call_is_any_split(profile: str, data: st.DataObject) -> None:
    draw = drawing(data)
    one, many, chunked = (round_trip(vm) for vm in [furnished(profile, draw)] * 3)
    accesses = rows(draw, draw(2, 30))
    cuts = sorted(draw(0, len(accesses)) for _ in range(draw(1, 4)))
    bounds = [0, *cuts, len(accesses)]
    parts = [accesses[a:b] for a, b in pairwise(bounds)]
    options = {"on_violation": ("skip", "allow", "grant")[draw(0, 2)]}
    whole = replay(one, accesses, **options)
    assert totals(replay(chunked, *parts, **options)) == totals(whole)
    results = [replay(many, part, **options) for part in parts]
    for name in ("records", "writes", "violations", "page_granular_violations", "mmio"):
        assert sum(getattr(result, name) for result in results) == getattr(whole, name), name
    for kind, count in whole.exits.items():
        assert sum(result.exits[kind] for result in results) == count, kind
    for name, hits in whole.by_object.items():
        assert sum(result.by_object[name].violations for result in results) == hits.violations
        assert sum(result.by_object[name].collateral for result in results) == hits.collateral
    assert picture(one)[1] == picture(many)[1] == picture(chunked)[1]


@pytest.mark.parametrize("profile", PROFILES)
@small
@given(data=st.data())
def test_restored_machine_goes_on_as_the_first(profile: str, data: st.DataObject) -> None:
    draw = drawing(data)
    vm = furnished(profile, draw)
    back = round_trip(vm)
    for _ in range(4):
        step = operation(draw)
        first, second = do(vm, step), do(back, step)
        assert type(first) is type(second)
    assert view(back) == view(vm)
    assert {**back.head(), "frames": 0} == {**vm.head(), "frames": 0}


# ---- compiled or not

SEEDS = (1, 2, 3)


def outcome(seed: int) -> list[str]:
    """What a machine answers to operations from a seed, as text."""
    rng = random.Random(seed)
    vm = machine(PROFILES[seed % 2], slots=[])
    answers = []
    for step in first_slots() + [operation(rng.randint) for _ in range(40)]:
        answer = do(vm, step)
        if isinstance(answer, EngineError):
            answers.append(f"{answer.code} {answer.field} {answer.rule}")
        elif hasattr(answer, "exit_columns"):
            answers.append(json.dumps([repr(totals(answer)), answer.exit_columns.column("qualification").tolist()]))
        elif hasattr(answer, "exits"):
            answers.append(f"{answer.resolution} {answer.exits.column('gpa').tolist()}")
    head, blocks = picture(vm)
    state = [f"{block} {kind} {hash_of(data)}" for block, (kind, data) in sorted(blocks.items())]
    found = [vm.walk(page * PAGE + 124).sentence for page in range(FIRST, LAST)]
    return [*answers, head, *state, *found]


def hash_of(data: bytes) -> int:
    return sum(byte * (position + 1) for position, byte in enumerate(data))


@pytest.mark.jit
def test_compiled_kernels_and_plain_python_answer_the_same() -> None:
    root = Path(__file__).parents[2]
    program = (
        "import json, random; from tests.property.test_machine_properties import SEEDS, outcome; "
        "from tests.property import test_processor_properties as processor; "
        "print(json.dumps([outcome(s) + processor.outcome(random.Random(s).randint) for s in SEEDS]))"
    )
    answers = []
    for disabled in ("0", "1"):
        answer = subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={**os.environ, "NUMBA_DISABLE_JIT": disabled, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(json.loads(answer.stdout))
    for seed, compiled, plain in zip(SEEDS, *answers, strict=True):
        assert compiled == plain, f"seed {seed}"
    text = json.dumps(answers[0])
    assert all(word in text for word in ("violation", "completed", "mmio", "invalid-value", "denied: sub-page"))
