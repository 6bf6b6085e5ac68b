"""Runs the mutants: ``python -m tests.mutants [--only ID ...] [--jobs N]``.

Each worker has a copy of engine/ and tests/ in a temporary directory, puts one fault in at a time, runs the tests that
must notice, and takes it out again. The tests run as plain Python, so that nothing has to be compiled; those without
any fault come first and must pass. The last line is ``mutants: N, killed: N, survived: N``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from . import (
    address_spaces,
    addresses,
    arch,
    areas,
    cpu_access_check,
    cpu_cache,
    cpu_controls,
    cpu_ept_walk,
    cpu_flags,
    cpu_guest,
    cpu_spp_walk,
    hyperv,
    interactive,
    ioctls,
    kinds,
    kvm,
    kvm_dirty,
    kvm_faults,
    kvm_pages,
    nested,
    store,
    symbols,
    trace,
    translations,
    vcpu,
)
from .mutant import Mutant, NotFound

PACKAGES = (
    arch,
    cpu_ept_walk,
    cpu_access_check,
    cpu_spp_walk,
    cpu_flags,
    cpu_controls,
    cpu_cache,
    cpu_guest,
    kinds,
    kvm,
    kvm_faults,
    address_spaces,
    kvm_pages,
    ioctls,
    areas,
    kvm_dirty,
    hyperv,
    nested,
    vcpu,
    trace,
    interactive,
    translations,
    addresses,
    store,
    symbols,
)
MUTANTS: tuple[Mutant, ...] = tuple(mutant for package in PACKAGES for mutant in package.MUTANTS)

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("engine", "service", "openapi", "tests", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.parquet", "mutants", "conformance")
PYTEST = (
    *("-m", "pytest", "-x", "-q", "--tb=line", "--no-header", "--hypothesis-profile=ci"),
    *("-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0"),
    *("-m", "not jit and not soak and not bench"),
)
# A fault can make a loop endless. That is noticed too.
TIMEOUT = 120
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Outcome:
    """How the tests of a job ended; ``noticed`` is None if they could not run."""

    name: str
    noticed: bool | None
    seconds: float
    detail: str


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def workplace(base: Path, number: int) -> Path:
    """A copy of what the tests need."""
    place = base / f"copy-{number}"
    place.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=LEFT_OUT)
        else:
            shutil.copy2(source, place / name)
    return place


def run_tests(place: Path, name: str, tests: Sequence[str]) -> Outcome:
    """Run tests in a copy."""
    environment = {
        **os.environ,
        "NUMBA_DISABLE_JIT": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # importing them takes longer than most of the tests
        "PYTHONPATH": str(place),
        "PYTHONDONTWRITEBYTECODE": "1",  # a fault and its line may have the same length and second
        "SUBPAGE_KERNEL_CACHE": str(place / "kernels"),
    }
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *PYTEST, *tests],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(name, True, time.monotonic() - begin, "no end")
    seconds = time.monotonic() - begin
    if done.returncode == PASSED:
        return Outcome(name, False, seconds, "")
    if done.returncode == FAILED:
        first = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        return Outcome(name, True, seconds, first[0].rpartition("/")[2] if first else "")
    return Outcome(name, None, seconds, (done.stdout + done.stderr).strip())


def run_mutant(place: Path, mutant: Mutant) -> Outcome:
    """Put a fault in, run its tests, take it out."""
    path = place / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutant.apply(source), encoding="utf-8")
    try:
        return run_tests(place, mutant.id, mutant.tests)
    finally:
        path.write_text(source, encoding="utf-8")


def baseline(mutants: Iterable[Mutant]) -> dict[str, list[str]]:
    """The tests of all mutants, by file."""
    tests: dict[str, list[str]] = {}
    for test in sorted({test for mutant in mutants for test in mutant.tests}):
        tests.setdefault(test.partition("::")[0], []).append(test)
    return tests


def check_list(mutants: Sequence[Mutant]) -> None:
    """Raise NotFound where the list does not fit the sources."""
    for mutant in mutants:
        changed = mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
        compile(changed, mutant.file, "exec")
    if len({mutant.id for mutant in mutants}) != len(mutants):
        raise NotFound("two mutants have the same id")


def run(mutants: Sequence[Mutant], jobs: int) -> int:
    """Run the baseline, then the mutants; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="subpage-mutants-") as base, ThreadPoolExecutor(jobs) as pool:
        places: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            places.put(workplace(Path(base), number))

        def at_a_place(job: Callable[[Path], Outcome]) -> Outcome:
            place = places.get()
            try:
                return job(place)
            finally:
                places.put(place)

        good = True
        groups = baseline(mutants).items()
        for outcome in pool.map(lambda g: at_a_place(lambda place: run_tests(place, *g)), groups):
            if outcome.noticed is not False:
                good = False
                say(f"without any fault, {outcome.name} fails: {outcome.detail}")
        if not good:
            return 1

        width = max(len(mutant.id) for mutant in mutants)
        killed = survived = 0
        results = pool.map(lambda mutant: at_a_place(lambda place: run_mutant(place, mutant)), mutants)
        for mutant, outcome in zip(mutants, results, strict=True):
            killed += outcome.noticed is True
            survived += outcome.noticed is False
            good = good and outcome.noticed is True
            verdict = {True: "killed", False: "SURVIVED", None: "ERROR"}[outcome.noticed]
            say(f"{mutant.id:{width}}  {verdict:8}  {outcome.seconds:5.1f} s  {mutant.rule}")
            if outcome.noticed is None:
                say(outcome.detail)
            elif not outcome.noticed:
                say(f"    {mutant.file}: {mutant.line}\n    became: {mutant.fault}")
        say(f"mutants: {len(mutants)}, killed: {killed}, survived: {survived}")
        return 0 if good else 1


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Put faults into the engine.")
    parser.add_argument("--only", action="append", metavar="ID", help="run this one; may be given again")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at a time (default 2)")
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if options.only is None or m.id in options.only]
    if not mutants or options.jobs < 1:
        parser.error("no such mutant, or no jobs")
    try:
        check_list(mutants)
    except NotFound as error:
        say(str(error))
        return 1
    return run(mutants, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
