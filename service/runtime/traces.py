"""Results of replays, kept in bounds until somebody reads them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from engine.errors import NotFound
from engine.machine import VirtualMachine
from engine.trace.readers import Source, open_trace
from engine.trace.results import TraceResult
from engine.trace.session import ReplayOptions

# These need the whole body before the first access: a Parquet file's directory comes last, JSON is one value.
SPOOLED_FORMATS = frozenset({"json", "parquet"})


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What the client asked for; see the query parameters of the call."""

    format: str
    record: str | None
    carry: tuple[str, ...]
    on_violation: str
    include: str
    start: int
    max_exit_records: int

    def options(self) -> ReplayOptions:
        return ReplayOptions(
            on_violation=self.on_violation,
            start=self.start,
            include=self.include,
            max_exit_records=self.max_exit_records,
            carry=self.carry,
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """One finished replay: what was asked, what came out. ``seconds`` runs from its start to its publication."""

    id: str
    sequence: int
    request: TraceRequest
    result: TraceResult
    ignored_columns: tuple[str, ...]
    created: datetime
    seconds: float


def replay(
    machine: VirtualMachine, request: TraceRequest, source: Source, check: Callable[[], None] = lambda: None
) -> tuple[TraceResult, tuple[str, ...]]:
    """Replay ``source`` on ``machine`` and publish the outcome; blocking, for a thread of its own.

    ``check`` is called before every chunk and before publication, and raises when the client has left. Whatever is
    raised, the machine is as it was before. Returns the result and the names of the columns that were ignored.
    """
    reader = open_trace(request.format, source, record=request.record, carry=request.carry)
    with machine.replay(request.options()) as run:
        for chunk in reader:
            check()
            if not run.feed(chunk):
                break
        check()
        return run.finish(), reader.ignored_columns


class TraceStore:
    """The last traces of one machine, oldest dropped first; the newest always stays."""

    def __init__(self, kept: int, kept_exit_records: int) -> None:
        self._kept = kept
        self._kept_exit_records = kept_exit_records
        self._traces: dict[str, Trace] = {}
        self._sequence = 0

    def next_id(self) -> tuple[str, int]:
        """A fresh unguessable id and its place in the order."""
        self._sequence += 1
        return f"tr_{secrets.token_hex(8)}", self._sequence

    def add(self, trace: Trace) -> None:
        self._traces[trace.id] = trace
        records = sum(len(kept.result.exit_columns) for kept in self._traces.values())
        while len(self._traces) > 1 and (len(self._traces) > self._kept or records > self._kept_exit_records):
            oldest = next(iter(self._traces))
            records -= len(self._traces.pop(oldest).result.exit_columns)

    def get(self, trace_id: str) -> Trace:
        """Raises NotFound, also for a result that was dropped."""
        trace = self._traces.get(trace_id)
        if trace is None:
            raise NotFound(
                "must be the id of a trace of this VM whose result is still kept", field="trace", value=trace_id
            )
        return trace

    def page(self, after: int, limit: int) -> tuple[list[Trace], int | None]:
        """Up to ``limit`` traces after sequence number ``after``, and where the next page starts."""
        traces = [trace for trace in self._traces.values() if trace.sequence > after]
        found = traces[:limit]
        return found, found[-1].sequence if limit < len(traces) else None
