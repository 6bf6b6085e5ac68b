"""The examples, run as `make examples` runs them; each asserts its own figures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.client import ContractClient
from tests.support.notebooks import shown_by

ROOT = Path(__file__).parents[2]
# What each of them prints, beside asserting its figures.
EXAMPLES = {
    "introspection": r"^\d+ events; whole pages would have made \d+$",
    "live_introspection": r"^6 questions: allow 2, grant 1, retry 1, skip 2$",
    "checkpoint": r"^[1-9]\d* bytes saved",
    "device": r"exits for the doorbell: \d+ times fewer$",
}


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.jit
@pytest.mark.parametrize(("name", "printed"), EXAMPLES.items())
def test_example(client: ContractClient, name: str, printed: str) -> None:
    assert re.search(printed, run(name, str(client.base_url)), re.MULTILINE)


def test_the_forgotten_flush_is_found(client: ContractClient) -> None:
    first, missed, stale, hit, fresh, traced, why = run("forgotten_flush", str(client.base_url)).splitlines()
    assert first == "vCPU 1 writes to 0x11000"
    assert missed == "flush of VPs 0b10: targets [], 0 translations dropped"
    assert stale == "vCPU 1 writes to 0x11000: a stale translation, the flush missed VP 5"
    assert hit == "flush of VPs 0b100000: targets [5], 1 translations dropped"
    assert fresh == "vCPU 1 writes to 0x12000: as mapped"
    assert traced == "record 3 of the trace wrote to 0x11000 instead of 0x12000"
    assert why.startswith("VP 5 needed a flush of 0x7f0000001000 after record 0 and before record 3: ")
    assert why.endswith("at record 1 flushed VPs {}; VP 5 was not in its processor set")


@pytest.mark.jit
def test_an_example_brings_its_own_service() -> None:
    assert "times fewer" in run("device")


@pytest.mark.jit
def test_the_notebook_shows_what_it_says(client: ContractClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs are those of Jupyter, but for ids."""
    path = ROOT / "examples" / "cost_a_policy.ipynb"
    assert path.stat().st_size < 30_000
    monkeypatch.setenv("SUBPAGE_SERVER", str(client.base_url))
    monkeypatch.delenv("SUBPAGE_TOKEN", raising=False)
    monkeypatch.chdir(path.parent)
    for cell, now, then in shown_by(path):
        both = [[re.sub(r"\b(tr|vm)_[0-9a-f]+", r"\1", text) for text in texts] for texts in (now, then)]
        assert both[0] == both[1], cell


def test_make_runs_them_all() -> None:
    recipe = re.search(r"^examples:.*?\n\n", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert recipe and all(name in recipe[0] for name in EXAMPLES)
