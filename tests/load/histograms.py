"""Quantiles of what the service measures, out of two readings of ``/metrics``."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

LAG = "subpage_event_loop_lag_seconds"
COMMITS = "subpage_store_commit_seconds"

Buckets = list[tuple[float, float]]
"""(upper bound in seconds, how many are at most that) in rising order; the last bound is infinite."""


def buckets(exposition: str, name: str = LAG) -> Buckets:
    """A histogram without labels in a reply of ``/metrics``."""
    found = [
        (float(sample.labels["le"]), sample.value)
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == f"{name}_bucket"
    ]
    return sorted(found)


def between(before: Buckets, after: Buckets) -> Buckets:
    """What was observed between two readings."""
    return [(bound, late - early) for (bound, early), (_, late) in zip(before, after, strict=True)]


def bucket_quantile(seen: Buckets, q: float) -> float:
    """As Prometheus' ``histogram_quantile`` has it: linear within a bucket; the highest bound stands for all above."""
    total = seen[-1][1] if seen else 0
    if not total:
        return float("nan")
    rank, low, below = q * total, 0.0, 0.0
    for bound, count in seen:
        if count >= rank and count > below:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = (bound if bound != float("inf") else low), count
    return low
