"""Some thousand mutated bodies, in a process of their own: a crash is a failure here, not the end of the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.abuse.fuzz_bodies import bodies

ROOT = Path(__file__).parents[2]


def fuzzed(count: int, seed: int) -> str:
    """The last line that the fuzzer writes. Memory that was freed is not what it was."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.abuse.fuzz_bodies", "--count", str(count), "--seed", str(seed)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_PERTURB_": "183", "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr.splitlines()[-1]


def test_thousands_of_mutated_bodies() -> None:
    told = fuzzed(4_000, seed=7)
    for outcome in ("arrow accepted", "arrow refused", "parquet accepted", "parquet refused"):
        found = re.search(rf"{outcome} ([\d,]+)", told)
        assert found is not None, told
        assert int(found[1].replace(",", "")) > 50, told


@pytest.mark.abuse
def test_a_million_of_them() -> None:
    count = int(os.environ.get("COUNT", "1000000"))
    for number in range(-(-count // 100_000)):
        assert "arrow refused" in fuzzed(min(count, 100_000), seed=100 + number)


def test_bodies_can_be_made_again() -> None:
    """By the seed and the number that a failure names."""
    first, second = bodies(3), bodies(3)
    assert [next(first) for _ in range(150)] == [next(second) for _ in range(150)]
