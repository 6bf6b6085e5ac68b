"""What makes changes of machines durable: a store, or nothing for machines that live as long as the process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import anyio.to_thread

from engine.machine import VirtualMachine
from engine.machine.summary import Summary, summary_from_head
from engine.trace.results import ExitColumns
from service.problems import NotReady, StoreUnavailable, trace_not_kept
from service.runtime.events import Load
from service.runtime.riders import sides_of
from service.runtime.traces import Trace
from service.settings import Settings
from service.storage.meter import Observer, nobody
from service.storage.records import (
    AnswerRecord,
    Change,
    EventRecord,
    JobRecord,
    LogChange,
    Side,
    TraceRecord,
    VmRecord,
)
from service.storage.urls import MEMORY, StoreUrl

if TYPE_CHECKING:
    from service.storage.keeper import Keeper
    from service.storage.reader import Reader

T = TypeVar("T")

NO_LOG = LogChange()


class Residents(Protocol):
    """Who lives in a home: told what the store has."""

    def arrive(self, machines: Sequence[VmRecord], *, goes_on: bool) -> None:
        """The store is ours and has these; ``goes_on`` if nobody else wrote to it since we last had it."""
        ...

    def leave(self) -> None:
        """The store has another owner: what is in memory is no longer true."""
        ...


class Workplace(Protocol):
    """Who does long work on the residents: told what the store knows of it, like ``Residents``."""

    def arrive(self, jobs: Sequence[JobRecord], *, goes_on: bool) -> None: ...

    def leave(self) -> None: ...


class Home:
    """The memory of this process: changes are durable as long as it is."""

    durable = False
    trouble = ""
    # Told of each transaction, in the thread that writes; set before ``start``.
    observe: Observer = staticmethod(nobody)

    @property
    def open(self) -> bool:
        """Whether machines are known: reads are served."""
        return True

    @property
    def ready(self) -> bool:
        """Whether changes are taken, too."""
        return True

    def start(self, residents: Residents, workplace: Workplace, changed: Callable[[], None]) -> None:
        """Begin; ``changed`` is called whenever ``ready`` may have become another."""

    async def stop(self) -> None:
        """End, after everything that was handed in."""

    async def create(self, record: VmRecord, machine: VirtualMachine, log: LogChange = NO_LOG) -> None:
        """Store a new machine and its first events. Raises StoreUnavailable."""

    async def commit(
        self,
        before: VmRecord,
        after: VmRecord,
        machines: tuple[VirtualMachine, VirtualMachine],
        traces: Sequence[Trace] = (),
        dropped: Sequence[str] = (),
        log: LogChange = NO_LOG,
    ) -> None:
        """Store what differs between two machines, results of replays, and events. Raises StoreUnavailable."""

    async def delete(self, record: VmRecord) -> None:
        """Remove a machine. Raises StoreUnavailable."""

    async def revision(self, number: int) -> int | None:
        """The stored revision of a machine. Raises StoreUnavailable."""
        return None

    async def load(self, number: int) -> tuple[VmRecord, VirtualMachine, list[Trace]] | None:
        """A stored machine and its traces without exit records. Raises StoreUnavailable."""
        return None

    async def summaries(self, numbers: Sequence[int]) -> dict[int, tuple[int, Summary | None]]:
        """Revision and summary of those of these machines that are stored, without reading their contents.

        The summary is None where only the whole machine tells. Raises StoreUnavailable.
        """
        return {}

    def loader(self, number: int) -> Callable[[str], Awaitable[ExitColumns]] | None:
        """How exit records of traces that were kept are fetched, if they can be."""
        return None

    def event_loader(self, number: int) -> Load | None:
        """How rows of an event log are fetched, if they can be."""
        return None

    async def exit_part(self, number: int, trace: str, part: int) -> ExitColumns:
        """One part of a trace's exit records. Raises NotFound when they are not kept, StoreUnavailable."""
        raise trace_not_kept(trace)

    async def note(self, side: Side) -> None:
        """Store what is no machine's. Raises StoreUnavailable."""

    async def kept_traces(self, ids: Collection[str]) -> set[str]:
        """Those among ``ids`` of traces of machines that are not loaded whose results are kept."""
        return set()

    async def job(self, job: str) -> JobRecord | None:
        """A job as it is stored. Raises StoreUnavailable."""
        return None

    async def answer(self, owner: str, key: str, now: int) -> AnswerRecord | None:
        """The answer under a key of ``owner``, unless its time ended at ``now`` (ms). Raises StoreUnavailable."""
        return None

    async def answers_used(self, owner: str, now: int) -> int:
        """Bytes that the answers of ``owner`` take at ``now`` (ms). Raises StoreUnavailable."""
        return 0


