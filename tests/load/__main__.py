"""Concurrent replays of a real guest's boot, and bitmap calls at a steady rate, against a real server.

    python -m tests.load --seconds 30 --rate 200 --replays 4

The server, the replays and the bitmap calls are three processes. The exit status is 0 if no call failed and the event
loop's lag stayed below ``--lag-ms`` at its 99th percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from bench.data import RAM_BYTES, load_policy
from bench.servers import serving
from tests.load.bitmaps import Outcome, calls, quantile
from tests.load.histograms import COMMITS, LAG, Buckets, between, bucket_quantile, buckets
from tests.load.replays import POLICY

QUIET_MACHINES = 16


@dataclass(frozen=True)
class Load:
    """What is asked for. ``limit`` cuts the trace to its first records; 0 takes all of it."""

    seconds: float
    rate: float
    replays: int
    limit: int = 0


@dataclass(frozen=True)
class Report:
    """What came of it."""

    calls: Outcome
    replays: int
    errors: list[str]
    lag: Buckets
    commits: Buckets

    def __str__(self) -> str:
        calls = self.calls
        return (
            f"bitmap calls: {len(calls.all)}, p50 {_ms(calls.all, 0.5)}, p99 {_ms(calls.all, 0.99)} "
            f"(reads {_ms(calls.reads, 0.99)}, changes {_ms(calls.changes, 0.99)}); replays: {self.replays}; "
            f"event-loop lag p99: {1000 * self.lag_p99:.1f} ms; errors: {len(self.errors)}"
        )

    @property
    def lag_p99(self) -> float:
        return bucket_quantile(self.lag, 0.99)

    def good(self, lag_seconds: float) -> bool:
        return not self.errors and self.replays > 0 and self.lag_p99 < lag_seconds


def _ms(times: list[float], q: float) -> str:
    return f"{1000 * quantile(times, q):.1f} ms"


def _new_machine(http: httpx2.Client, name: str, *, guarded: bool) -> str:
    document = {"name": name, "spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": RAM_BYTES}]}
    reply = http.post("/v1/vms", json=document)
    reply.raise_for_status()
    home: str = reply.headers["Location"]
    if guarded:
        objects = load_policy(POLICY).objects
        http.post(f"{home}/protections", json={"name": POLICY, "objects": objects}).raise_for_status()
    return home


@contextlib.contextmanager
def _replaying(port: int, load: Load, vms: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The process of the replays, from when all of them are under way."""
    command = [sys.executable, "-m", "tests.load.replays", str(port), str(load.seconds), str(load.limit), *vms]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            yield process
        finally:
            process.kill()


def put_under(load: Load, store: str) -> Report:
    """Start a server on ``store``, and put it under ``load``."""
    command = ("service.cli", "serve", "--port", "0", "--store", store)
    with serving(command, "/readyz") as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as http:
        quiet = [_new_machine(http, f"quiet {number}", guarded=False) for number in range(QUIET_MACHINES)]
        busy = [_new_machine(http, f"busy {number}", guarded=True) for number in range(load.replays)]
        with _replaying(port, load, busy) as process:
            before = http.get("/metrics").text
            outcome = asyncio.run(calls(port, quiet, busy, rate=load.rate, seconds=load.seconds))
            after = http.get("/metrics").text
            assert process.stdout is not None
            replayed = json.loads(process.stdout.read() or '{"finished": 0, "errors": ["the replays ended early"]}')
    errors = [*outcome.errors, *replayed["errors"]]
    lag, commits = (between(buckets(before, name), buckets(after, name)) for name in (LAG, COMMITS))
    return Report(outcome, replayed["finished"], errors, lag, commits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rate", type=float, default=200, help="bitmap calls a second")
    parser.add_argument("--replays", type=int, default=4, help="concurrent ones, each of its own machine")
    parser.add_argument("--limit", type=int, default=0, help="records of the trace; 0: all")
    parser.add_argument("--lag-ms", type=float, default=50, help="what the loop's lag must stay below at p99")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="subpage-load-") as folder:
        load = Load(given.seconds, given.rate, given.replays, given.limit)
        report = put_under(load, f"sqlite:///{Path(folder) / 'subpage.db'}")
    for error in report.errors[:10]:
        sys.stdout.write(f"{error}\n")
    late = 1000 * max(report.calls.late, default=0.0)
    one, five, _ = os.getloadavg()
    sys.stdout.write(
        f"{given.seconds:g} s, {os.cpu_count()} cores, load average {one:.1f} (five minutes: {five:.1f}); "
        f"the generator was late by {late:.1f} ms at most; "
        f"{report.commits[-1][1]:g} commits, p99 {1000 * bucket_quantile(report.commits, 0.99):.1f} ms\n"
    )
    sys.stdout.write(f"{report}\n")
    return 0 if report.good(given.lag_ms / 1000) else 1


if __name__ == "__main__":
    sys.exit(main())
