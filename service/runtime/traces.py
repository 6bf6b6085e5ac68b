"""Results of replays, kept in bounds until somebody reads them."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import anyio.to_thread
import numpy as np

from engine.machine import VirtualMachine
from engine.trace.columns import TraceChunk
from engine.trace.readers import DEFAULT_MEMORY, Budget, Source, TraceReader, open_trace
from engine.trace.results import EXIT_COLUMNS, ExitColumns, TraceResult, join
from engine.trace.session import ReplayOptions, ReplayTransaction
from service.problems import trace_not_kept
from service.runtime.footprint_builds import Collecting

# These need the whole body before the first access: a Parquet file's directory comes last.
SPOOLED_FORMATS = frozenset({"parquet"})

# Exit records of one part, as they are stored: some megabytes, so that neither side holds a whole result twice.
PART = 1 << 16

NO_RECORDS = ExitColumns(
    {name: np.empty(0, dtype=dtype) for name, dtype, _ in EXIT_COLUMNS}, np.empty(0, dtype=np.uint64), has_gva=False
)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What the client asked for; see the query parameters of the call. ``goes_on``: it named a ``start``.

    ``longest`` as in ``open_trace``: the limit of bodies. ``footprint`` is the level of one that is collected beside
    the replay, ``footprint_by`` as the client said it.
    """

    format: str
    record: str | None
    carry: tuple[str, ...]
    on_violation: str
    include: str
    start: int
    max_exit_records: int
    goes_on: bool = False
    address: str = "gpa"
    skip_unknown: bool = False
    columns: str | None = None
    longest: int = 0
    footprint: str | None = None
    footprint_by: str | None = None

    def reader(self, source: Source, memory: int | Budget, *, late: bool = False, ahead: bool = False) -> TraceReader:
        """Of a body of the format. ``memory``, ``late`` and ``ahead`` as in ``open_trace``."""
        return open_trace(
            self.format,
            source,
            record=self.record,
            carry=self.carry,
            memory=memory,
            skip_unknown=self.skip_unknown,
            columns=self.columns,
            longest=self.longest,
            late=late,
            ahead=ahead,
        )

    def options(self, *, published: bool = False) -> ReplayOptions:
        return ReplayOptions(
            published=published,
            on_violation=self.on_violation,
            start=self.start,
            include=self.include,
            max_exit_records=self.max_exit_records,
            carry=self.carry,
            goes_on=self.goes_on,
            address=self.address,
        )


@dataclass(frozen=True, slots=True)
class Publication:
    """One commit of a trace that is published while it comes.

    ``state`` is running, finished or interrupted; ``resume_at`` the first record that has not been run, ``at`` when
    that was so, ``rate`` records a second since the commit before, ``lag`` the records that had come by then and
    wait. The exit records of the trace's result are those
    from position ``first`` on, a multiple of PART: those before it are stored. Earlier commits, if it ``goes_on``
    after any, have ``told`` so many exit records and ``violations_told`` violations.
    """

    state: str
    resume_at: int
    at: datetime
    rate: float | None = None
    lag: int | None = None
    first: int = 0
    told: int = 0
    violations_told: int = 0
    goes_on: bool = False

    @property
    def without_more(self) -> Publication:
        """As it is when nothing more will come."""
        return replace(self, state="interrupted" if self.state == "running" else self.state, rate=None, lag=None)


@dataclass(frozen=True, slots=True)
class Trace:
    """One replay: what was asked, what came out. ``seconds`` runs from its start to its publication.

    ``exit_records`` is how many the result has, also where ``result.exit_columns`` were left out. ``footprint`` is the
    id of the one that was collected beside it.
    """

    id: str
    sequence: int
    request: TraceRequest
    result: TraceResult
    ignored_columns: tuple[str, ...]
    created: datetime
    seconds: float
    exit_records: int
    publication: Publication | None = None
    footprint: str | None = None

    @property
    def running(self) -> bool:
        """Whether more of it may come."""
        return self.publication is not None and self.publication.state == "running"

    def without_records(self) -> Trace:
        """The same with no exit records, for keeping many."""
        return replace(self, result=replace(self.result, exit_columns=NO_RECORDS))


