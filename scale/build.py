"""A footprint of many files: each reduced to its own, and these added up in a tree. Here, or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import EngineError
from engine.footprint.combine import merge
from engine.footprint.places import By, Footprint
from scale.errors import ScaleError
from scale.groups import SPLIT_BYTES, Piece
from scale.partials import Partials, name_of
from scale.sources import Source, check_unchanged
from scale.tree import Tree


class Reduce(Protocol):
    """What reduces a file, or a piece of it. It is sent to the workers. Raises ScaleError."""

    def __call__(self, source: Source, piece: Piece | None = None, /) -> Footprint: ...


@dataclass(frozen=True)
class Job:
    """What is made: footprints of a ``level`` and ``by``, each file's by ``reduce``, whose outcome depends on ``how``
    beside the file. They are kept in ``partials``, if that is somewhere. Parquet files above ``split`` bytes are taken
    apart on a cluster if ``in_pieces``."""

    reduce: Reduce
    level: str
    by: By
    how: str
    partials: str | None = None
    in_pieces: bool = True
    split: int = SPLIT_BYTES

    def name(self, source: Source, part: str = "") -> str:
        """Of a partial."""
        return name_of(source, f"{self.level} {tuple(self.by)} {self.how}", part)

    @property
    def kept(self) -> Partials | None:
        return None if self.partials is None else Partials(self.partials, self.level, self.by)


@dataclass(frozen=True)
class Done:
    """What is known of a footprint that a worker has."""

    records: int
    places: int
    found: bool = False  # it was there already
    kept: bool = True  # or could be kept


@dataclass
class Progress:
    """How far it is: files, bytes of them, records. ``kept`` is False when partial results could not be kept."""

    files: int
    size: int
    files_done: int = 0
    size_done: int = 0
    records: int = 0
    found: int = 0
    kept: bool = True
    told: Callable[[Progress], object] = field(default=lambda progress: None, repr=False)

    def count(self, source: Source, done: Done) -> None:
        """A file is done."""
        self.files_done += 1
        self.size_done += source.size
        self.records += done.records
        self.found += done.found
        self.kept &= done.kept
        self.told(self)


def leaf(job: Job, source: Source, piece: Piece | None = None) -> tuple[Footprint, Done]:
    """The footprint of a file or of a piece: the one that was kept, or made now. Raises ScaleError."""
    kept = job.kept
    name = job.name(source, "" if piece is None else f"{tuple(piece)}")
    found = None if kept is None else kept.read(name)
    if found is not None:
        return found, Done(found.records, len(found), found=True)
    made = job.reduce(source, piece)
    if kept is not None:
        check_unchanged(source)
    return made, Done(made.records, len(made), kept=kept is None or kept.write(name, made))


def added(footprints: Sequence[Footprint]) -> Footprint:
    """All of them as one. Raises ScaleError."""
    try:
        return merge(footprints)
    except EngineError as error:
        raise ScaleError(f"the footprints cannot be added up: {error.field}: {error.rule}") from None


def here(job: Job, sources: Sequence[Source], progress: Progress) -> Footprint:
    """In this process. Raises ScaleError, and what ``reduce`` does."""
    if job.kept is not None:
        job.kept.make()
    tree = Tree(added)
    for source in sources:
        footprint, done = leaf(job, source)
        tree.add(footprint)
        progress.count(source, done)
    found = tree.close()
    assert found is not None
    return found
