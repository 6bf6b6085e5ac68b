"""A repository in a database: machines are durable when a change of them is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Sequence

import anyio.to_thread

from engine.machine import VirtualMachine
from engine.machine.summary import Summary, summary_from_head
from engine.trace.results import ExitColumns
from service.problems import NotReady, StoreUnavailable, trace_not_kept
from service.runtime.commit_hooks import CommitHooks, with_sides
from service.runtime.events import Load
from service.runtime.memory_files import MemoryFiles
from service.runtime.offload import finished
from service.runtime.repository import NO_LOG, JobsInMemory, Repository, VmsInMemory
from service.runtime.trace_records import columns_of, record_of, trace_of
from service.runtime.traces import Trace
from service.storage.reader import Reader
from service.storage.records import (
    AnswerRecord,
    Change,
    EventRecord,
    FootprintRecord,
    JobRecord,
    LogChange,
    Side,
    TraceRecord,
    VmRecord,
)
from service.storage.urls import StoreUrl
from service.storage.writer import StoreWriter


class StoredRepository(Repository):
    """A store on disk or on a server. Used from the event loop; what blocks happens in threads."""

    durable = True

    def __init__(self, url: StoreUrl, files: MemoryFiles) -> None:
        self._url = url
        self._files = files
        self._writer: StoreWriter | None = None
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
        return self._writer.trouble if self._writer is not None else "the store is being opened"

    def start(self, vms: VmsInMemory, jobs: JobsInMemory, changed: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def owned(epoch: int, vm_records: Sequence[VmRecord], job_records: Sequence[JobRecord], goes_on: bool) -> None:
            def told() -> None:
                self._epoch = epoch
                self._open = self._ready = True
                vms.arrive(vm_records, goes_on=goes_on)
                jobs.arrive(job_records, goes_on=goes_on)
                changed()

            loop.call_soon_threadsafe(told)

        def lost(taken: bool) -> None:
            def told() -> None:
                self._ready = False
                if taken:
                    self._open = False
                    vms.leave()
                    jobs.leave()
                changed()

            loop.call_soon_threadsafe(told)

        self._writer = StoreWriter(self._url, owned, lost, self.observe)
        self._reader = Reader(self._writer.engine)
        self._writer.start()

    async def stop(self) -> None:
        self._open = self._ready = False
        if self._writer is not None:
            await anyio.to_thread.run_sync(self._writer.stop)

    async def create(
        self, record: VmRecord, machine: VirtualMachine, log: LogChange = NO_LOG, hooks: CommitHooks = ()
    ) -> None:
        await self._store(
            Change(record.number, None, record, machine.head_json, lambda: machine.blocks_since(None), log=log),
            hooks,
        )

    async def commit(
        self,
        before: VmRecord,
        after: VmRecord,
        machines: tuple[VirtualMachine, VirtualMachine],
        traces: Sequence[Trace] = (),
        dropped: Sequence[str] = (),
        log: LogChange = NO_LOG,
        hooks: CommitHooks = (),
    ) -> None:
        known, changed = machines
        stored = [await _recorded(trace) for trace in traces]
        await self._store(
            Change(
                after.number,
                before.revision,
                after,
                changed.head_json,
                lambda: changed.blocks_since(known),
                stored,
                dropped,
                log,
            ),
            hooks,
        )

    async def delete(self, record: VmRecord, hooks: CommitHooks = ()) -> None:
        await self._store(Change(record.number, record.revision, None), hooks)

    async def note(self, side: Side, hooks: CommitHooks = ()) -> None:
        await self._store(Change(0, None, None, sides=(side,)), hooks)

    async def _store(self, change: Change, hooks: CommitHooks) -> None:
        if not self._ready or self._writer is None:
            raise StoreUnavailable(f"changes are not taken at present: {self.trouble or 'the store is being opened'}")
        await finished(self._writer.submit(with_sides(change, hooks), self._epoch))

    async def revision(self, number: int) -> int | None:
        return await anyio.to_thread.run_sync(self._reading().revision, number)

    async def load(self, number: int) -> tuple[VmRecord, VirtualMachine, list[Trace]] | None:
        reader = self._reading()

        def work() -> tuple[VmRecord, VirtualMachine, list[Trace]] | None:
            found = reader.machine(number)
            if found is None:
                return None
            attach = self._files.reopening(found.record.tenant)
            machine = VirtualMachine.restore(json.loads(found.record.head), found.blocks, attach)
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

    async def footprints(self, tenant: str, after: str = "", limit: int | None = None) -> list[FootprintRecord]:
        return await anyio.to_thread.run_sync(self._reading().footprints, tenant, after, limit)

    async def footprints_called(self, ids: Collection[str]) -> list[FootprintRecord]:
        return await anyio.to_thread.run_sync(self._reading().footprints_called, ids) if ids else []

    async def footprints_before(self, created: str) -> list[str]:
        return await anyio.to_thread.run_sync(self._reading().footprints_before, created)

    async def footprint_part(self, footprint: str, part: int) -> bytes | None:
        return await anyio.to_thread.run_sync(self._reading().footprint_part, footprint, part)

    def _reading(self) -> Reader:
        if self._reader is None or not self._open:
            raise NotReady(self.trouble)
        return self._reader


async def _recorded(trace: Trace) -> TraceRecord:
    return await anyio.to_thread.run_sync(record_of, trace)
