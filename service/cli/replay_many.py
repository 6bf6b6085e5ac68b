"""``subpage replay`` of many traces against many policies: each on a machine of its own, here or by a cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from scale import each, sources
from scale.errors import ScaleError
from scale.partials import hash_of
from scale.sources import Source
from service import __version__
from service.cli import local, show
from service.cli.footprint_files import check_output
from service.cli.footprint_scale import scale_told
from service.cli.policy_files import named_policies
from service.cli.progress import Move, bar
from service.cli.samples import line_of_samples
from service.cli.trace_parquet import replacing
from service.platform.failures import Failure, opened
from service.runtime.job import Job

MOST = 100_000
# What its document has of a service alone, and of when it was made.
_OWN = ("id", "vm", "created", "footprint", "seconds", "next", "state", "resume_at", "published", "rate", "lag")
# Columns of the table, and the members that they show.
_COLUMNS = {
    "trace": "trace",
    "policy": "policy",
    "records": "records",
    "writes": "writes",
    "violations": "violations",
    "by whole pages": "page_granular_violations",
    "mmio": "mmio",
}


@dataclass(frozen=True, slots=True)
class Replaying:
    """What replays one trace against one policy; it is sent to workers, if there are some."""

    options: local.Options
    bounds: local.Bounds
    exits: int

    @property
    def how(self) -> str:
        """Everything that what comes of it depends on beside."""
        return f"{__version__} {self}"

    def __call__(self, source: Source, policy: local.Policy) -> dict[str, Any]:
        """Raises ScaleError."""
        try:
            return self.followed(source, policy, lambda job: None)
        except Failure as failure:
            raise ScaleError(str(failure)) from None

    def followed(self, source: Source, policy: local.Policy, watch: Callable[[Job], object]) -> dict[str, Any]:
        """The same; ``watch`` is called now and then with how far it is. Raises Failure, ScaleError."""
        name = source.name
        with sources.opened(source) if sources.is_address(name) else opened(Path(name)) as file:
            request = self.options.request_in(file, name, self.bounds)
            machine = local.create(policy, self.bounds)
            memory = self.bounds.body_memory_bytes
            trace = local.run_in(file, source.size, name, machine, request, memory, watch)
        document = local.document_of(trace, self.exits)
        return {key: value for key, value in document.items() if key not in _OWN}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where it is done, and where what comes of it goes."""

    ray: str | None
    partials: str | None
    output: Path | None
    as_json: bool
    progress: bool | None


def replay(texts: Sequence[str], policies: Sequence[Path], replaying: Replaying, wanted: Wanted) -> None:
    """Replay all files that ``texts`` name against all ``policies``, print the table, and write what was asked for.

    Raises Failure.
    """
    with scale_told():
        found = sources.expand(texts)
    with bar("reading policies", wanted.progress) as move:
        named = named_policies(policies, local.read_policy, lambda share: move(share, done=""))
    if len(found) * len(named) > MOST:
        rule = (
            f"{len(found):,} traces against {len(named):,} policies are more than {MOST:,} replays: take some at a time"
        )
        raise Failure(f"{rule}, or reduce the traces by `subpage footprint build`, and ask `subpage footprint cost`")
    if wanted.output is not None:
        check_output(wanted.output, [Path(source.name) for source in found if not sources.is_address(source.name)])
    if (line := line_of_samples(found)) is not None:
        typer.echo(line, err=True)
    answers = _answers(found, named, replaying, wanted)
    if wanted.output is not None:
        with replacing(wanted.output) as beside:
            beside.write_text(json.dumps({"replays": answers}, indent=1), encoding="utf-8")
    if wanted.as_json:
        show.document({"replays": answers})
    else:
        rows = [[one[member] for member in _COLUMNS.values()] for one in answers]
        show.table(tuple(_COLUMNS), rows, right=tuple(_COLUMNS)[2:])


def _answers(
    found: Sequence[Source], named: Mapping[str, local.Policy], replaying: Replaying, wanted: Wanted
) -> list[dict[str, Any]]:
    """The document of each trace and policy, in their order."""
    folder = wanted.partials or (None if wanted.output is None else f"{wanted.output}.partials")
    work = each.Work(replaying, replaying.how, folder)
    about = {name: hash_of(policy.model_dump(mode="json", exclude_unset=True)) for name, policy in named.items()}
    pairs = [(source, name) for source in found for name in named]
    tasks = [each.Task(source, named[name], about[name]) for source, name in pairs]
    try:
        with scale_told():
            documents = _here(work, tasks, replaying, wanted) if wanted.ray is None else _cluster(work, tasks, wanted)
    except BaseException:
        _tell_kept(work, tasks)
        raise
    if wanted.partials is None and work.kept is not None:
        work.kept.clear()
    return [
        {"trace": source.name, "policy": name, **document}
        for (source, name), document in zip(pairs, documents, strict=True)
    ]


def _tell_kept(work: each.Work[local.Policy], tasks: Sequence[each.Task[local.Policy]]) -> None:
    """Say how much the next run need not do again."""
    kept = work.kept
    if kept is None:
        return
    there = set(kept.names())
    count = sum(work.name(task.source, task.about) in there for task in tasks)
    if count:
        said = f"the results of {count:,} of {len(tasks):,} replays are kept"
        typer.echo(f"{said} in {kept.folder}: the same command goes on from there", err=True)
    else:
        kept.leave()


def _here(
    work: each.Work[local.Policy], tasks: Sequence[each.Task[local.Policy]], replaying: Replaying, wanted: Wanted
) -> list[dict[str, Any]]:
    """In this process, one after the other."""
    with bar("replaying", wanted.progress) as move:
        following = each.Progress(len(tasks), told=_telling(move))

        def do(source: Source, policy: local.Policy) -> dict[str, Any]:
            beside = f"{following.done:,} of {following.total:,} replays"

            def watch(job: Job) -> None:
                share = (following.done + job.share) / following.total
                move(share, done=f"{beside}, {job.records_done:,} records of this")

            return replaying.followed(source, policy, watch)

        return each.here(each.Work(do, work.how, work.partials), tasks, following)


def _cluster(
    work: each.Work[local.Policy], tasks: Sequence[each.Task[local.Policy]], wanted: Wanted
) -> list[dict[str, Any]]:
    """By the workers of a cluster."""
    from scale.cluster import cluster

    assert wanted.ray is not None
    with ExitStack() as stack:
        move = stack.enter_context(bar("replaying", wanted.progress))
        ray = stack.enter_context(cluster(wanted.ray))
        following = each.Progress(len(tasks), told=_telling(move))
        found = each.on_ray(ray, work, tasks, following)
    if not following.kept:
        said = "the nodes of the cluster do not see it, or may not write there"
        typer.echo(f"partial results were not kept in {work.partials}: {said} (--partials)", err=True)
    return found


def _telling(move: Move) -> Callable[[each.Progress, Mapping[str, Any]], None]:
    """Moves the bar when a replay is done."""
    began, records = time.monotonic(), 0

    def tell(now: each.Progress, document: Mapping[str, Any]) -> None:
        nonlocal records
        records += document["records"]
        rate = records / (time.monotonic() - began) / 1e6
        done = f"{now.done:,} of {now.total:,} replays, {records:,} records, {rate:.1f} M/s"
        move(now.done / now.total, done=done)

    return tell
