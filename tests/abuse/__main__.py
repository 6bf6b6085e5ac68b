"""Every attack, the long ones too, and what came of it.

    python -m tests.abuse --minutes 10 --count 1000000

While the tests run, a process beside each of their servers asks its /livez over and over. The figures are printed at
the end; the status is 1 unless all attacks were held, no server took more than it may and none kept /livez waiting.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

from service.settings import MIB
from tests.abuse.process import FIGURES

LARGEST_PEAK = 1024 * MIB
LONGEST_STALL = 0.25


class Held:
    """Counts what the tests say."""

    def __init__(self) -> None:
        self.attacks: set[str] = set()
        self.lost: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            self.attacks.add(report.nodeid)
        if report.failed:
            self.attacks.add(report.nodeid)
            self.lost.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """The last word, after the summary of the tests."""
        attacks, held = len(self.attacks), len(self.attacks) - len(self.lost)
        sys.stdout.write(
            f"attacks: {attacks}, held: {held}, servers: {FIGURES.servers}, "
            f"peak memory of one: {FIGURES.peak // MIB} MiB of {LARGEST_PEAK // MIB}, longest stall of /livez: "
            f"{FIGURES.stall * 1000:.0f} ms of {LONGEST_STALL * 1000:.0f} ({FIGURES.asked:,} times asked)\n"
            f"the peak was in {FIGURES.peak_in}, the stall in {FIGURES.stall_in}\n"
        )

    def clean(self) -> bool:
        return bool(self.attacks) and not self.lost and FIGURES.peak < LARGEST_PEAK and FIGURES.stall < LONGEST_STALL


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.abuse", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of hostile values")
    parser.add_argument("--count", type=int, default=1_000_000, help="of mutated bodies")
    parser.add_argument("--seed", type=int, default=1, help="of the hostile values")
    options, further = parser.parse_known_args()
    for name in ("minutes", "count", "seed"):
        os.environ[name.upper()] = str(getattr(options, name))
    FIGURES.watching, held = True, Held()
    told = ("-m", "", "-o", "faulthandler_timeout=0", "-p", "no:xdist", *further)
    code = pytest.main([str(Path(__file__).parent), *told], plugins=[held])
    return 0 if code == pytest.ExitCode.OK and held.clean() else 1


if __name__ == "__main__":
    sys.exit(main())
