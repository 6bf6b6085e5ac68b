"""The same as ``build.here``, by the workers of a cluster: equal to the byte, whoever did what, and whoever was lost.

Of each file a task makes a footprint, which stays in the object store; the driver holds a reference. A lost worker's
tasks are begun again, and a lost object is made again by the tasks that made it. The driver has so many tasks under
way as the cluster can do at a time, and some more; and what the tree comes to at a height of HARVEST it takes out of
the cluster, so that neither references nor what Ray remembers about them grow with the number of files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from engine.footprint.places import Footprint
from scale.build import Done, Job, Progress, added
from scale.groups import Piece, Whole
from scale.sources import Source
from scale.tree import Tree, rounds
from scale.under_way import UnderWay

HARVEST = 3  # that of 512 files

# References to a footprint, and to what is said of it.
Made = tuple[Any, Any]


class Run:
    """One build. ``ray`` is connected."""

    def __init__(self, ray: Any, job: Job, progress: Progress) -> None:
        from scale import tasks  # noqa: PLC0415 - needs Ray

        self._tasks = tasks
        self._plain, self._job = job, ray.put(job)
        self._progress = progress
        self._under_way = UnderWay(ray)
        self._next: deque[Callable[[], None]] = deque()
        self._tree: Tree[Made] = Tree(self._together, HARVEST, self._take_out)
        self._harvested: Footprint | None = None

    def footprint(self, sources: Sequence[Source]) -> Footprint:
        """Raises ScaleError."""
        waiting = iter(sources)
        try:
            self._run(waiting)
            if (last := self._tree.close()) is not None:
                self._take_out(last)
            self._run(waiting)
        except BaseException:
            self._under_way.cancel()
            raise
        assert self._harvested is not None
        return self._harvested

    def _run(self, waiting: Iterator[Source]) -> None:
        while self._fill(waiting) or self._under_way:
            self._under_way.settle()

    def _fill(self, waiting: Iterator[Source]) -> bool:
        """Begin what there is room for; whether there is more to be done."""
        while self._under_way.has_room():
            if self._next:
                self._next.popleft()()
                continue
            source = next(waiting, None)
            if source is None:
                return False
            self._begin(source)
        return True

    def _begin(self, source: Source) -> None:
        if self._plain.in_pieces and source.size > self._plain.split:
            self._under_way.follow(
                self._tasks.planned.remote(self._job, source), source.name, lambda pieces: self._plan(source, pieces)
            )
        else:
            self._reduce(source)

    def _reduce(self, source: Source) -> None:
        found, said = self._tasks.reduced.remote(self._job, source, None)
        self._under_way.follow(said, source.name, lambda done: self._file_done(source, (found, said), done))

    def _plan(self, source: Source, pieces: Sequence[Piece]) -> None:
        """Have a file reduced whole, or piece by piece."""
        if not pieces:
            self._reduce(source)
            return
        made: list[Any] = [None] * len(pieces)
        left = [len(pieces) + 1]  # the last is the file as a whole
        known: list[Whole] = []

        def done() -> None:
            left[0] -= 1
            if not left[0]:
                self._finish(source, made, known[0])

        def begin_whole() -> None:
            def told(whole: Whole) -> None:
                known.append(whole)
                done()

            self._under_way.follow(self._tasks.whole.remote(source), source.name, told)

        def begin(at: int, piece: Piece) -> None:
            def told(_: Done) -> None:
                made[at] = found
                done()

            found, said = self._tasks.reduced.remote(self._job, source, piece)
            self._under_way.follow(said, source.name, told)

        self._next.append(begin_whole)
        self._next.extend(partial(begin, at, piece) for at, piece in enumerate(pieces))

    def _finish(self, source: Source, made: Sequence[Any], whole: Whole) -> None:
        (one,) = rounds(lambda refs: self._tasks.pieces_together.remote(*refs)[0], made)
        found, said = self._tasks.file_finished.remote(self._job, source, one, whole)
        self._under_way.follow(said, source.name, lambda done: self._file_done(source, (found, said), done))

    def _file_done(self, source: Source, made: Made, done: Done) -> None:
        self._progress.count(source, done)
        self._tree.add(made)

    def _together(self, made: Sequence[Made]) -> Made:
        found, said = self._tasks.together.remote(*(ref for ref, _ in made))
        return found, said

    def _take_out(self, made: Made) -> None:
        """Add what a part of the tree comes to, when it is there, to what there was before."""
        ref, said = made

        def add(_: Done) -> None:
            found: Footprint = self._under_way.said(ref, "the footprints")
            self._harvested = found if self._harvested is None else added([self._harvested, found])

        self._under_way.follow(said, "the footprints", add)


def built(ray: Any, job: Job, sources: Sequence[Source], progress: Progress) -> Footprint:
    """By the workers of a cluster. Raises ScaleError."""
    if job.kept is not None:
        job.kept.make()
    return Run(ray, job, progress).footprint(sources)
