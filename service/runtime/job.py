"""One job: a replay, or a footprint, whose client does not wait for it, from its acceptance to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from engine.errors import TraceError
from engine.trace.readers import RECORD_BYTES, Budget, row_count
from service.problems import Interrupted, describe
from service.runtime.footprint_builds import FootprintRequest
from service.runtime.footprint_merges import MergeRequest
from service.runtime.source_builds import SourcesRequest
from service.runtime.spool import JobStopped, Spool
from service.runtime.traces import TraceRequest
from service.runtime.work_progress import Told
from service.storage.records import JobRecord

QUEUED, RUNNING = "queued", "running"
SUCCEEDED, FAILED, CANCELLED, INTERRUPTED = "succeeded", "failed", "cancelled", "interrupted"
STATES = (QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED, INTERRUPTED)
ENDED = frozenset({SUCCEEDED, FAILED, CANCELLED, INTERRUPTED})

_ENDED_EARLY = "the service ended before the replay did; the VM is as it was before it"
_NOT_BUILT = "the service ended before the footprint was built"


Wanted = TraceRequest | FootprintRequest | MergeRequest | SourcesRequest
# Of these all that is wanted was said: no body is put aside.
BODILESS = (MergeRequest, SourcesRequest)


class Progress(Protocol):
    """A replay, or a footprint, under way."""

    @property
    def records_done(self) -> int: ...


@dataclass(slots=True, eq=False)
class Job:
    """What is known of a job. Changed on the event loop only, but for ``progress``, which its thread sets.

    Of one that builds a footprint ``vm`` is empty; ``trace`` is the id of what came of it, a trace or a footprint.
    ``wanted`` and ``spool`` are there until it has ended, ``spool`` but for one that is BODILESS;
    ``waits`` while its task waits for the machine; ``halt`` is
    the state in which it is to end early; ``fault`` the exception that it failed with, and ``error`` the same as a
    problem. ``stored`` tells whether its end is.
    """

    number: int
    id: str
    tenant: str
    vm: str
    created: datetime
    state: str = QUEUED
    started: datetime | None = None
    finished: datetime | None = None
    records: int = 0
    trace: str | None = None
    error: dict[str, Any] | None = None
    wanted: Wanted | None = None
    spool: Spool | None = None
    total: int | None = None
    progress: Progress | None = None
    waits: bool = False
    halt: str | None = None
    fault: Exception | None = None
    stored: bool = True
    began: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, record: JobRecord) -> Job:
        """A job that the store knows."""
        job = cls(record.number, record.id, record.tenant, record.vm, datetime.fromisoformat(record.created))
        job.adopt(record)
        return job

    def adopt(self, record: JobRecord) -> None:
        """Be what ``record`` says."""
        self.state, self.records, self.trace = record.state, record.records, record.trace
        self.started, self.finished = _time(record.started), _time(record.finished)
        self.error = json.loads(record.error) if record.error is not None else None
        if self.state == INTERRUPTED and self.error is None:
            self.error, _ = describe(Interrupted(_ENDED_EARLY if self.vm else _NOT_BUILT), self.instance)
        if self.state in ENDED:
            self.ended.set()

    def record(self, state: str | None = None, finished: datetime | None = None, **members: Any) -> JobRecord:
        """As the store keeps it; ended in ``state`` if that is given."""
        told = {"records": self.records_done, "trace": self.trace, "error": self.error, **members}
        if told["error"] is not None:
            told["error"] = json.dumps(told["error"])
        return JobRecord(
            number=self.number,
            id=self.id,
            tenant=self.tenant,
            vm=self.vm,
            state=state or self.state,
            created=self.created.isoformat(),
            started=_text(self.started),
            finished=_text(finished or self.finished),
            **told,
        )

    @property
    def instance(self) -> str:
        """The path whose call it is."""
        return f"/v1/vms/{self.vm}/traces" if self.vm else "/v1/footprints"

    @property
    def result(self) -> str:
        """The path of what came of it, if something did."""
        return f"{self.instance}/{self.trace}"

    @property
    def url(self) -> str:
        return f"/v1/jobs/{self.id}"

    @property
    def over(self) -> bool:
        return self.state in ENDED

    @property
    def records_done(self) -> int:
        progress = self.progress
        return progress.records_done if progress is not None else self.records

    @property
    def rate(self) -> float | None:
        """Records a second; None before the first."""
        if self.started is None or not self.records_done:
            return None
        seconds = (
            (self.finished - self.started).total_seconds()
            if self.finished is not None
            else time.monotonic() - self.began
        )
        return self.records_done / max(seconds, 1e-6)

    @property
    def eta(self) -> float | None:
        """Seconds to its end at the rate so far; None when that cannot be told."""
        rate, spool = self.rate, self.spool
        if self.state == RUNNING and isinstance(self.progress, Told):
            share = self.progress.share
            return (time.monotonic() - self.began) * (1 - share) / share if share else None
        if self.state != RUNNING or rate is None or spool is None or self.wanted is None:
            return None
        done = self.records_done
        if self.total is not None:
            return max(0.0, self.total - self.wanted.start - done) / rate
        if not spool.taken:
            return None
        return done * max(0.0, spool.size / spool.taken - 1) / rate

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1, as far as that can be told."""
        if isinstance(self.progress, Told):
            return self.progress.share
        if self.spool is None or self.wanted is None:
            return float(self.over)
        if self.total is not None:
            return min(1.0, self.records_done / max(1, self.total - self.wanted.start))
        return min(1.0, self.spool.taken / max(1, self.spool.size))

    def retry_after(self) -> int:
        """Seconds after which looking again is worth it."""
        eta = self.eta
        return 1 if eta is None else min(30, max(1, math.ceil(eta)))

    # For its thread

    def check(self) -> None:
        """Raise JobStopped when it is to end early."""
        if self.halt is not None:
            raise JobStopped

    def follow(self, progress: Progress) -> None:
        """The replay has begun."""
        self.progress = progress

    def told(self) -> Told:
        """What tells how far it is where it has no body: for whoever does it."""
        self.progress = found = Told()
        return found

    def source(self, memory: int | Budget) -> Spool:
        """The body, from its beginning; it is told how many records it has where that can be known.

        ``memory`` is what finding that out may take, in bytes or as a budget.
        """
        spool = self.spool
        assert spool is not None and self.wanted is not None
        if self.wanted.format == "packed":
            self.total = spool.size // RECORD_BYTES.get(self.wanted.record or "", 1)
        elif self.wanted.format == "parquet":
            self.total = rows_of_parquet(spool, memory)
        return spool

    # For the event loop

    def begin(self) -> None:
        """It is its turn."""
        self.state, self.started, self.began = RUNNING, datetime.now(UTC), time.monotonic()

    def stop(self, state: str) -> None:
        """Let it end early, in ``state``, as soon as it looks."""
        self.halt = self.halt or state
        if self.spool is not None:
            self.spool.stop = True

    def let_go(self) -> None:
        """What it needed to run is needed no longer."""
        self.records, self.progress = self.records_done, None
        if self.spool is not None:
            self.spool.close()
        self.spool = self.wanted = None


def rows_of_parquet(spool: Spool, memory: int | Budget) -> int | None:
    """How many records a Parquet file says it has; None if it cannot be read, which is the replay's to report."""
    rows: int | None = None
    with contextlib.suppress(TraceError):
        rows = row_count(spool, memory)
    spool.seek(0)
    spool.taken = 0
    return rows


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text is not None else None


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None
