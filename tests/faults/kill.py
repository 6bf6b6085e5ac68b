"""kill -9 at a random instant, over and over: no acknowledged change may be lost, none may be there by half.

    python -m tests.faults.kill --rounds 200 --store sqlite

In every round several clients change machines over HTTP until the server is killed. A third of the rounds wait until a
replay is being committed and kill within the next milliseconds; the others kill after a random time. Then a new server
opens the store, and each client compares what it has with what it knows.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.faults.clients import KEPT_TRACES, RAM, Client
from tests.faults.nursery import Nursery, Server, nursery
from tests.support.postgres import cluster

CLIENTS = 4
READY_SECONDS = 60
LONGEST_ROUND = 0.5

# What the server logs before and after each commit.
WRITING, WRITTEN, NO_REPLAY = "subpage.store: writing ", "subpage.store: written", " 0 replays"


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Tally:
    """What the rounds came to. ``replay_commits`` were begun, whatever became of them."""

    rounds: int = 0
    acknowledged: int = 0
    lost: int = 0
    half_applied: int = 0
    in_flight: int = 0
    in_commit: int = 0
    in_replay_commit: int = 0
    replay_commits: int = 0
    applied_unacknowledged: int = 0

    def __str__(self) -> str:
        return (
            f"rounds: {self.rounds}, acknowledged: {self.acknowledged}, lost: {self.lost}, "
            f"half-applied: {self.half_applied}"
        )


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with httpx2.Client(base_url=server.url, timeout=10.0) as http:
        while http.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, f"not ready: {server.log[-3:]}"
            time.sleep(0.005)


class KillTest:
    """The rounds. ``store`` is the URL of an empty store."""

    def __init__(self, store: str, home: Nursery, seed: int) -> None:
        self._settings = {"store": store, "kept_traces": KEPT_TRACES, "loaded_exit_records": 0}
        self._nursery = home
        self._random = random.Random(seed)
        self._replay_commit = threading.Event()
        self.clients = [Client(number, seed * CLIENTS + number) for number in range(CLIENTS)]
        self.tally = Tally()
        home.on_line = self._heard

    def _heard(self, line: str) -> None:
        if WRITING in line and NO_REPLAY not in line:
            self.tally.replay_commits += 1
            self._replay_commit.set()

    def start(self) -> Server:
        server = self._nursery.start(**self._settings)
        wait_until_ready(server)
        for client in self.clients:
            client.connect(server.url)
        return server

    def prepare(self, server: Server) -> None:
        with httpx2.Client(base_url=server.url) as http:
            document = {"name": "common", "spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": RAM}]}
            common = http.post("/v1/vms", json=document).headers["Location"]
        for client in self.clients:
            client.settle_in(common)

    def round(self, server: Server) -> Server:
        """Run, kill, start again, compare; returns the new server."""
        stop = threading.Event()
        faults: list[BaseException] = []

        def work(client: Client) -> None:
            try:
                client.run(stop)
            except BaseException as fault:  # noqa: BLE001 - raised in the main thread
                faults.append(fault)

        threads = [threading.Thread(target=work, args=(client,)) for client in self.clients]
        for thread in threads:
            thread.start()
        if self._random.random() < 1 / 3:
            time.sleep(self._random.uniform(0, LONGEST_ROUND / 2))
            self._replay_commit.clear()
            self._replay_commit.wait(LONGEST_ROUND)
            time.sleep(self._random.choice((0, 0, 0.0005, 0.002)))
        else:
            time.sleep(self._random.uniform(0.01, LONGEST_ROUND))
        in_flight = any(client.in_flight for client in self.clients)
        server.kill()
        stop.set()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]
        self._count(server, in_flight)
        return self._compare()

    def _count(self, server: Server, in_flight: bool) -> None:
        tally = self.tally
        tally.rounds += 1
        tally.in_flight += in_flight
        commits = [line for line in server.log if WRITING in line or WRITTEN in line]
        if commits and WRITING in commits[-1]:
            tally.in_commit += 1
            tally.in_replay_commit += NO_REPLAY not in commits[-1]

    def _compare(self) -> Server:
        server = self.start()
        for client in self.clients:
            pending = client.pending
            observed = client.observed()
            known = client.state
            lost, half = client.accept(observed)
            if lost or half:
                say(f"client {client.number}: lost {lost}, half-applied {half}")
                for key in (key for key in known if observed[key] != known[key]):
                    after = pending[key] if pending is not None else None
                    say(f"  {key}: was {known[key]}, to be {after}, is {observed[key]}")
            self.tally.lost += lost
            self.tally.half_applied += half
            self.tally.applied_unacknowledged += observed == pending
        self.tally.acknowledged = sum(client.acknowledged for client in self.clients)
        return server


def kill_test(rounds: int, store: str, seed: int = 1, *, progress: bool = False) -> Tally:
    """Run it on an empty store."""
    with nursery() as home:
        test = KillTest(store, home, seed)
        server = test.start()
        test.prepare(server)
        for number in range(rounds):
            server = test.round(server)
            if progress and number % 10 == 9:
                say(f"{test.tally}")
        server.kill()
        for client in test.clients:
            client.http.close()
    return test.tally


@contextlib.contextmanager
def empty_store(kind: str) -> Iterator[str]:
    """The URL of a new store; afterwards a SQLite file is checked for damage."""
    if kind == "postgres":
        with cluster() as server:
            yield server.url
        return
    with tempfile.TemporaryDirectory(prefix="subpage-kill-") as folder:
        path = Path(folder) / "subpage.db"
        yield f"sqlite:///{path}"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with empty_store(given.store) as url:
        tally = kill_test(given.rounds, url, given.seed, progress=True)
    share = 100 * tally.in_flight / max(1, tally.rounds)
    say(
        f"killed with a mutation in flight: {tally.in_flight} of {tally.rounds} rounds ({share:.0f} %), "
        f"inside a commit: {tally.in_commit}, inside a replay's commit: {tally.in_replay_commit}; "
        f"unanswered changes that were applied: {tally.applied_unacknowledged}"
    )
    say(tally)
    return 0 if not tally.lost and not tally.half_applied and share >= 80 and tally.in_replay_commit else 1


if __name__ == "__main__":
    sys.exit(main())