@contextmanager
def _fed(run: ReplayTransaction, beside: Collecting | None) -> Iterator[Callable[[TraceChunk], bool]]:
    """What takes the chunks of a replay: it alone, or beside it what collects, in a thread of its own, so that each
    waits for the other only before the next chunk."""
    if beside is None:
        yield run.feed
        return
    with ThreadPoolExecutor(1, "footprint") as helper:

        def feed(chunk: TraceChunk) -> bool:
            counting = helper.submit(beside.feed, chunk)
            try:
                going = run.feed(chunk)
            except BaseException:
                counting.exception()  # what the replay says of a record comes first
                raise
            counting.result()
            return going

        yield feed


def replay(
    machine: VirtualMachine,
    request: TraceRequest,
    source: Source,
    check: Callable[[], None] = lambda: None,
    follow: Callable[[ReplayTransaction], None] = lambda run: None,
    memory: int | Budget = DEFAULT_MEMORY,
    beside: Collecting | None = None,
) -> tuple[TraceResult, tuple[str, ...]]:
    """Replay ``source`` on ``machine`` and publish the outcome; blocking, for a thread of its own.

    ``check`` is called before every chunk and before publication, and raises when the client has left. ``follow`` is
    given the replay when it begins, whose ``records_done`` other threads may read. Whatever is raised, the machine is
    as it was before. ``memory`` is what the body may take while it is read (``open_trace``). ``beside`` collects a
    footprint. Returns the result and the names of the columns that were ignored.
    """
    # Where linear addresses are a note, those of records with an exit are enough.
    reader = request.reader(source, memory, late=request.address == "gpa" and beside is None, ahead=True)
    with machine.replay(request.options()) as run, _fed(run, beside) as feed:
        follow(run)
        for chunk in reader:
            check()
            if not feed(chunk):
                break
        check()
        if beside is not None:
            beside.finish("", request.format if reader.taken is None else reader.taken.format)
        return replace(run.finish(), taken=reader.taken), reader.ignored_columns


def _joined(pieces: Sequence[ExitColumns]) -> ExitColumns:
    """The parts of a trace; the last knows all its objects."""
    if not pieces:
        return NO_RECORDS
    last = pieces[-1]
    return replace(join(pieces, last), object_index=last.object_index, object_names=last.object_names)


