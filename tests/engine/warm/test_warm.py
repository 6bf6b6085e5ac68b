"""Kernels are compiled before somebody waits for them: by several processes, once, the main job's first."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.kvm import slots
from engine.warm import steps, whole
from engine.warm.kernels import compiled, kernels, reached
from engine.warm.processes import CompilerEnded, compile_in_processes
from engine.warm.progress import progress_lines, progress_on

ROOT = Path(__file__).parents[3]


def run(program: str, cache: Path | None = None) -> str:
    """What a new process prints, with the kernels of this one unless it has an empty folder for them."""
    kept = {"NUMBA_DISABLE_JIT": "0", "PYTHONPATH": str(ROOT)}
    if cache is not None:
        kept["SUBPAGE_KERNEL_CACHE"] = str(cache)
    answer = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **kept}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_steps_know_nothing_of_each_other() -> None:
    """A process takes any of them, in any order."""
    for step in reversed(steps.ALL.values()):
        step()


# ---- the group of the main job

FIRST = """
import json
from engine.warm.kernels import kernels
from engine.warm.steps import FIRST, FIRST_KERNELS

for step in FIRST.values():
    step()
called = {k for k in kernels() if k.overloads and not k.stats.cache_misses.total()}
print(json.dumps([sorted(k.py_func.__qualname__ for k in called ^ set(FIRST_KERNELS))]))
"""


@pytest.mark.jit
def test_the_first_kernels_are_those_that_the_first_steps_call() -> None:
    steps.warm()  # in the cache from here on
    assert json.loads(run(FIRST)) == [[]]


MAIN_JOB = """
import json
from pathlib import Path
from engine.warm.kernels import kernels
from engine.warm.whole import load_kernels
from service.cli import demo
from service.api.protection.policies import ProtectionRequest
from service.settings import Settings
from tests.support.server import running
from tests.support.bodies import FORMATS, table

load_kernels("first")
before = {{kernel: len(kernel.overloads) for kernel in kernels()}}
trace = Path({trace!r})
trace.write_bytes(FORMATS["parquet"](table(gpa=[0x1000, 0x2080, 0xFEE00000], size=[8, 8, 4])).content)
with running(Settings(warm_up=False, store="memory")) as service:
    objects = [{{"name": "hit", "gpa": 0x2080, "size": 64}}]
    policy = ProtectionRequest.model_validate({{"name": "p", "objects": objects}})
    with trace.open("rb") as body:
        report = demo.replay(service.client, trace, body, policy, 1 << 20, "record16")
    assert report["violations"] == 1
print(json.dumps([k.py_func.__qualname__ for k, count in before.items() if len(k.overloads) > count]))
"""


@pytest.mark.jit
def test_the_main_job_needs_no_other_kernel(tmp_path: Path) -> None:
    """None is loaded during its requests, hence none is compiled where only the first ones are."""
    assert json.loads(run(MAIN_JOB.format(trace=str(tmp_path / "t.parquet")))) == []


@pytest.mark.jit
def test_calls_among_kernels_are_found_by_name() -> None:
    names = {kernel.py_func.__name__ for kernel in reached([slots.first_page_without_slot])}
    assert {"first_page_without_slot"} < names
    assert reached(steps.FIRST_KERNELS) < kernels()


# ---- processes


@pytest.mark.jit
def test_a_process_that_fails_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CompilerEnded, match="status 1"):
        compile_in_processes(["no such step"], set(), processes=1)
    assert "no such step" in capfd.readouterr().err


@pytest.mark.jit
def test_giving_up_ends_the_processes() -> None:
    gone = threading.Event()
    gone.set()
    compile_in_processes(list(steps.ALL), kernels(), processes=2, gone=gone)
    assert not [thread for thread in threading.enumerate() if thread.name == "compile"]


# ---- what is noted


@pytest.mark.jit
def test_a_second_time_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    steps.warm()
    whole.compile_kernels("all")
    whole.compile_kernels("first")
    monkeypatch.setattr(whole, "compile_in_processes", lambda *_: pytest.fail("something is compiled again"))
    whole.compile_kernels("all")
    whole.compile_kernels("first")
    assert compiled(kernels()) > 300


@pytest.mark.jit
def test_a_kernel_that_is_gone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "note.json"
    monkeypatch.setattr(whole, "_note", lambda group: note)
    assert not whole.is_compiled("all")
    note.write_text(json.dumps([]))
    assert whole.is_compiled("all") and whole.is_compiled("first")
    note.write_text(json.dumps(["engine/gone.nbc"]))
    assert not whole.is_compiled("all")
    note.write_text("cut sho")
    assert not whole.is_compiled("all")


def test_nothing_is_compiled_without_a_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole._config, "DISABLE_JIT", 1)
    assert whole.is_compiled("all")


# ---- kernels without their bitcode

LEAN = """
import numpy as np
from engine.cpu import sppt
from engine.jit import kernel
from engine.warm.lean import load_lean

load_lean([sppt.touched])
assert sppt.touched(0, 1) == 1 and not sppt.touched.stats.cache_misses


@kernel
def caller(gpa, size):
    return sppt.touched(gpa, size) + 100


print(caller(0, 1))
"""


@pytest.mark.jit
def test_a_kernel_that_was_loaded_for_calling_can_still_be_compiled_into_others(tmp_path: Path) -> None:
    run("from engine.cpu import sppt; sppt.touched(0, 1)")
    program = tmp_path / "lean.py"
    program.write_text(LEAN)
    assert run(f"import runpy; runpy.run_path({str(program)!r})") == "101\n"


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line() -> None:
    out = Terminal()
    report = progress_on(out)
    for done in (0, 1, 2):
        report(done, 2, done * 1.0)
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("2 of 2, 2 s\n") and "\r" in out.getvalue()


def test_progress_elsewhere_is_a_line_now_and_then() -> None:
    out = io.StringIO()
    report = progress_on(out)
    for second in range(25):
        report(second, 25, float(second))
    report(25, 25, 25.0)
    assert [line.split(": ")[1] for line in out.getvalue().splitlines()] == [
        f"{done} of 25, {done} s" for done in (0, 10, 20, 25)
    ]
    said: list[str] = []
    progress_lines(said.append)(25, 25, 1.0)
    assert len(said) == 1
