"""The short version of the kill test; `make kill-test` is the long one."""

from __future__ import annotations

import contextlib
import re
import threading
import time

import httpx2
import pytest

from tests.faults.clients import Client
from tests.faults.kill import empty_store, kill_test, wait_until_ready
from tests.faults.nursery import Nursery, Server, nursery
from tests.support.postgres import MISSING, binaries

MANY = 8


@pytest.mark.jit
@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_kill_at_a_random_instant(store: str) -> None:
    if store == "postgres" and binaries() is None:
        pytest.skip(MISSING)
    with empty_store(store) as url:
        tally = kill_test(5, url)
    assert (tally.rounds, tally.lost, tally.half_applied) == (5, 0, 0)
    assert tally.acknowledged and tally.in_flight >= 4
    assert tally.replay_commits, "the server's log tells when a replay is being committed"


@pytest.mark.jit
@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_kill_while_many_change_one_machine(store: str) -> None:
    """Changes that share a transaction: each that was answered is there, and of the others all of a transaction."""
    if store == "postgres" and binaries() is None:
        pytest.skip(MISSING)
    with empty_store(store) as url, nursery() as home:
        together = Together(home)
        for wait in (0, 0.001, 0.002, 0.005):
            together.round(url, wait)
    assert together.answered


class Together:
    """Clients that each write ever higher words into a page of their own, in one machine."""

    def __init__(self, home: Nursery) -> None:
        self._nursery = home
        home.on_line = self._heard
        self._vm = ""
        self.words = [0] * MANY
        self.answered = 0
        self.revision = 1
        self._group = threading.Event()

    def _heard(self, line: str) -> None:
        found = re.search(r"writing (\d+) changes", line)
        if found is not None and int(found[1]) > 1:
            self._group.set()

    def round(self, store: str, wait: float) -> None:
        """Change, kill so long after the third group began to be written, start again, compare."""
        server = self._start(store)
        threads = [threading.Thread(target=self._write, args=(server.url, place)) for place in range(MANY)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            assert self._group.wait(60)
            self._group.clear()
        time.sleep(wait)
        server.kill()
        for thread in threads:
            thread.join()
        server = self._start(store)
        with httpx2.Client(base_url=server.url) as http:
            shown = http.get(f"{self._vm}/subpages?gfn=0&npages={MANY}").json()["access"]
            revision = http.get(self._vm).json()["revision"]
        made = [int(word, 16) for word in shown]
        assert all(now in (known, known + 1) for known, now in zip(self.words, made, strict=True)), (self.words, made)
        assert revision - self.revision == sum(made) - self.answered, "as many revisions as changes"
        self.words, self.answered, self.revision = made, sum(made), revision
        server.kill()

    def _start(self, store: str) -> Server:
        server = self._nursery.start(store=store)
        wait_until_ready(server)
        if not self._vm:
            with httpx2.Client(base_url=server.url) as http:
                document = {"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 20}]}
                self._vm = http.post("/v1/vms", json=document).headers["Location"]
                assert http.put(f"{self._vm}/subpages?gfn=0&npages={MANY}", json={"access": self.words}).is_success
                self.revision = http.get(self._vm).json()["revision"]
        return server

    def _write(self, url: str, place: int) -> None:
        with httpx2.Client(base_url=url, timeout=30.0) as http, contextlib.suppress(httpx2.TransportError):
            while True:
                body = {"access": [self.words[place] + 1]}
                if http.put(f"{self._vm}/subpages?gfn={place}", json=body).status_code != 204:
                    return
                self.words[place] += 1


STATE = {"a": 1, "b": [1, 2], "c": "x"}


@pytest.mark.parametrize(
    ("pending", "observed", "verdict"),
    [
        (None, STATE, (0, 0)),
        (None, {**STATE, "a": 0}, (1, 0)),
        ({**STATE, "a": 2, "b": [3, 4]}, STATE, (0, 0)),
        ({**STATE, "a": 2, "b": [3, 4]}, {**STATE, "a": 2, "b": [3, 4]}, (0, 0)),
        ({**STATE, "a": 2, "b": [3, 4]}, {**STATE, "a": 2}, (0, 1)),
        ({**STATE, "a": 2, "b": [3, 4]}, {**STATE, "a": 2, "b": [3, 2]}, (0, 1)),
        ({**STATE, "a": 2}, {**STATE, "a": 2, "c": "y"}, (1, 0)),
    ],
)
def test_the_verdict(pending: dict | None, observed: dict, verdict: tuple[int, int]) -> None:
    client = Client(0, 0)
    client.state, client.pending = dict(STATE), pending
    client.listed = lambda observed: {}  # type: ignore[method-assign]
    assert client.accept(dict(observed)) == verdict
    assert client.state == observed and client.pending is None
