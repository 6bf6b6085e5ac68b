"""What metrics tell of machines, their logs and tools, and jobs, counted when somebody asks; from any thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from service.runtime.jobs import Jobs
from service.runtime.registry import Registry

Family = GaugeMetricFamily | CounterMetricFamily

_FRAMES = "frames_"


def of_machines(registry: Registry) -> Iterable[Family]:
    """How many there are, loaded or not, and the frames of those in memory."""
    entries = registry.all()
    yield GaugeMetricFamily("subpage_vms", "Machines that exist.", value=len(entries))
    counts: Counter[str] = Counter()
    for machine in (entry.loaded for entry in entries):
        if machine is not None:
            counters = machine.counters().items()
            counts.update({name.removeprefix(_FRAMES): n for name, n in counters if name.startswith(_FRAMES)})
    frames = GaugeMetricFamily("subpage_frames", "4 KiB frames in use over all machines in memory.", labels=["kind"])
    for kind, count in counts.items():
        frames.add_metric([kind], count)
    yield frames


def of_logs(registry: Registry) -> Iterable[Family]:
    """Event logs and who reads them."""
    logs = registry.logs
    appended = CounterMetricFamily("subpage_events", "Events added to logs, by kind.", labels=["kind"])
    for kind, count in logs.appended.items():
        appended.add_metric([kind], count)
    yield appended
    dropped = "Events that a reader was told it cannot have."
    yield CounterMetricFamily("subpage_events_dropped", dropped, value=logs.dropped)
    yield GaugeMetricFamily("subpage_event_streams", "Streams of events that are open.", value=logs.streams)


def of_tools(registry: Registry) -> Iterable[Family]:
    """Introspection tools, and the accesses that wait for them."""
    brokers = [entry.broker for entry in registry.all()]
    attached, waiting = sum(len(broker.tools) for broker in brokers), sum(len(broker.questions) for broker in brokers)
    about = "Introspection tools that are attached."
    yield GaugeMetricFamily("subpage_introspection_tools", about, value=attached)
    about = "Accesses that wait for an answer."
    yield GaugeMetricFamily("subpage_introspection_waiting", about, value=waiting)


def of_jobs(jobs: Jobs) -> Iterable[Family]:
    """Jobs that are known; those in state queued are the queue."""
    family = GaugeMetricFamily("subpage_jobs", "Jobs that are known, by state.", labels=["state"])
    for state, count in jobs.by_state().items():
        family.add_metric([state], count)
    yield family
