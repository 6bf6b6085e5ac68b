"""What Prometheus reads at /metrics: of the service since its start, and of the machines as they are."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.arch import exits as arch
from engine.trace.results import ExitColumns, TraceResult
from service import __version__
from service.storage.meter import Transaction

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.035, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_CHANGES = (1, 2, 4, 8, 16, 32)
_LAG_PERIOD = 0.1

EXIT_KINDS = ("ept_violation", "ept_misconfiguration", "spp_miss", "spp_misconfiguration")


Families = Callable[[], Iterable[GaugeMetricFamily | CounterMetricFamily]]
"""What is counted when somebody asks, and not before; called in the thread that asks."""


class _Counted(Collector):
    """Metrics that somebody else counts."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        return self._families()


class _Requests(Collector):
    """The request histogram. Its own, because every request pays for it: a bisection and two additions."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, int], tuple[list[int], list[float]]] = {}

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        seen = self._seen.get((method, route, status))
        if seen is None:
            seen = self._seen[method, route, status] = ([0] * (len(_SECONDS) + 1), [0.0])
        counts, total = seen
        counts[bisect_left(_SECONDS, seconds)] += 1
        total[0] += seconds

    def collect(self) -> Iterable[HistogramMetricFamily]:
        about = "Time from a request to the end of its reply."
        family = HistogramMetricFamily("subpage_request_seconds", about, labels=["method", "route", "status"])
        bounds = [*map(floatToGoString, _SECONDS), "+Inf"]
        for (method, route, status), (counts, total) in list(self._seen.items()):
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric([method, route, str(status)], buckets, total[0])
        yield family


class Metrics:
    """The metrics of one application; several may live in one process."""

    def __init__(self) -> None:
        self._known = CollectorRegistry(auto_describe=True)
        self._requests = _Requests()
        self._known.register(self._requests)
        self.under_way = 0  # a plain number, because every request changes it twice
        busy = Gauge("subpage_requests_under_way", "Requests being answered.", registry=self._known)
        busy.set_function(lambda: self.under_way)
        self.lag = Histogram(
            "subpage_event_loop_lag_seconds",
            "How late the event loop comes to what is due.",
            buckets=_LAG,
            registry=self._known,
        )
        self._exits = Counter(
            "subpage_exits", "Exits that the processor reported, by kind.", ["kind"], registry=self._known
        )
        self._records = Counter("subpage_replayed_records", "Accesses replayed.", registry=self._known)
        self._writes = Counter("subpage_replayed_writes", "Writes replayed.", registry=self._known)
        self._violations = Counter("subpage_violations", "Writes refused, in replays.", registry=self._known)
        self._questions = Counter(
            "subpage_introspection_questions", "Accesses that were asked about.", registry=self._known
        )
        self._answers = Counter(
            "subpage_introspection_answers",
            "What became of accesses that were asked about, and whether a tool said so (answer) or nobody (default).",
            ["action", "reason"],
            registry=self._known,
        )
        # Looked up for each question otherwise.
        self._answers_by: dict[tuple[str | None, str], Counter] = {}
        self._timeouts = Counter(
            "subpage_introspection_timeouts", "Questions that a tool did not answer in time.", registry=self._known
        )
        self._commits = Histogram(
            "subpage_store_commit_seconds",
            "Time that a transaction of the store takes, its commit included.",
            buckets=_SECONDS,
            registry=self._known,
        )
        self._grouped = Histogram(
            "subpage_store_commit_changes",
            "Changes that are committed together.",
            buckets=_CHANGES,
            registry=self._known,
        )
        self._written = Counter("subpage_store_written_bytes", "Bytes committed to the store.", registry=self._known)
        self._failures = Counter(
            "subpage_store_failures", "Transactions that were not committed.", registry=self._known
        )
        self._jobs_ended = Counter("subpage_jobs_ended", "Jobs that ended, by how.", ["state"], registry=self._known)
        info = Gauge("subpage_build_info", "1, labelled with the release.", ["version"], registry=self._known)
        info.labels(__version__).set(1)
        for kind in EXIT_KINDS:
            self._exits.labels(kind)
        ProcessCollector(registry=self._known)

    def watch(self, families: Families) -> None:
        """Show what ``families`` counts, too."""
        self._known.register(_Counted(families))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request was answered. ``route`` is the path's template: there are as many as the contract has."""
        self._requests.observe(method, route, status, seconds)

    def jobs_end(self, states: Iterable[str]) -> None:
        """Jobs may end in these ``states``: none has yet."""
        for state in states:
            self._jobs_ended.labels(state)

    def job_ended(self, state: str) -> None:
        """A job ended in ``state``."""
        self._jobs_ended.labels(state).inc()

    def replayed(self, result: TraceResult) -> None:
        """A replay was published."""
        self._records.inc(result.records)
        self._writes.inc(result.writes)
        self._violations.inc(result.violations)
        self._count_exits(result.exits)

    def accessed(self, exits: ExitColumns) -> None:
        """A single access was executed."""
        if len(exits):
            self._count_exits(exits_by_kind(exits))

    def asked(self) -> None:
        """An access waits for an answer."""
        self._questions.inc()

    def answered(self, action: str | None, reason: str, timeouts: int) -> None:
        """It was decided what becomes of one, after so many tools that did not answer in time."""
        known = self._answers_by.get((action, reason))
        if known is None:
            known = self._answers_by[action, reason] = self._answers.labels(action, reason)
        known.inc()
        if timeouts:
            self._timeouts.inc(timeouts)

    def stored(self, transaction: Transaction) -> None:
        """The store committed changes, or failed to. From any thread."""
        if not transaction.stored:
            self._failures.inc()
            return
        self._commits.observe(transaction.seconds)
        self._grouped.observe(transaction.changes)
        self._written.inc(transaction.octets)

    def _count_exits(self, counts: Mapping[str, int]) -> None:
        for kind, count in counts.items():
            self._exits.labels(kind).inc(count)

    async def watch_lag(self) -> None:
        """Measure how late a sleep ends, again and again."""
        while True:
            due = time.perf_counter() + _LAG_PERIOD
            await asyncio.sleep(_LAG_PERIOD)
            self.lag.observe(max(0.0, time.perf_counter() - due))

    def exposition(self) -> bytes:
        """The text format of Prometheus, version 0.0.4. For a thread: it counts the frames of every machine."""
        return generate_latest(self._known)


def exits_by_kind(exits: ExitColumns) -> dict[str, int]:
    """How many exit records there are of each kind in ``EXIT_KINDS``; others are not counted."""
    reasons, qualifications = exits.column("reason"), exits.column("qualification")
    spp = reasons == arch.SPP_EVENT
    misses = spp & ((qualifications & arch.Q_SPP_MISS) != 0)
    counts = (reasons == arch.EPT_VIOLATION, reasons == arch.EPT_MISCONFIGURATION, misses, spp & ~misses)
    return {kind: int(found.sum()) for kind, found in zip(EXIT_KINDS, counts, strict=True)}
