"""The engine and Bochs decide the same about thousands of accesses, apart from known faults of Bochs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import bochs
from .engine_side import evaluate
from .generate import generate
from .tally import TALLY, Tally

LACKING = bochs.missing_tools()
CLASSES = ("allowed", "48 plain", "48 by SPP", "49", "66 miss", "66 misconfiguration")
RANDOM_ACCESSES = 5000
PER_CLASS = 300
EXCLUDED_SHARE = 0.1
SHOWN = 10


def seeds() -> Iterator[int]:
    """SEEDS seeds (default 1), starting with SEED (default 1)."""
    first = int(os.environ.get("SEED", "1"))
    yield from range(first, first + int(os.environ.get("SEEDS", "1")))


@pytest.mark.skipif(LACKING is not None, reason=f"Bochs conformance: {LACKING}")
def test_engine_agrees_with_bochs(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    program = bochs.build(tmp_path)
    tally = pytestconfig.stash[TALLY] = Tally()
    runs = 0
    for seed in seeds():
        vectors = generate(seed)
        processor, theirs = bochs.run(program, vectors, tmp_path / "machine")
        tally.add(seed, vectors, evaluate(vectors, processor), theirs)
        runs += 1
    assert not tally.differences, "\n".join(tally.differences[:SHOWN])
    assert tally.random.total() >= RANDOM_ACCESSES * runs
    assert [name for name in CLASSES if tally.random[name] < PER_CLASS * runs] == []
    assert tally.excluded.total() < EXCLUDED_SHARE * tally.total
    assert tally.unused() == []
