"""What makes changes of machines durable: a store, or nothing for machines that live as long as the process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from engine.machine import VirtualMachine
from engine.machine.summary import Summary
from engine.trace.results import ExitColumns
from service.problems import trace_not_kept
from service.runtime.commit_hooks import CommitHooks
from service.runtime.events import Load
from service.runtime.traces import Trace
from service.storage.meter import Observer, nobody
from service.storage.records import AnswerRecord, FootprintRecord, JobRecord, LogChange, Side, VmRecord

NO_LOG = LogChange()


class VmsInMemory(Protocol):
    """The machines of this process: told what the store has."""

    def arrive(self, machines: Sequence[VmRecord], *, goes_on: bool) -> None:
        """The store is ours and has these; ``goes_on`` if nobody else wrote to it since we last had it."""
        ...

    def leave(self) -> None:
        """The store has another owner: what is in memory is no longer true."""
        ...


class JobsInMemory(Protocol):
    """The jobs of this process: told what the store knows of them, like ``VmsInMemory``."""

    def arrive(self, jobs: Sequence[JobRecord], *, goes_on: bool) -> None: ...

    def leave(self) -> None: ...


class Repository:
    """What all repositories do, and that in the memory of this process: changes are durable as long as it is."""

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

    def start(self, vms: VmsInMemory, jobs: JobsInMemory, changed: Callable[[], None]) -> None:
        """Begin; ``changed`` is called whenever ``ready`` may have become another."""

    async def stop(self) -> None:
        """End, after everything that was handed in."""

    async def create(
        self, record: VmRecord, machine: VirtualMachine, log: LogChange = NO_LOG, hooks: CommitHooks = ()
    ) -> None:
        """Store a new machine and its first events. ``hooks`` here and below say what else. Raises StoreUnavailable."""

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
        """Store what differs between two machines, results of replays, and events. Raises StoreUnavailable."""

    async def delete(self, record: VmRecord, hooks: CommitHooks = ()) -> None:
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

    async def note(self, side: Side, hooks: CommitHooks = ()) -> None:
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

    async def footprints(self, tenant: str, after: str = "", limit: int | None = None) -> list[FootprintRecord]:
        """Those of a tenant created ``after`` a time, oldest first, without their files. Raises StoreUnavailable."""
        return []

    async def footprints_called(self, ids: Collection[str]) -> list[FootprintRecord]:
        """Those of these that are kept, without their files. Raises StoreUnavailable."""
        return []

    async def footprints_before(self, created: str) -> list[str]:
        """Ids of those of all tenants created before a time, some of them. Raises StoreUnavailable."""
        return []

    async def footprint_part(self, footprint: str, part: int) -> bytes | None:
        """A part of the file of a footprint; None when there is no more, or it is not kept. Raises StoreUnavailable."""
        return None
