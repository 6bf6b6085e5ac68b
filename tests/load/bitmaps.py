"""Bitmap calls in an open loop: each has a time at which it is due, and its latency counts from then.

A generator that waits for an answer before it sends the next request stops measuring just when the service is slow.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.load.wire import Connection

JSON, OCTETS = "application/json", "application/octet-stream"
PAGES = 16  # each connection has so many pages of its own in each machine
CONNECTIONS = 32


@dataclass
class Outcome:
    """What the calls came to; times in seconds from when each was due, ``late`` that of the generator itself."""

    reads: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        return [*self.reads, *self.changes]


def quantile(times: Sequence[float], q: float) -> float:
    """The ``q`` quantile of ``times``; not a number if there are none."""
    return float(np.quantile(times, q)) if times else float("nan")


def due_times(rate: float, seconds: float, chance: random.Random) -> list[float]:
    """When calls are due, ``rate`` a second on average, as independent clients send them."""
    times, at = [], 0.0
    while (at := at + chance.expovariate(rate)) < seconds:
        times.append(at)
    return times


class Caller:
    """One connection with pages that nobody else changes, so that it knows what a read must give.

    ``quiet`` are machines that take changes; ``busy`` are replaying, so that only reads are sent there.
    """

    def __init__(self, number: int, quiet: Sequence[str], busy: Sequence[str], chance: random.Random) -> None:
        self._first = number * PAGES
        self._quiet, self._busy = quiet, busy
        self._chance = chance
        self._known: dict[str, list[int]] = {vm: [0xFFFFFFFF] * PAGES for vm in quiet}

    def changes(self) -> bool:
        """Whether the next call is to be a change; half of them are."""
        return self._chance.random() < 0.5

    async def call(self, connection: Connection, *, change: bool) -> str:
        """One call; what is wrong with its answer, or nothing."""
        if change:
            return await self._set(connection, self._chance.choice(self._quiet))
        if self._chance.random() < 0.5 or not self._busy:
            return await self._get(connection, self._chance.choice(self._quiet))
        return await self._get_busy(connection, self._chance.choice(self._busy))

    async def _set(self, connection: Connection, vm: str) -> str:
        count = self._chance.randint(1, PAGES)
        at = self._chance.randint(0, PAGES - count)
        words = [self._chance.getrandbits(32) for _ in range(count)]
        self._known[vm][at : at + count] = words
        if self._chance.random() < 0.5:
            body, media = np.array(words, dtype="<u4").tobytes(), OCTETS
        else:
            body, media = json.dumps({"access": words}).encode(), JSON
        target = f"{vm}/subpages?gfn={self._first + at}&npages={count}"
        status, answer = await connection.ask("PUT", target, body, media)
        return "" if status == 204 else f"PUT {target}: {status} {answer[:200]!r}"

    async def _get(self, connection: Connection, vm: str) -> str:
        target = f"{vm}/subpages?gfn={self._first}&npages={PAGES}"
        status, answer = await connection.ask("GET", target)
        if status != 200:
            return f"GET {target}: {status} {answer[:200]!r}"
        found = [int(word, 16) for word in json.loads(answer)["access"]]
        return "" if found == self._known[vm] else f"GET {target}: {found}, not {self._known[vm]}"

    async def _get_busy(self, connection: Connection, vm: str) -> str:
        target = f"{vm}/subpages?gfn={self._chance.randrange(1 << 18)}"
        status, answer = await connection.ask("GET", target)
        return "" if status == 200 else f"GET {target}: {status} {answer[:200]!r}"


async def calls(
    port: int, quiet: Sequence[str], busy: Sequence[str], *, rate: float, seconds: float, seed: int = 1
) -> Outcome:
    """Send calls for ``seconds``, ``rate`` of them a second, to the service on ``port``."""
    chance = random.Random(seed)
    due = due_times(rate, seconds, chance)
    waiting: asyncio.Queue[float | None] = asyncio.Queue()
    outcome = Outcome()

    async def work(number: int) -> None:
        caller = Caller(number, quiet, busy, random.Random(seed * CONNECTIONS + number))
        async with Connection("127.0.0.1", port) as connection:
            while (at := await waiting.get()) is not None:
                change = caller.changes()
                try:
                    fault = await caller.call(connection, change=change)
                except (OSError, EOFError, ValueError) as error:
                    outcome.errors.append(f"a connection broke: {error!r}")
                    return
                (outcome.changes if change else outcome.reads).append(time.perf_counter() - at)
                if fault:
                    outcome.errors.append(fault)

    workers = [asyncio.create_task(work(number)) for number in range(CONNECTIONS)]
    start = time.perf_counter()
    for at in due:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        outcome.late.append(time.perf_counter() - start - at)
        waiting.put_nowait(start + at)
    for _ in workers:
        waiting.put_nowait(None)
    await asyncio.gather(*workers)
    return outcome
