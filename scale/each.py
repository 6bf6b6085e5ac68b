"""Work on files, each alone, in this process or by the workers of a cluster: a document for each file and item.

What comes of one depends on nothing but its file and its item, so who did it, in what order, and what was lost
meanwhile make no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from scale.partials import Documents, hash_of
from scale.sources import Source, check_unchanged
from scale.under_way import UnderWay

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

Document = dict[str, Any]


class Do(Protocol[T_contra]):
    """What is done with a file and an item. It is sent to the workers. Raises ScaleError."""

    def __call__(self, source: Source, item: T_contra, /) -> Document: ...


@dataclass(frozen=True)
class Work(Generic[T]):
    """``do`` for each file and item, whose outcome depends on ``how`` beside these. Documents are kept in ``partials``,
    if that is somewhere."""

    do: Do[T]
    how: str
    partials: str | None = None

    def of(self, source: Source, about: str) -> list[Any]:
        """Everything that a document depends on, where ``about`` tells the item from others."""
        return [list(source), self.how, about]

    def name(self, source: Source, about: str) -> str:
        """Of a partial."""
        return hash_of(*self.of(source, about)) + Documents.suffix

    @property
    def kept(self) -> Documents | None:
        return None if self.partials is None else Documents(self.partials)


class Task(NamedTuple, Generic[T]):
    """One file and one item."""

    source: Source
    item: T
    about: str


class Made(NamedTuple):
    """What came of a task."""

    document: Document
    found: bool  # it was there already
    kept: bool  # or could be kept


@dataclass
class Progress:
    """How far it is. ``kept`` is False when partial results could not be kept."""

    total: int
    done: int = 0
    found: int = 0
    kept: bool = True
    told: Callable[[Progress, Document], object] = field(default=lambda progress, document: None, repr=False)

    def count(self, made: Made) -> Document:
        """One is done; the document of it."""
        self.done += 1
        self.found += made.found
        self.kept &= made.kept
        self.told(self, made.document)
        return made.document


def leaf(work: Work[T], task: Task[T]) -> Made:
    """The document of a task: the one that was kept, or made now. Raises ScaleError."""
    kept = work.kept
    of, name = work.of(task.source, task.about), work.name(task.source, task.about)
    found = None if kept is None else kept.read(name, of)
    if found is not None:
        return Made(found, found=True, kept=True)
    document = work.do(task.source, task.item)
    if kept is not None:
        check_unchanged(task.source)
    return Made(document, found=False, kept=kept is None or kept.write(name, of, document))


def here(work: Work[T], tasks: Sequence[Task[T]], progress: Progress) -> list[Document]:
    """All documents, in the order of the tasks, by this process. Raises ScaleError, and what ``do`` does."""
    if work.kept is not None:
        work.kept.make()
    return [progress.count(leaf(work, task)) for task in tasks]


def on_ray(ray: Any, work: Work[T], tasks: Sequence[Task[T]], progress: Progress) -> list[Document]:
    """The same by the workers of a cluster. ``ray`` is connected. Raises ScaleError."""
    from scale.tasks import each  # noqa: PLC0415 - needs Ray

    if work.kept is not None:
        work.kept.make()
    sent = ray.put(work)
    items = _sent_once(ray, tasks)
    found: list[Document | None] = [None] * len(tasks)
    under_way = UnderWay(ray)

    def take(at: int, made: Made) -> None:
        found[at] = progress.count(made)

    waiting: Iterator[tuple[int, Task[T]]] = iter(enumerate(tasks))
    try:
        while True:
            while under_way.has_room() and (following := next(waiting, None)) is not None:
                at, (source, _, about) = following
                under_way.follow(each.remote(sent, source, items[about], about), source.name, partial(take, at))
            if not under_way:
                return [document for document in found if document is not None]
            under_way.settle()
    except BaseException:
        under_way.cancel()
        raise


def _sent_once(ray: Any, tasks: Sequence[Task[T]]) -> dict[str, Any]:
    """References to the items, each of which is in the object store once."""
    items = {task.about: task.item for task in tasks}
    return {about: ray.put(item) for about, item in items.items()}
