"""Footprints of many files, and what many policies cost there: in this process, or by a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from engine.footprint.costs import Cost
from engine.footprint.places import Footprint
from engine.footprint.question import Question
from engine.kvm.protections import Protection
from scale import build as building
from scale.errors import ScaleError
from scale.sources import Source, expand, is_address
from service.cli.footprint_files import Reducing, check_output, saved
from service.cli.progress import Move, bar
from service.cli.samples import line_of_samples
from service.cli.trace_options import Format
from service.platform.failures import Failure

_PARQUET = (Format.AUTO, Format.PARQUET)


@contextmanager
def scale_told() -> Iterator[None]:
    """Raises Failure."""
    try:
        yield
    except ScaleError as error:
        raise Failure(str(error)) from None


def build(
    texts: Sequence[str],
    output: Path,
    reducing: Reducing,
    address: str | None,
    folder: str | None,
    progress: bool | None,
) -> Footprint:
    """Write the footprint of all files that ``texts`` name. Partial ones are kept in ``folder``, or beside the output
    until that is written. Raises Failure."""
    with scale_told():
        sources = expand(texts)
    check_output(output, [Path(source.name) for source in sources if not is_address(source.name)])
    if (line := line_of_samples(sources)) is not None:
        typer.echo(line, err=True)
    several = folder is not None or address is not None or len(sources) > 1
    job = building.Job(
        reducing,
        reducing.level,
        reducing.by,
        reducing.how,
        (folder or f"{output}.partials") if several else None,
        reducing.reading.format in _PARQUET,
    )
    try:
        with scale_told():
            found = (
                _cluster(job, sources, address, progress)
                if address is not None
                else _here(job, sources, reducing, progress)
            )
        saved(found, output)
    except BaseException:
        _tell_kept(job, sources)
        raise
    if several and folder is None and job.kept is not None:
        job.kept.clear()
    return found


def _tell_kept(job: building.Job, sources: Sequence[Source]) -> None:
    """Say how much the next run need not do again."""
    kept = job.kept
    there = set(kept.names()) if kept is not None else set()
    count = sum(job.name(source) in there for source in sources)
    if kept is not None and count:
        said = f"the footprints of {count:,} of {len(sources):,} files are kept"
        typer.echo(f"{said} in {kept.folder}: the same command goes on from there", err=True)
    elif kept is not None:
        kept.leave()


def _here(job: building.Job, sources: Sequence[Source], reducing: Reducing, wanted: bool | None) -> Footprint:
    """In this process, with a bar for each file."""
    with bar("counting", wanted) as move:
        following = building.Progress(len(sources), 0)

        def reduce(source: Source, piece: object = None) -> Footprint:
            number = following.files_done + 1
            beside = f" of file {number} of {len(sources)}" if len(sources) > 1 else ""
            return reducing.followed(source, move, beside)

        job = building.Job(reduce, job.level, job.by, job.how, job.partials)
        return building.here(job, sources, following)


def _cluster(job: building.Job, sources: Sequence[Source], address: str, wanted: bool | None) -> Footprint:
    """By the workers of a cluster, with one bar for all."""
    from scale.cluster import cluster

    began = time.monotonic()
    with bar("counting", wanted) as move, cluster(address) as ray:
        from scale import on_ray

        following = building.Progress(len(sources), sum(source.size for source in sources))

        def tell(now: building.Progress) -> None:
            rate = now.records / (time.monotonic() - began) / 1e6
            done = f"{now.files_done:,} of {now.files:,} files, {now.records:,} records, {rate:.1f} M/s"
            move(now.size_done / now.size if now.size else 1.0, done=done)

        following.told = tell
        found = on_ray.built(ray, job, sources, following)
    if not following.kept:
        said = "the nodes of the cluster do not see it, or may not write there"
        typer.echo(f"partial results were not kept in {job.partials}: {said} (--partials)", err=True)
    return found


def costs(
    footprint: Footprint, question: Question, policies: Sequence[Protection], address: str, move: Move
) -> list[Cost]:
    """What policies cost, asked by the workers of a cluster. Raises Failure."""
    from scale.cluster import cluster

    with scale_told(), cluster(address) as ray:
        from scale import spread

        return spread.costs(ray, footprint, question, policies, lambda share: move(share, done="policies asked"))
