"""Where a machine's frames are kept: published state that readers share, and one change at a time on top of it.

A change copies the maps (a few bytes a frame) and, as it goes, the frames it writes. Publishing it swaps one
reference; giving it up forgets the copies. A row that a newer state replaced is used again only when no reader holds
a state that still shows it.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.cpu import frames, memory_files, tlb
from engine.cpu.fastpath import CACHE_WORDS, EMPTY
from engine.cpu.frames import CAP_RESERVE, FREE, TOP_FREE, TOP_SPARE, WORDS, Machine
from engine.cpu.memory_slots import SLOT_WORDS
from engine.errors import LimitExceeded

FIRST_FRAMES = 64
# Rows that are reserved at one time: 16 GiB of addresses.
_MOST_RESERVED = 1 << 22

_EMPTY_CACHE = np.full(CACHE_WORDS, EMPTY, dtype=np.int64)
_NO_PLACES = np.full(frames.MOST_PAGES, frames.NO_PLACE, dtype=np.int64)

T = TypeVar("T", bound=np.generic)


# Rows that are copied at one time when a store gets its own.
_COPIED_ROWS = 1 << 12


class Loan:
    """Rows of one store that the first state of another shows, too: ``shown`` bool[rows] of the array ``rows``. Their
    owner writes none of them while somebody holds the loan."""

    __slots__ = ("__weakref__", "rows", "shown")

    def __init__(self, machine: Machine) -> None:
        self.rows = machine.rows
        self.shown: NDArray[np.bool_] = np.zeros(len(machine.rows), dtype=np.bool_)
        self.shown[machine.row_of[machine.row_of >= 0]] = True


class Snapshot:
    """One published state: a Machine whose maps nobody writes any more; with ``loan`` its rows are another store's."""

    __slots__ = ("__weakref__", "loan", "machine")

    def __init__(self, machine: Machine, loan: Loan | None = None) -> None:
        self.machine = machine
        self.loan = loan


