"""Doing a replay: a body becomes a trace of a machine, committed with the machine's new state."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from starlette.requests import Request

from engine.errors import LimitExceeded
from engine.machine import VirtualMachine
from engine.trace.results import TraceResult
from service.runtime.asking import Asker, last_stretch
from service.runtime.bodies import Upload, while_connected
from service.runtime.body_memory import BodyMemory
from service.runtime.commit_hooks import CommitHooks
from service.runtime.entry import Entry
from service.runtime.footprint_builds import Collecting, by_of
from service.runtime.footprints import Footprints
from service.runtime.offload import finished
from service.runtime.publishing import Publisher
from service.runtime.shares import Share
from service.runtime.spool import Spools
from service.runtime.traces import SPOOLED_FORMATS, Trace, TraceRequest, replay
from service.runtime.turns import Turns
from service.settings import Settings
from service.storage.records import Change, Side
from service.telemetry.metrics import Metrics

T = TypeVar("T")

Work = Callable[[VirtualMachine], Awaitable[tuple[TraceResult, tuple[str, ...]]]]
"""Replays on the machine that it is given; see ``service.runtime.traces.replay``."""
Tell = Callable[[Trace], Awaitable[None]]
Check = Callable[[], None]
"""Called before a commit; raises when its caller may not change the machine any more."""


@dataclass(frozen=True, slots=True)
class Replaying:
    """Where replays are done: threads, the places of those that are under way, the turns of those that compute, and
    what their bodies take, in files until all of it is there, and in memory while they are read."""

    executor: Executor
    places: Share
    turns: Turns
    spools: Spools
    memory: BodyMemory

    @asynccontextmanager
    async def computing(self, tenant: str) -> AsyncIterator[None]:
        """A place and a turn of the tenant, for ``compute``: what it needs in memory is loaded when it has them.

        Raises ShareExceeded.
        """
        turn = self.turns.of(tenant)
        with self.places.place(tenant):
            await turn.take()
            try:
                yield
            finally:
                turn.give()

    async def compute(self, request: Request, seconds: float, work: Callable[[Callable[[], None]], T]) -> T:
        """``work(check)`` in a thread. ``check`` raises, and should be called every moment, when the client of
        ``request``, whose body was read, has gone or is given up, and LimitExceeded after ``seconds``, 0 for any time.

        The thread is waited for whatever happens.
        """
        gone = threading.Event()
        until = time.monotonic() + seconds if seconds else math.inf

        def check() -> None:
            if gone.is_set():
                raise _Unwanted
            if time.monotonic() > until:
                rule = f"takes longer than {seconds:g} seconds: ask for less in one call"
                raise LimitExceeded(rule, field="footprint_seconds", value=seconds)

        async def computed() -> T:
            try:
                return await finished(self.executor.submit(work, check), gone.set)
            except _Unwanted:
                raise asyncio.CancelledError from None

        return await while_connected(request, computed())


class _Unwanted(Exception):
    """Nobody waits for what a thread works out."""


async def replay_body(
    entry: Entry,
    wanted: TraceRequest,
    request: Request,
    replaying: Replaying,
    settings: Settings,
    metrics: Metrics,
    hooks: CommitHooks,
    check: Check,
    footprints: Footprints,
    tell: Tell | None = None,
    asker: Asker | None = None,
) -> Trace:
    """Replay the body of ``request``, while it arrives where its format allows that. ``hooks`` and ``tell`` as in
    ``committed``.

    With ``asker`` it asks, and what came before a question is committed. Raises what the reader, the replay and
    ``Entry.mutation`` raise; then the machine is as it was, or as it was at the last question.
    """
    turn = replaying.turns.of(entry.tenant)
    with replaying.places.place(entry.tenant):
        async with Upload(request, replaying.executor, settings.body_queue_bytes, turn) as upload:
            return await _replay_upload(
                entry, wanted, upload, replaying, settings, metrics, hooks, check, footprints, tell, asker
            )


async def publish_body(
    entry: Entry,
    wanted: TraceRequest,
    every: float,
    request: Request,
    replaying: Replaying,
    settings: Settings,
    metrics: Metrics,
    hooks: CommitHooks,
    check: Check,
    draining: Callable[[], bool],
    asker: Asker | None,
) -> Trace:
    """Replay the body of ``request`` and commit what has come every so many seconds (``service.runtime.publishing``).

    Only the thread that replays needs a turn: the other one mostly waits.
    """
    turn = replaying.turns.of(entry.tenant)
    publisher = Publisher(entry, wanted, every, replaying.executor, turn, hooks, check, draining, asker)
    live = entry.broker.live() if asker is not None else contextlib.nullcontext()
    with live, replaying.places.place(entry.tenant), replaying.memory.budget(entry.tenant) as budget:
        async with Upload(request, replaying.executor, settings.body_queue_bytes) as upload:
            trace = await publisher.run(upload, budget)
    metrics.replayed(trace.result)
    return trace


async def _replay_upload(
    entry: Entry,
    wanted: TraceRequest,
    upload: Upload,
    replaying: Replaying,
    settings: Settings,
    metrics: Metrics,
    hooks: CommitHooks,
    check: Check,
    footprints: Footprints,
    tell: Tell | None,
    asker: Asker | None,
) -> Trace:
    """``replay_body`` of a body that has begun to arrive. Nothing of the machine is held before some of it is here."""
    spool = None
    if wanted.format in SPOOLED_FORMATS:
        spool = await replaying.spools.fill(upload, entry.tenant, settings.spool_memory_bytes)
    else:
        await upload.begun()
    try:
        with replaying.memory.budget(entry.tenant) as budget:
            if asker is not None:
                began = time.perf_counter()
                async with last_stretch(entry, upload, wanted, spool or upload.pipe, asker, hooks, check, budget) as (
                    result,
                    ignored,
                ):
                    trace = _traced(entry, wanted, result, ignored, began, asker.trace)
                    await _keep(entry, trace, metrics, tell)
                return trace
            with beside(footprints, entry.tenant, wanted) as collecting:
                return await committed(
                    entry,
                    wanted,
                    metrics,
                    lambda vm: upload.run(
                        lambda pipe: replay(vm, wanted, spool or pipe, pipe.check, memory=budget, beside=collecting)
                    ),
                    hooks,
                    check=check,
                    tell=tell,
                    collected=(footprints, collecting),
                )
    finally:
        if spool is not None:
            replaying.spools.free(spool, entry.tenant)


@contextmanager
def beside(footprints: Footprints, tenant: str, wanted: TraceRequest) -> Iterator[Collecting | None]:
    """What collects the footprint that a replay is to have, in memory of its tenant; None if it is to have none."""
    if wanted.footprint is None:
        yield None
        return
    with footprints.memory.budget(tenant) as room:
        yield Collecting(wanted.footprint, by_of(wanted.footprint_by), wanted.address, room)


async def committed(
    entry: Entry,
    wanted: TraceRequest,
    metrics: Metrics,
    work: Work,
    hooks: CommitHooks,
    *,
    check: Check = lambda: None,
    tell: Tell | None = None,
    patient: bool = False,
    collected: tuple[Footprints, Collecting | None] | None = None,
) -> Trace:
    """Do ``work`` as a mutation of the machine, and commit the trace that it makes with the state that it leaves, and
    with the footprint that was ``collected`` beside it.

    ``tell`` is called with the trace before the commit, which may not come about; ``hooks`` and ``patient`` as in
    ``mutation``.
    """
    sides: list[Side] = []

    def kept(change: Change) -> Side | None:
        return sides[0] if sides else None

    async with contextlib.AsyncExitStack() as held:
        async with entry.mutation((*hooks, kept), patient=patient) as change:
            began = time.perf_counter()
            result, ignored = await work(change.machine)
            check()
            trace = _traced(entry, wanted, result, ignored, began)
            if collected is not None and (collecting := collected[1]) is not None:
                coming = collected[0].coming(entry.tenant, collecting.known_as(trace.id), entry.id)
                sides.append(await held.enter_async_context(coming))
                trace = replace(trace, footprint=sides[0].footprints[0].id)
            await _keep(entry, trace, metrics, tell)
        if sides and collected is not None:
            collected[0].settle(sides[0])
    return trace


def _traced(
    entry: Entry,
    wanted: TraceRequest,
    result: TraceResult,
    ignored: tuple[str, ...],
    began: float,
    known_as: str | None = None,
) -> Trace:
    """A replay that has just ended, as it is kept; under the id that it was already told by, if it was."""
    seconds = time.perf_counter() - began
    trace_id, sequence = entry.traces.next_id()
    kept_records = len(result.exit_columns)
    return Trace(known_as or trace_id, sequence, wanted, result, ignored, datetime.now(UTC), seconds, kept_records)


async def _keep(entry: Entry, trace: Trace, metrics: Metrics, tell: Tell | None) -> None:
    """In the mutation that ends a replay: its trace is to be committed with it."""
    entry.traces.add(trace)
    if tell is not None:
        await tell(trace)
    metrics.replayed(trace.result)
