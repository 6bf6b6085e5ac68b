"""What workers of a cluster do. Footprints stay in the object store: those who asked get what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from engine import source_fingerprint
from engine.errors import EngineError
from engine.footprint.costs import Cost, Costs
from engine.footprint.places import Footprint
from engine.footprint.question import Question
from engine.kvm.protections import Protection
from scale import each as work_on_each
from scale import groups
from scale.build import Done, Job, added, leaf
from scale.cluster import RETRIES
from scale.errors import ScaleError
from scale.sources import Source

_task: Callable[[Callable[..., Any]], Any] = ray.remote(max_retries=RETRIES)
_made: Callable[[Callable[..., Any]], Any] = ray.remote(max_retries=RETRIES, num_returns=2)


def release_here() -> str:
    """What tells whether two nodes count alike."""
    return source_fingerprint()


@_task
def release() -> str:
    """The same, of a node."""
    return release_here()


@_made
def reduced(job: Job, source: Source, piece: groups.Piece | None) -> tuple[Footprint, Done]:
    """The footprint of a file or of a piece."""
    return leaf(job, source, piece)


@_made
def together(*footprints: Footprint) -> tuple[Footprint, Done]:
    """All of them as one."""
    found = added(footprints)
    return found, Done(found.records, len(found))


@_made
def pieces_together(*footprints: Footprint) -> tuple[Footprint, Done]:
    """Pieces of a file that follow one another as one."""
    found = groups.one_of(footprints)
    return found, Done(found.records, len(found))


@_made
def file_finished(job: Job, source: Source, footprint: Footprint, whole: groups.Whole) -> tuple[Footprint, Done]:
    """All pieces of a file as its footprint, which is kept."""
    found = groups.finished(footprint, whole)
    kept = job.kept
    return found, Done(found.records, len(found), kept=kept is None or kept.write(job.name(source), found))


@_task
def planned(job: Job, source: Source) -> list[groups.Piece]:
    """The pieces of a file; none where the footprint of all of it is there, or it has but one."""
    kept = job.kept
    if kept is not None and kept.has(job.name(source)):
        return []
    return groups.pieces_of(source, job.split)


@_task
def whole(source: Source) -> groups.Whole:
    """What is known of a file as a whole."""
    return groups.whole_of(source)


@_task
def each(work: work_on_each.Work[Any], source: Source, item: Any, about: str) -> work_on_each.Made:
    """What comes of one file and one item."""
    return work_on_each.leaf(work, work_on_each.Task(source, item, about))


_asked: dict[str, Costs] = {}


@_task
def costs(token: str, footprint: Footprint, question: Question, policies: Sequence[Protection]) -> list[Cost]:
    """What policies cost. The sums that are made of a footprint once stay with the worker, under a ``token``."""
    try:
        if token not in _asked:
            _asked.clear()
            _asked[token] = Costs(footprint, question)
        return _asked[token].of(policies)
    except EngineError as error:
        raise ScaleError(f"{error.field}: {error.rule}" if error.field else error.rule) from None
