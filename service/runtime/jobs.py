"""Jobs: bodies that were accepted, waiting for their turn, running, and remembered for a while after their end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context
from datetime import UTC, datetime, timedelta

from starlette.requests import Request

from engine.errors import EngineError, NotFound
from engine.footprint.places import Footprint
from engine.machine import VirtualMachine
from engine.trace.readers import Budget
from engine.trace.results import TraceResult
from service.platform.stamps import moment
from service.problems import Interrupted, NotReady, ServiceError, StoreUnavailable, describe
from service.runtime import handed_over, source_builds
from service.runtime import job as states
from service.runtime.bodies import PIECE, Upload
from service.runtime.body_memory import BodyMemory
from service.runtime.commit_hooks import CommitHooks
from service.runtime.footprint_builds import Collecting, FootprintRequest, build
from service.runtime.footprint_merges import MergeRequest, merging
from service.runtime.footprints import Footprints
from service.runtime.job import Job, Wanted
from service.runtime.offload import finished
from service.runtime.registry import Registry
from service.runtime.replays import beside, committed
from service.runtime.shares import Share, Tenants, one_tenant
from service.runtime.source_builds import SourcesRequest
from service.runtime.spool import JobStopped, Spool, Spools
from service.runtime.traces import Trace, TraceRequest, replay
from service.settings import Settings
from service.storage.records import Change, FootprintRecord, JobRecord, Side
from service.telemetry.metrics import Metrics

logger = logging.getLogger("subpage.jobs")

# How long a cancellation waits for the replay to notice it, and how soon a store that is away is asked again.
_NOTICE_SECONDS = 5.0
_ASK_SECONDS = 0.2

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Jobs of one tenant are apart by this at least, so that their times put them in order.
_TICK = timedelta(microseconds=1)


class Jobs:
    """The jobs of one application; used from the event loop only.

    At most ``running_jobs`` run, one of each machine at a time, in the order of acceptance. A job is accepted when its
    row is stored, and done with the commit of its replay, whichever the process lives to see.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        footprints: Footprints,
        metrics: Metrics,
        tenants: Tenants = one_tenant,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._footprints = footprints
        self._metrics = metrics
        self._executor: Executor | None = None
        self._jobs: dict[str, Job] = {}  # in the order of acceptance
        self._queue: deque[Job] = deque()
        self._running: dict[Job, asyncio.Task[None]] = {}
        self._ended: deque[Job] = deque()  # in the order of their end
        self._late: set[asyncio.Task[None]] = set()
        self._forgotten: list[str] = []
        self._number = 0
        self._latest: dict[str, datetime] = {}
        self._places = Share(
            "max_queued_jobs", settings.max_queued_jobs + settings.running_jobs, "jobs may wait or run", tenants
        )
        self._begun = 0
        self._served: dict[str, int] = {}  # which job to begin its last one was
        self._turns = Share("running_jobs", settings.running_jobs, "jobs run at one time", tenants)
        self.spools = Spools(settings.max_job_bytes, settings.spool_dir, tenants)
        self.memory = BodyMemory(settings.body_memory_bytes, settings.max_body_memory_bytes, tenants)
        self._closing_at: float | None = None
        metrics.jobs_end(state for state in states.STATES if state in states.ENDED)

    def open(self, executor: Executor) -> None:
        """Begin; replays run in threads of ``executor``."""
        self._executor = executor

    # What the store says

    def arrive(self, jobs: Sequence[JobRecord], *, goes_on: bool) -> None:
        """The store is ours and has these; with ``goes_on`` those in memory are the same, and at least as new."""
        if not goes_on:
            self.leave()
            self._jobs = {record.id: Job.of(record) for record in jobs}
            ended = [job for job in self._jobs.values() if job.over]
            self._ended = deque(sorted(ended, key=lambda job: job.finished or job.created))
        self._number = max([self._number, *(record.number for record in jobs)])
        for job in self._jobs.values():
            if job.over and not job.stored:
                late = self._spawn(self._store(job))
                self._late.add(late)
                late.add_done_callback(self._late.discard)

    def leave(self) -> None:
        """Another process may change the store; it takes what is under way for interrupted."""
        for job in (*self._queue, *self._running):
            job.stop(states.INTERRUPTED)
        for job in self._queue:
            self._settle(job, job.record(states.INTERRUPTED, datetime.now(UTC)))
        self._queue.clear()
        self._ended.clear()
        self._jobs = {}

    # What requests ask for

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """A place in the queue, kept while a body arrives. Raises ShareExceeded, NotReady."""
        if self._closing_at is not None:
            raise NotReady("the service is stopping and takes no jobs")
        with self._places.place(tenant):
            yield

    async def receive(self, request: Request, tenant: str) -> Spool:
        """The body of ``request`` in a file without a name. Raises ShareExceeded, and what reading a body raises."""
        async with Upload(request, None, min(self._settings.body_queue_bytes, PIECE)) as upload:
            return await self.spools.fill(upload, tenant)

    async def accept(
        self,
        vm: str,
        tenant: str,
        wanted: Wanted,
        spool: Spool | None,
        hooks: CommitHooks,
        told: Callable[[Job], None],
    ) -> Job:
        """A job of what was received, if it has a body, stored with what ``hooks`` say. ``told`` sees it before that.

        Raises StoreUnavailable.
        """
        self._forget_old()
        self._number += 1
        now = max(datetime.now(UTC), self._latest.get(tenant, _EPOCH) + _TICK)
        self._latest[tenant] = now
        job = Job(self._number, f"job_{secrets.token_hex(8)}", tenant, vm, now)
        job.wanted, job.spool, job.stored = wanted, spool, False
        told(job)
        forgotten, self._forgotten = self._forgotten, []
        try:
            await self._registry.repository.note(Side(jobs=(job.record(),), forgotten=forgotten), hooks)
        except BaseException:
            self._forgotten += forgotten
            self._free(job)
            raise
        self._jobs[job.id] = job
        self._places.count(tenant, 1)
        self._queue.append(job)
        self._start_next()
        return job

    def get(self, job_id: str, tenant: str) -> Job:
        """Raises NotFound, also for a job of another tenant and for one that was forgotten."""
        self._forget_old()
        job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise NotFound("must be the id of a job that is still kept", field="job", value=job_id)
        return job

    def page(self, tenant: str, after: int, limit: int) -> tuple[list[Job], int | None]:
        """Up to ``limit`` jobs of ``tenant`` after the moment ``after``, oldest first, and where the next page
        starts."""
        self._forget_old()
        mine = (job for job in self._jobs.values() if job.tenant == tenant and moment(job.created) > after)
        later = sorted(mine, key=lambda job: job.created)
        found = later[:limit]
        return found, moment(found[-1].created) if limit < len(later) else None

    async def cancel(self, job: Job, hooks: CommitHooks) -> None:
        """End it without an effect if it has not ended. Returns when it has, at the latest after some seconds, which
        a replay needs only if it is between two looks for that long. The end of one that waits is stored with what
        ``hooks`` say."""
        if not job.over:
            await self._halt(job, states.CANCELLED, hooks)
            await self.wait(job, _NOTICE_SECONDS)

    async def wait(self, job: Job, seconds: float) -> bool:
        """Whether it ends within ``seconds``."""
        if not job.over and seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await job.ended.wait()
            except TimeoutError:
                pass
        return job.over

    async def with_result(self, jobs: Collection[Job]) -> set[str]:
        """The ids of those whose results can be read."""
        found: set[str] = set()
        stored: dict[str, str] = {}
        built: dict[str, str] = {}
        for job in jobs:
            if job.trace is not None and not job.vm:
                built[job.trace] = job.id
            if job.trace is None or (entry := self._registry.find(job.vm)) is None:
                continue
            if entry.loaded is None or entry.doubtful:
                stored[job.trace] = job.id
            elif entry.traces.has(job.trace):
                found.add(job.id)
        found |= {built[footprint] for footprint in await self._footprints.kept(list(built))}
        return found | {stored[trace] for trace in await self._registry.repository.kept_traces(list(stored))}

    def by_state(self) -> dict[str, int]:
        """How many there are in each state."""
        return {**dict.fromkeys(states.STATES, 0), **Counter(job.state for job in self._jobs.values())}

    # The end of the service

    def drain(self) -> None:
        """No further jobs, and none of those that wait begins; running ones have their time from here on."""
        if self._closing_at is None:
            self._closing_at = time.monotonic()

    async def stop(self) -> None:
        """Wait for running jobs, ``drain_seconds`` and ``shutdown_timeout`` after ``drain`` at the longest; then
        interrupt them. All that wait are interrupted."""
        self.drain()
        assert self._closing_at is not None
        until = self._closing_at + self._settings.drain_seconds + self._settings.shutdown_timeout
        for job in list(self._queue):
            await self._halt(job, states.INTERRUPTED)
        if self._running:
            await asyncio.wait(self._running.values(), timeout=max(0.0, until - time.monotonic()))
        for job in list(self._running):
            await self._halt(job, states.INTERRUPTED)
        if self._running:
            await asyncio.wait(self._running.values())

    # One job

    def _free(self, job: Job) -> None:
        if job.spool is not None:
            self.spools.free(job.spool, job.tenant)
        job.let_go()

    def _start_next(self) -> None:
        while self._closing_at is None and len(self._running) < self._settings.running_jobs:
            job = self._next()
            if job is None:
                return
            self._queue.remove(job)
            self._turns.count(job.tenant, 1)
            self._begun += 1
            self._served[job.tenant] = self._begun
            self._running[job] = self._spawn(self._run(job))

    def _next(self) -> Job | None:
        """Tenants in rotation: of the one with the fewest that run, and then of the one whose last began earliest."""
        busy = {job.vm for job in self._running} - {""}
        free = (job for job in self._queue if job.vm not in busy and self._turns.room(job.tenant) > 0)
        return min(free, key=lambda job: (self._turns.of(job.tenant), self._served.get(job.tenant, 0)), default=None)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        # Not in the context of the request: its id is its own.
        return asyncio.get_running_loop().create_task(work, context=Context())

    async def _run(self, job: Job) -> None:
        try:
            await self._settle_in_store(job, await self._outcome(job))
        finally:
            self._running.pop(job, None)
            self._turns.count(job.tenant, -1)
            self._start_next()

    async def _outcome(self, job: Job) -> JobRecord:
        """Do it. Returns what it has become; the store knows already if it succeeded."""
        try:
            return await (self._replay(job) if job.vm else self._build(job))
        except JobStopped:
            return self._ended_early(job)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()  # by _halt, in the wait for the machine
            return self._ended_early(job)
        except StoreUnavailable as error:
            return self._failed(job, error) if error.certain else await self._find_out(job, error)
        except (EngineError, ServiceError) as error:
            # Whatever a replay makes of a body that is taken away from it.
            return self._ended_early(job) if job.halt is not None else self._failed(job, error)
        except Exception as error:
            logger.exception("job %s met a defect", job.id)
            return self._failed(job, error)

    async def _build(self, job: Job) -> JobRecord:
        """A footprint."""
        ended: list[JobRecord] = []

        def told(kept: FootprintRecord) -> list[JobRecord]:
            job.check()
            now = datetime.now(UTC)
            ended.append(job.record(states.SUCCEEDED, now, trace=kept.id, records=found.records))
            return ended

        job.check()
        job.begin()
        async with self._built(job) as found:
            await self._footprints.add(job.tenant, found, (), told)
        job.stored = True
        return ended[0]

    @asynccontextmanager
    async def _built(self, job: Job) -> AsyncIterator[Footprint]:
        """That of a body, or of others; it has its memory until the context ends."""
        wanted, executor = job.wanted, self._executor
        assert executor is not None
        if isinstance(wanted, MergeRequest):
            async with merging(
                self._footprints,
                job.tenant,
                wanted,
                self._settings,
                lambda work: finished(executor.submit(work, job.check)),
                job.told(),
            ) as found:
                yield found
            return
        if isinstance(wanted, SourcesRequest):
            with self._footprints.memory.budget(job.tenant) as room:
                yield await finished(executor.submit(self._of_sources(job, wanted, room).footprint, job.told()))
            return
        assert isinstance(wanted, FootprintRequest)
        with self.memory.budget(job.tenant) as budget, self._footprints.memory.budget(job.tenant) as room:
            thread = executor.submit(lambda: build(wanted, job.source(budget), job.check, budget, room, job.follow))
            yield await finished(thread)

    def _of_sources(
        self, job: Job, wanted: SourcesRequest, room: Budget
    ) -> source_builds.Building | handed_over.Building:
        """What builds a footprint of files: a thread, or a cluster where there is one."""
        settings = self._settings
        check = source_builds.timed(job.check, settings.source_seconds)
        allowed = source_builds.Allowed.of(settings, job.tenant)
        if settings.ray_address is not None:
            return handed_over.Building(settings.ray_address, wanted, allowed, check, room, settings.spool_dir)
        return source_builds.Building(wanted, allowed, check, lambda: self.memory.budget(job.tenant), room)

    async def _replay(self, job: Job) -> JobRecord:
        wanted = job.wanted
        assert isinstance(wanted, TraceRequest)
        done: list[JobRecord] = []

        async def tell(trace: Trace) -> None:
            done.append(job.record(states.SUCCEEDED, trace.created, trace=trace.id, records=trace.result.records))

        def ends(change: Change) -> Side | None:
            return Side(jobs=tuple(done)) if done else None

        job.check()
        async with self._registry.using(job.vm, job.tenant):
            entry = self._registry.get(job.vm)
            job.check()
            job.waits = True
            with beside(self._footprints, job.tenant, wanted) as collecting:
                await committed(
                    entry,
                    wanted,
                    self._metrics,
                    lambda machine: self._turn(job, machine, collecting),
                    (ends,),
                    tell=tell,
                    patient=True,
                    collected=(self._footprints, collecting),
                )
        job.stored = True
        return done[0]

    async def _turn(
        self, job: Job, machine: VirtualMachine, collecting: Collecting | None
    ) -> tuple[TraceResult, tuple[str, ...]]:
        """The machine is there for it."""
        wanted = job.wanted
        assert isinstance(wanted, TraceRequest) and self._executor is not None
        job.waits = False
        job.begin()
        with self.memory.budget(job.tenant) as budget:
            thread = self._executor.submit(
                lambda: replay(machine, wanted, job.source(budget), job.check, job.follow, budget, collecting)
            )
            return await finished(thread)

    async def _find_out(self, job: Job, error: StoreUnavailable) -> JobRecord:
        """Whether the commit was made, which only the store knows."""
        while job.halt is None:
            try:
                record = await self._registry.repository.job(job.id)
            except ServiceError:
                await asyncio.sleep(_ASK_SECONDS)
                continue
            if record is not None and record.state == states.SUCCEEDED:
                job.stored = True
                return record
            break
        return self._failed(job, error)

    def _failed(self, job: Job, error: Exception) -> JobRecord:
        job.fault = error
        problem, _ = describe(error, job.instance)
        return job.record(states.FAILED, datetime.now(UTC), error=problem)

    def _ended_early(self, job: Job) -> JobRecord:
        return job.record(job.halt or states.INTERRUPTED, datetime.now(UTC))

    async def _halt(self, job: Job, state: str, hooks: CommitHooks = ()) -> None:
        job.stop(state)
        if job in self._queue:
            self._queue.remove(job)
            await self._settle_in_store(job, job.record(state, datetime.now(UTC)), hooks)
        elif job in self._running and job.waits:
            self._running[job].cancel()

    async def _settle_in_store(self, job: Job, record: JobRecord, hooks: CommitHooks = ()) -> None:
        """Let it have ended as ``record`` says, which is stored first unless it is already."""
        if not job.stored:
            try:
                await self._registry.repository.note(Side(jobs=(record,)), hooks)
                job.stored = True
            except ServiceError as error:
                logger.warning("how job %s ended is not stored: %s", job.id, error)
        self._settle(job, record)

    def _settle(self, job: Job, record: JobRecord) -> None:
        if job.over:
            return
        self._free(job)
        self._places.count(job.tenant, -1)
        job.adopt(record)
        if job.state == states.INTERRUPTED:
            job.fault = Interrupted("the service ended before the work did")
        self._metrics.job_ended(job.state)
        if job.id in self._jobs:
            self._ended.append(job)

    async def _store(self, job: Job) -> None:
        """Try again to store how it ended."""
        try:
            await self._registry.repository.note(Side(jobs=(job.record(),)))
            job.stored = True
        except ServiceError:
            logger.warning("how job %s ended is still not stored", job.id)

    def _forget_old(self) -> None:
        since = datetime.now(UTC) - timedelta(seconds=self._settings.kept_job_seconds)
        while self._ended:
            oldest = self._ended[0]
            if len(self._ended) <= self._settings.kept_jobs and (oldest.finished or oldest.created) > since:
                return
            self._ended.popleft()
            if self._jobs.pop(oldest.id, None) is not None:
                self._forgotten.append(oldest.id)