class TraceStore:
    """The last traces of one machine, oldest dropped first; the newest stays however many records it has.

    Changes are handed in with ``add`` and take effect with ``settle``, after the machine's commit, or are given up
    with ``discard``. ``load`` fetches exit records that are no longer in memory; without it all of them stay there.
    """

    def __init__(
        self,
        kept: int,
        kept_exit_records: int,
        kept_days: float = 0,
        *,
        loaded_exit_records: int = 0,
        load: Callable[[str], Awaitable[ExitColumns]] | None = None,
    ) -> None:
        self._kept = kept
        self._kept_exit_records = kept_exit_records
        self._kept_for = timedelta(days=kept_days) if kept_days else None
        self._loaded_exit_records = loaded_exit_records
        self._load = load
        self._traces: dict[str, Trace] = {}
        self._columns: dict[str, ExitColumns] = {}
        # Of traces that were published bit by bit and that no store keeps: their parts.
        self._pieces: dict[str, list[ExitColumns]] = {}
        self._coming: list[Trace] = []
        self._going: list[str] = []
        self._sequence = 0

    def adopt(self, traces: Iterable[Trace]) -> None:
        """Begin with traces that the store has, oldest first; their exit records are loaded when asked for."""
        self._traces = {trace.id: trace for trace in traces}
        self._sequence = max((trace.sequence for trace in self._traces.values()), default=0)

    def next_id(self) -> tuple[str, int]:
        """A fresh unguessable id and its place in the order."""
        self._sequence += 1
        return f"tr_{secrets.token_hex(8)}", self._sequence

    def add(self, trace: Trace) -> None:
        """Keep ``trace`` from the machine's next commit on."""
        self._coming.append(trace)

    def added(self) -> Sequence[Trace]:
        """What was handed in since the last commit."""
        return tuple(self._coming)

    def coming(self) -> tuple[list[Trace], list[str]]:
        """What the next commit stores: the traces handed in, and the ids of those that have to go for them, of which
        none is running."""
        if not self._traces and not self._coming:
            return [], []
        again = {trace.id for trace in self._coming}
        left = [*(trace for trace in self._traces.values() if trace.id not in again), *self._coming]
        records, count = sum(trace.exit_records for trace in left), len(left)
        left = [trace for trace in left if not trace.running]
        gone: list[str] = []
        while left and (
            self._is_too_old(left[0]) or (count > 1 and (count > self._kept or records > self._kept_exit_records))
        ):
            oldest = left.pop(0)
            records, count = records - oldest.exit_records, count - 1
            gone.append(oldest.id)
        self._going = [trace_id for trace_id in gone if trace_id in self._traces]
        self._coming = [trace for trace in self._coming if trace.id not in gone]
        return self._coming, self._going

    def settle(self) -> None:
        """The commit has been made."""
        for trace_id in self._going:
            del self._traces[trace_id]
            self._columns.pop(trace_id, None)
            self._pieces.pop(trace_id, None)
        added, self._coming, self._going = self._coming, [], []
        for trace in added:
            if trace.publication is None:
                self._columns[trace.id] = trace.result.exit_columns
            elif self._load is None:
                exits = trace.result.exit_columns
                pieces = self._pieces.setdefault(trace.id, [])
                pieces[trace.publication.first // PART :] = [exits[at : at + PART] for at in range(0, len(exits), PART)]
            self._traces[trace.id] = trace.without_records()
        self._shrink()

    def interrupt(self, trace_id: str) -> None:
        """Nothing more will come of a trace that was published; what the store says of it means the same."""
        trace = self._traces.get(trace_id)
        if trace is not None and trace.publication is not None:
            self._traces[trace_id] = replace(trace, publication=trace.publication.without_more)

    def discard(self) -> None:
        """There was no commit."""
        self._coming.clear()
        self._going.clear()

    def _shrink(self) -> None:
        if self._load is None:
            return
        held = sum(map(len, self._columns.values()))
        while held > self._loaded_exit_records and len(self._columns) > 1:
            held -= len(self._columns.pop(next(iter(self._columns))))

    def _is_too_old(self, trace: Trace) -> bool:
        return self._kept_for is not None and trace.created < datetime.now(UTC) - self._kept_for

    def known(self, trace_id: str) -> Trace:
        """The result without its exit records. Raises NotFound, also for a result that was dropped."""
        trace = self._traces.get(trace_id)
        if trace is None or self._is_too_old(trace):
            raise trace_not_kept(trace_id)
        return trace

    async def get(self, trace_id: str) -> Trace:
        """The whole result. Raises as ``known``."""
        trace = self.known(trace_id)
        columns = self._columns.pop(trace_id, None)
        if columns is None and self._load is None:
            columns = await anyio.to_thread.run_sync(_joined, tuple(self._pieces.get(trace_id, ())))
        elif columns is None:
            assert self._load is not None
            columns = await self._load(trace_id)
        if trace_id in self._traces and trace.publication is None:
            self._columns[trace_id] = columns
            self._shrink()
        return replace(trace, result=replace(trace.result, exit_columns=columns))

    def held(self, trace_id: str, part: int) -> ExitColumns | None:
        """One part of a trace's exit records if all of them are in memory."""
        pieces = self._pieces.get(trace_id, [])
        if part < len(pieces):
            return pieces[part]
        columns = self._columns.get(trace_id)
        return columns[part * PART : (part + 1) * PART] if columns is not None else None

    def has(self, trace_id: str) -> bool:
        """Whether ``get`` would find it."""
        trace = self._traces.get(trace_id)
        return trace is not None and not self._is_too_old(trace)

    def page(self, after: int, limit: int) -> tuple[list[Trace], int | None]:
        """Up to ``limit`` traces after sequence number ``after``, without their exit records, and where the next page
        starts."""
        traces = [trace for trace in self._traces.values() if trace.sequence > after and not self._is_too_old(trace)]
        found = traces[:limit]
        return found, found[-1].sequence if limit < len(traces) else None