class FrameStore:
    """Rows, the published snapshot, and the growth of both."""

    def __init__(
        self, caps: NDArray[np.int64], vcpu_of_id: NDArray[np.int64], limit: int, *, vcpus: int, modelled: bool = False
    ) -> None:
        self.limit = limit
        # Held by whoever makes a twin and works with it: of one machine there is one copy at a time.
        self.twinning = threading.Lock()
        self.spare: NDArray[np.int64] = np.arange(FIRST_FRAMES - 1, -1, -1, dtype=np.int64)
        self._retired: deque[tuple[weakref.ref[Snapshot], NDArray[np.int64]]] = deque()
        # What clones have borrowed, and rows that would be spare but for that.
        self._lending = threading.Lock()
        self._loans: list[weakref.ref[Loan]] = []
        self._waiting: list[tuple[weakref.ref[Loan], NDArray[np.int64]]] = []
        empty = np.zeros(0, dtype=np.int64)
        self.published = Snapshot(
            Machine(
                rows=np.zeros((FIRST_FRAMES, WORDS), dtype=np.int64),
                row_of=np.full(0, -1, dtype=np.int64),
                fresh=np.zeros(0, dtype=np.uint8),
                kind=np.zeros(0, dtype=np.uint8),
                free=np.zeros(0, dtype=np.int64),
                spare=np.zeros(0, dtype=np.int64),
                top=np.zeros(2, dtype=np.int64),
                caps=caps,
                vcpu_of_id=vcpu_of_id,
                slots=empty.reshape(0, SLOT_WORDS),
                cache=np.full(CACHE_WORDS, EMPTY, dtype=np.int64),
                tlb=tlb.new_table() if modelled else tlb.no_table(),
                queues=np.zeros((vcpus, 2, frames.QUEUE_WORDS), dtype=np.int64),
                places=_NO_PLACES.copy(),
                lost=np.zeros(1, dtype=np.int64),
            )
        )

    def adopt(self, blocks: Mapping[int, tuple[int, bytes]], total: int, places: range = range(0)) -> None:
        """Take over frames from their durable form: frame number to (kind, 4096 bytes); ``total`` frames in all, of
        which ``places`` are kept (see ``Draft.keep_places``)."""
        rows = np.zeros((max(len(blocks), 1), WORDS), dtype=np.int64)
        row_of = np.full(total, -1, dtype=np.int64)
        kind = np.full(total, FREE, dtype=np.uint8)
        for row, (frame, (frame_kind, data)) in enumerate(sorted(blocks.items())):
            rows[row] = np.frombuffer(data, dtype=np.int64)
            row_of[frame] = row
            kind[frame] = frame_kind
        idle = row_of < 0
        idle[places.start : places.stop] = False
        free = np.flatnonzero(idle)[::-1].astype(np.int64)
        stack = np.zeros(total, dtype=np.int64)
        stack[: len(free)] = free
        self.spare = np.zeros(0, dtype=np.int64)
        self.published = Snapshot(
            self.published.machine.replaced(
                rows=rows,
                row_of=row_of,
                fresh=np.zeros(total, dtype=np.uint8),
                kind=kind,
                free=stack,
                top=np.array([len(free), 0], dtype=np.int64),
            )
        )

    def twin(self, snapshot: Snapshot) -> FrameStore:
        """A store of its own that begins with what ``snapshot`` shows, for changes that nobody is to see.

        It costs a copy of every frame in use, and no lock: whatever is under way here goes on.
        """
        machine = snapshot.machine
        used = np.flatnonzero(machine.row_of >= 0)
        rows = np.empty((len(used) + int(machine.caps[CAP_RESERVE]), WORDS), dtype=np.int64)
        rows[: len(used)] = machine.rows[machine.row_of[used]]
        row_of = np.full(len(machine.row_of), -1, dtype=np.int64)
        row_of[used] = np.arange(len(used))
        return self._another(
            Snapshot(machine.replaced(rows=rows, row_of=row_of)), np.arange(len(used), len(rows), dtype=np.int64)
        )

    def lend(self, snapshot: Snapshot) -> FrameStore:
        """A store of its own that begins with what ``snapshot`` shows, in the rows of this one; the caller holds the
        snapshot meanwhile. It copies them when it is first to be written (``own``); changes here go to other rows."""
        loan = snapshot.loan
        if loan is None:
            loan = Loan(snapshot.machine)
            with self._lending:
                self._loans.append(weakref.ref(loan))
        return self._another(Snapshot(snapshot.machine, loan), np.zeros(0, dtype=np.int64))

    def _another(self, published: Snapshot, spare: NDArray[np.int64]) -> FrameStore:
        other = copy.copy(self)
        other.twinning, other._lending = threading.Lock(), threading.Lock()
        other.spare, other.published = spare, published
        other._retired, other._loans, other._waiting = deque(), [], []
        return other

    def own(self) -> None:
        """Publish the same state in rows of our own where they are borrowed: each frame keeps the number of its row."""
        loan, machine = self.published.loan, self.published.machine
        if loan is None:
            return
        rows = np.empty_like(machine.rows)
        for at in range(0, len(rows), _COPIED_ROWS):
            shown = loan.shown[at : at + _COPIED_ROWS]
            rows[at : at + _COPIED_ROWS][shown] = machine.rows[at : at + _COPIED_ROWS][shown]
        self.spare = np.flatnonzero(~loan.shown)[::-1]
        self.published = Snapshot(machine.replaced(rows=rows))

    def begin(self, slots: NDArray[np.int64]) -> Draft:
        """A change on top of the published state."""
        return Draft(self, slots)

    def reclaim(self) -> None:
        """Use the rows again that no reader can see any more."""
        freed = []
        while self._retired and self._retired[0][0]() is None:
            freed.append(self._retired.popleft()[1])
        freed = self._not_lent(freed)
        if freed:
            self.spare = np.concatenate([self.spare, *freed])

    def _not_lent(self, freed: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Of rows that no reader can see any more those that no clone shows, either; the others wait for its change."""
        if not self._loans and not self._waiting:
            return freed
        rows = self.published.machine.rows
        with self._lending:
            self._loans = [reference for reference in self._loans if reference() is not None]
            known = [(reference, loan) for reference in self._loans if (loan := reference()) and loan.rows is rows]
        live = {reference for reference, _ in known}
        waiting, self._waiting = self._waiting, []
        for reference, held in waiting:
            if reference in live:
                self._waiting.append((reference, held))
            else:
                freed.append(held)
        for reference, loan in known:
            for at, part in enumerate(freed):
                lent = loan.shown[part]
                if lent.any():
                    self._waiting.append((reference, part[lent]))
                    freed[at] = part[~lent]
        return freed

    def publish(self, draft: Draft) -> None:
        """Make a draft the published state. Raises LimitExceeded if it has more frames than the machine may have."""
        draft.check()
        assert min(draft.machine.top.tolist()) >= 0, "a change took more frames than it had asked for"
        before = self.published
        old = before.machine.row_of
        replaced = np.empty(len(old), dtype=np.int64)
        gone, come = frames.settle(draft.machine, old, replaced)
        self.spare = draft.spare_rows()
        if come < len(draft.taken_rows()):
            self.spare = np.concatenate([self.spare, draft.unused_rows()])
        self.published = Snapshot(draft.machine)
        self._retired.append((weakref.ref(before), replaced[:gone].copy()))

    def revert(self, snapshot: Snapshot) -> None:
        """Make an earlier state the published one again: one that somebody has held since it was published.

        What was published after it is forgotten. Being held, it kept the rows that it shows from being used again.
        """
        now = self.published
        if now is snapshot:
            return
        if snapshot.loan is not None:
            # The first state of a clone: all that it has written is in rows of its own.
            self._retired.clear()
            self.spare, self.published = np.zeros(0, dtype=np.int64), snapshot
            return
        while self._retired[-1][0]() is not snapshot:
            self._retired.pop()
        self._retired.pop()
        machine = snapshot.machine
        idle = np.ones(len(machine.rows), dtype=bool)
        idle[machine.row_of[machine.row_of >= 0]] = False
        for _, rows in self._retired:
            idle[rows] = False
        if now.machine.rows is machine.rows:
            # Whoever still looks at the state that goes keeps its rows until then.
            shown = now.machine.row_of[now.machine.row_of >= 0]
            late = shown[idle[shown]]
            idle[late] = False
            self._retired.append((weakref.ref(now), late))
        self.published = snapshot
        self._waiting = []
        self.spare = np.concatenate(self._not_lent([np.flatnonzero(idle)]))

    def abandon(self, draft: Draft) -> None:
        """Forget a draft. It wrote in rows that are spare, or in rows of its own growth: nothing is to be undone.

        The traceback of what ended it may hold the draft for long. What it had grown to is given back now.
        """
        draft.machine = draft.base


class Draft:
    """A change under way: ``machine`` is what its kernels read and write."""

    def __init__(self, store: FrameStore, slots: NDArray[np.int64]) -> None:
        store.reclaim()
        base = store.published.machine
        self.store = store
        self.base = base
        # A machine that is beyond its limit already may change and shrink.
        self._most = max(store.limit, frames.in_use(base))
        self.machine = base.replaced(
            row_of=_copy(base.row_of),
            fresh=_copy(base.fresh),
            kind=_copy(base.kind),
            free=_copy(base.free),
            spare=_copy(store.spare),
            top=np.array([base.top[TOP_FREE], len(store.spare)], dtype=np.int64),
            slots=slots,
            cache=_copy(_EMPTY_CACHE),
            tlb=base.tlb.copy(),
            queues=base.queues.copy(),
            places=_copy(_NO_PLACES),
            lost=np.zeros(1, dtype=np.int64),
        )
        self.ensure()

    def ensure(self, more: int = 0) -> None:
        """Grow until one access, and ``more`` frames, can be served. Raises LimitExceeded beyond the machine's limit.

        Kernels come back here when what is left is less than that, and so many frames they can be beyond it meanwhile.
        """
        self.check()
        m = self.machine
        frames_needed = int(m.caps[CAP_RESERVE]) + more
        if m.top[TOP_FREE] < frames_needed:
            self._grow_frames(frames_needed)
        if m.top[TOP_SPARE] < frames_needed:
            self._grow_rows(frames_needed)

    def reserve(self) -> None:
        """Have rows for as many frames as the machine may have, so that a large change does not copy it as it grows.

        Each that the change writes takes a row, those that there are already, too. Rows that nobody writes cost
        addresses and no memory; ``trim`` gives them back.
        """
        needed = min(self._most, _MOST_RESERVED) + int(self.machine.caps[CAP_RESERVE])
        # The host may refuse so much: then the machine grows step by step.
        with suppress(MemoryError):
            self._grow_rows(needed)

    def trim(self) -> None:
        """Give the rows at the end back that were never written, but for those of one access."""
        m = self.machine
        total, height = len(m.rows), int(m.top[TOP_SPARE])
        # They are the first to be put down and the last to be taken.
        last = m.spare[:height] == np.arange(total - 1, total - 1 - height, -1)
        unused = height if last.all() else int(np.argmin(last))
        gone = max(0, min(unused, height - int(m.caps[CAP_RESERVE])))
        top = m.top.copy()
        top[TOP_SPARE] = height - gone
        self.machine = m.replaced(rows=m.rows[: total - gone], spare=m.spare[gone:], top=top)

    def check(self) -> None:
        """Raise LimitExceeded if more frames are in use than the machine may have, Conflict if the file behind a slot
        had not what was read of it."""
        memory_files.check(self.machine)
        used = frames.in_use(self.machine)
        if used > self._most:
            rule = f"a machine has {self.store.limit} table frames at most"
            raise LimitExceeded(rule, field="max_table_frames", value=used)

    def keep_places(self, count: int) -> None:
        """Keep the numbers of the next frames for what comes later: they are not free from now on, and not in use."""
        needed = int(self.machine.caps[CAP_RESERVE]) + count
        if self.machine.top[TOP_FREE] < needed:
            self._grow_frames(needed)
        self.machine.top[TOP_FREE] -= count

    def _grow_frames(self, needed: int) -> None:
        m = self.machine
        have = len(m.row_of)
        most = self._most + int(m.caps[frames.CAP_PLACES]) + needed
        total = max(FIRST_FRAMES, min(have + max(needed, have // 2), most))
        added = np.arange(total - 1, have - 1, -1, dtype=np.int64)
        free = np.zeros(total, dtype=np.int64)
        height = int(m.top[TOP_FREE])
        free[: len(added)] = added
        free[len(added) : len(added) + height] = m.free[:height]
        top = m.top.copy()
        top[TOP_FREE] = height + len(added)
        self.machine = m.replaced(
            row_of=_extended(m.row_of, total, -1),
            fresh=_extended(m.fresh, total, 0),
            kind=_extended(m.kind, total, int(FREE)),
            free=free,
            top=top,
        )

    def _grow_rows(self, needed: int) -> None:
        m = self.machine
        have = m.rows.shape[0]
        total = have + max(needed, have // 2)
        rows = np.empty((total, WORDS), dtype=np.int64)
        rows[:have] = m.rows
        added = np.arange(total - 1, have - 1, -1, dtype=np.int64)
        height = int(m.top[TOP_SPARE])
        top = m.top.copy()
        top[TOP_SPARE] = len(added) + height
        self.machine = m.replaced(rows=rows, spare=np.concatenate([added, m.spare]), top=top)

    def spare_rows(self) -> NDArray[np.int64]:
        """Rows this change has not taken."""
        return self.machine.spare[: int(self.machine.top[TOP_SPARE])]

    def taken_rows(self) -> NDArray[np.int64]:
        """Rows this change has taken."""
        return self.machine.spare[int(self.machine.top[TOP_SPARE]) :]

    def unused_rows(self) -> NDArray[np.int64]:
        """Rows this change has taken for frames that it freed again."""
        return np.setdiff1d(self.taken_rows(), self.machine.row_of[self.changed()])

    def changed(self) -> NDArray[np.int64]:
        """Frames whose row is not the published one."""
        now = self.machine.row_of
        differs = np.ones(len(now), dtype=bool)
        differs[: len(self.base.row_of)] = now[: len(self.base.row_of)] != self.base.row_of
        return np.flatnonzero(differs & (now >= 0))


def _copy(array: NDArray[T]) -> NDArray[T]:
    """A copy made without giving up the GIL, as numpy does for more than 500 items: a change is too short for that."""
    made = np.empty_like(array)
    made.data[:] = array.data
    return made


def _extended(array: NDArray[T], total: int, value: int) -> NDArray[T]:
    result = np.full(total, value, dtype=array.dtype)
    result[: len(array)] = array
    return result


def blocks_of(machine: Machine, since: Machine | None) -> Iterator[tuple[int, int, bytes]]:
    """(frame, kind, 4096 bytes) of every frame that differs from an earlier state; freed frames come with kind 0."""
    before = np.full(len(machine.row_of), -1, dtype=np.int64)
    if since is not None:
        shared = min(len(before), len(since.row_of))
        before[:shared] = since.row_of[:shared]
    for frame in np.flatnonzero(machine.row_of != before).tolist():
        row = int(machine.row_of[frame])
        if row < 0:
            yield frame, int(FREE), bytes(frames.FRAME_SIZE)
        else:
            yield frame, int(machine.kind[frame]), machine.rows[row].tobytes()
