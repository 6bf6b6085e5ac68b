"""Thousands of random operations on one machine, each held against the naive model.

The machine goes through its durable form now and then. A longer run, or another: `make soak OPS=1000000 SEED=7`.
"""

from __future__ import annotations

import os
import random

import pytest

from engine.errors import EngineError
from tests.engine.builders import PROFILES, Durable, machine
from tests.property.comparing import compare
from tests.property.model import Model, Refused
from tests.property.operations import agree, do, first_slots, foretell, operation

OPERATIONS = 10_000
SEED = 20_260_516


def history(profile: str, seed: int, operations: int) -> dict[str, int]:
    """Run random operations; returns how many of each kind were done and not refused."""
    rng = random.Random(seed)
    vm, model, disk = machine(profile, slots=[]), Model(profile), Durable()
    done: dict[str, int] = {}
    for position in range(operations):
        first = first_slots()
        step = first[position] if position < len(first) else operation(rng.randint)
        where = f"profile {profile}, seed {seed}, operation {position}: {step}"
        answer = do(vm, step)
        try:
            wanted = foretell(model, step)
        except Refused:
            assert isinstance(answer, EngineError), where
        else:
            assert not isinstance(answer, EngineError), f"{where}: {answer}"
            try:
                agree(answer, wanted)
            except AssertionError as difference:
                raise AssertionError(where) from difference
            done[step[0]] = done.get(step[0], 0) + 1
        if position % 25 == 0:
            try:
                compare(vm, model)
            except AssertionError as difference:
                raise AssertionError(f"up to {where}") from difference
        if position % 500 == 499:
            disk.save(vm)
            vm, disk = disk.restore(), Durable()
    compare(vm, model)
    return done


@pytest.mark.jit
@pytest.mark.parametrize("profile", PROFILES)
def test_ten_thousand_operations(profile: str) -> None:
    done = history(profile, SEED, OPERATIONS)
    assert min(done.values()) > 50, done


@pytest.mark.parametrize("profile", PROFILES)
def test_a_few_hundred_operations(profile: str) -> None:
    assert history(profile, SEED + 1, 300)


@pytest.mark.soak
@pytest.mark.parametrize("profile", PROFILES)
def test_as_many_as_you_like(profile: str) -> None:
    operations = int(os.environ.get("OPS", "100000"))
    assert history(profile, int(os.environ.get("SEED", "1")), operations)