class StoredHome(Home):
    """A store on disk or on a server. Used from the event loop; what blocks happens in threads."""

    durable = True

    def __init__(self, url: StoreUrl) -> None:
        self._url = url
        self._keeper: Keeper | None = None
        self._reader: Reader | None = None
        self._epoch = 0
        self._open = False
        self._ready = False

    @property
    def open(self) -> bool:
        return self._open

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def trouble(self) -> str:  # type: ignore[override]
        return self._keeper.trouble if self._keeper is not None else "the store is being opened"

    def start(self, residents: Residents, workplace: Workplace, changed: Callable[[], None]) -> None:
        # A service whose machines live in memory does without the database libraries.
        from service.storage.keeper import Keeper  # noqa: PLC0415
        from service.storage.reader import Reader  # noqa: PLC0415

        loop = asyncio.get_running_loop()

        def owned(epoch: int, machines: Sequence[VmRecord], jobs: Sequence[JobRecord], goes_on: bool) -> None:
            def told() -> None:
                self._epoch = epoch
                self._open = self._ready = True
                residents.arrive(machines, goes_on=goes_on)
                workplace.arrive(jobs, goes_on=goes_on)
                changed()

            loop.call_soon_threadsafe(told)

        def lost(taken: bool) -> None:
            def told() -> None:
                self._ready = False
                if taken:
                    self._open = False
                    residents.leave()
                    workplace.leave()
                changed()

            loop.call_soon_threadsafe(told)

        self._keeper = Keeper(self._url, owned, lost, self.observe)
        self._reader = Reader(self._keeper.engine)
        self._keeper.start()

    async def stop(self) -> None:
        self._open = self._ready = False
        if self._keeper is not None:
            await anyio.to_thread.run_sync(self._keeper.stop)

    async def create(self, record: VmRecord, machine: VirtualMachine, log: LogChange = NO_LOG) -> None:
        await self._store(
            Change(record.number, None, record, lambda: _head(machine), lambda: machine.blocks_since(None), log=log)
        )

    async def commit(
        self,
        before: VmRecord,
        after: VmRecord,
        machines: tuple[VirtualMachine, VirtualMachine],
        traces: Sequence[Trace] = (),
        dropped: Sequence[str] = (),
        log: LogChange = NO_LOG,
    ) -> None:
        known, changed = machines
        stored = [await _recorded(trace) for trace in traces]
        await self._store(
            Change(
                after.number,
                before.revision,
                after,
                lambda: _head(changed),
                lambda: changed.blocks_since(known),
                stored,
                dropped,
                log,
            )
        )

    async def delete(self, record: VmRecord) -> None:
        await self._store(Change(record.number, record.revision, None))

    async def note(self, side: Side) -> None:
        await self._store(Change(0, None, None, sides=(side,)))

    async def _store(self, change: Change) -> None:
        if not self._ready or self._keeper is None:
            raise StoreUnavailable(f"changes are not taken at present: {self.trouble or 'the store is being opened'}")
        change = replace(change, sides=(*change.sides, *sides_of(change)))
        await finished(self._keeper.submit(change, self._epoch))

    async def revision(self, number: int) -> int | None:
        return await anyio.to_thread.run_sync(self._reading().revision, number)

    async def load(self, number: int) -> tuple[VmRecord, VirtualMachine, list[Trace]] | None:
        reader = self._reading()

        def work() -> tuple[VmRecord, VirtualMachine, list[Trace]] | None:
            from service.storage.traces import trace_of  # noqa: PLC0415

            found = reader.machine(number)
            if found is None:
                return None
            machine = VirtualMachine.restore(json.loads(found.record.head), found.blocks)
            return found.record, machine, [trace_of(record) for record in found.traces]

        return await anyio.to_thread.run_sync(work)

    async def summaries(self, numbers: Sequence[int]) -> dict[int, tuple[int, Summary | None]]:
        reader = self._reading()

        def work() -> dict[int, tuple[int, Summary | None]]:
            found = reader.heads(numbers)
            return {record.number: (record.revision, summary_from_head(json.loads(record.head))) for record in found}

        return await anyio.to_thread.run_sync(work)

    def loader(self, number: int) -> Callable[[str], Awaitable[ExitColumns]] | None:
        async def load(trace: str) -> ExitColumns:
            from service.storage.traces import columns_of  # noqa: PLC0415

            reader = self._reading()

            def work() -> ExitColumns:
                record, parts = reader.trace(number, trace)
                return columns_of(record, parts)

            return await anyio.to_thread.run_sync(work)

        return load

    def event_loader(self, number: int) -> Load | None:
        async def load(after: int, below: int, since: str, limit: int) -> list[EventRecord]:
            return await anyio.to_thread.run_sync(self._reading().events, number, after, below, since, limit)

        return load

    async def exit_part(self, number: int, trace: str, part: int) -> ExitColumns:
        reader = self._reading()

        def work() -> ExitColumns:
            from service.storage.traces import columns_of  # noqa: PLC0415

            found = reader.trace_part(number, trace, part)
            if found is None:
                raise trace_not_kept(trace)
            return columns_of(found[0], [found[1]])

        return await anyio.to_thread.run_sync(work)

    async def kept_traces(self, ids: Collection[str]) -> set[str]:
        return await anyio.to_thread.run_sync(self._reading().kept_traces, ids) if ids else set()

    async def job(self, job: str) -> JobRecord | None:
        return await anyio.to_thread.run_sync(self._reading().job, job)

    async def answer(self, owner: str, key: str, now: int) -> AnswerRecord | None:
        return await anyio.to_thread.run_sync(self._reading().answer, owner, key, now)

    async def answers_used(self, owner: str, now: int) -> int:
        return await anyio.to_thread.run_sync(self._reading().answers_used, owner, now)

    def _reading(self) -> Reader:
        if self._reader is None or not self._open:
            raise NotReady(self.trouble)
        return self._reader


async def _recorded(trace: Trace) -> TraceRecord:
    from service.storage.traces import record_of  # noqa: PLC0415

    return await anyio.to_thread.run_sync(record_of, trace)


def _head(machine: VirtualMachine) -> str:
    return machine.head_json()


async def finished(future: Future[T]) -> T:
    """The outcome of a future that is waited for whatever happens: a cancelled caller takes note of it first."""
    waiting = asyncio.wrap_future(future)
    cancelled = False
    while not waiting.done():
        try:
            await asyncio.wait((waiting,))
        except asyncio.CancelledError:
            cancelled = True
    result = waiting.result()
    if cancelled:
        task = asyncio.current_task()
        assert task is not None
        # Delivered at the next wait, when the outcome has been taken note of.
        task.cancel()
    return result


def home_of(settings: Settings) -> Home:
    """What the settings say."""
    url = StoreUrl.parse(settings.store)
    return Home() if url.kind == MEMORY else StoredHome(url)
