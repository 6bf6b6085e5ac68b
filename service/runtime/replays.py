"""Doing a replay: a body becomes a trace of a machine, committed with the machine's new state."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from datetime import UTC, datetime

from starlette.requests import Request

from engine.machine import VirtualMachine
from engine.trace.results import TraceResult
from service.metrics import Metrics
from service.runtime.asking import Asker, last_stretch
from service.runtime.bodies import Upload, spooled
from service.runtime.entry import Entry
from service.runtime.traces import SPOOLED_FORMATS, Trace, TraceRequest, replay
from service.settings import Settings

Work = Callable[[VirtualMachine], Awaitable[tuple[TraceResult, tuple[str, ...]]]]
"""Replays on the machine that it is given; see ``service.runtime.traces.replay``."""
Tell = Callable[[Trace], Awaitable[None]]


async def replay_body(
    entry: Entry,
    wanted: TraceRequest,
    request: Request,
    executor: Executor,
    settings: Settings,
    metrics: Metrics,
    tell: Tell | None = None,
    asker: Asker | None = None,
) -> Trace:
    """Replay the body of ``request``, while it arrives where its format allows that. ``tell`` as in ``committed``.

    With ``asker`` it asks, and what came before a question is committed. Raises what the reader, the replay and
    ``Entry.mutation`` raise; then the machine is as it was, or as it was at the last question.
    """
    memory = settings.body_memory_bytes
    async with Upload(request, executor, settings.body_queue_bytes) as upload:
        spool = (
            await upload.run(functools.partial(spooled, settings=settings))
            if wanted.format in SPOOLED_FORMATS
            else None
        )
        try:
            if asker is not None:
                began = time.perf_counter()
                source = spool or upload.pipe
                async with last_stretch(entry, upload, wanted, source, asker, memory) as (result, ignored):
                    trace = _traced(entry, wanted, result, ignored, began, asker.trace)
                    await _keep(entry, trace, metrics, tell)
                return trace
            return await committed(
                entry,
                wanted,
                metrics,
                lambda machine: upload.run(
                    lambda pipe: replay(machine, wanted, spool or pipe, pipe.check, memory=memory)
                ),
                tell=tell,
            )
        finally:
            if spool is not None:
                spool.close()


async def committed(
    entry: Entry,
    wanted: TraceRequest,
    metrics: Metrics,
    work: Work,
    *,
    tell: Tell | None = None,
    patient: bool = False,
) -> Trace:
    """Do ``work`` as a mutation of the machine, and commit the trace that it makes with the state that it leaves.

    ``tell`` is called with the trace before the commit, which may not come about; ``patient`` as in ``mutation``.
    """
    async with entry.mutation(patient=patient) as machine:
        began = time.perf_counter()
        result, ignored = await work(machine)
        trace = _traced(entry, wanted, result, ignored, began)
        await _keep(entry, trace, metrics, tell)
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
