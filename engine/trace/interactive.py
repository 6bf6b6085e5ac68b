"""An interactive replay: pauses at what ``stop`` would stop at, is published, goes on when somebody has said how.

Each stretch between two pauses is a change of its own, on the state that the machine has by then: bitmaps, protections
and tables may have changed meanwhile. Totals and exit records span all stretches. What an answer does is what the
kernel does under the ``on_violation`` of that name, so that always answering the same comes to the same totals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.arch.sppt import SUBPAGE_SHIFT
from engine.cpu.frames import Machine
from engine.cpu.memory_slots import space_of_record
from engine.errors import LimitExceeded
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm import vcpu_run
from engine.kvm.granted_subpages import grant_touched
from engine.state.config import choices
from engine.state.frame_store import Draft
from engine.trace import object_hits, record_checks, replay
from engine.trace.addresses import frozen
from engine.trace.columns import TraceChunk
from engine.trace.option_names import ANSWERS, ASK
from engine.trace.results import ExitColumns, ObjectHits, Room, TraceResult
from engine.trace.session import COUNTED_ONCE, Replay, ReplayOptions, run_of

# Exit records find their objects by address. Where the objects change during a replay, the bits above an address
# (52 and up) number the set of objects that counted when the exit happened.
SET_SHIFT = 52
MAX_SETS = 1 << (63 - SET_SHIFT)


class Place(NamedTuple):
    """Where a replay paused: the chunk, the index of its first record, the position of the record in it."""

    chunk: TraceChunk
    base: int
    position: int

    @property
    def record(self) -> int:
        """Index of the record in the trace."""
        return self.base + self.position

    @property
    def words(self) -> tuple[int, int]:
        """The two words of the record."""
        return self.chunk.at(self.position)


class Load(NamedTuple):
    """A MOV to CR3: index of its record, the id of the vCPU, and the operand as it is recorded."""

    record: int
    vcpu: int
    operand: int


class InteractiveReplay(Replay):
    """An interactive replay. ``feed`` returns False at a pause too: ``asked`` is then the exit that is asked about.

    Publish it, have the answer, take it on with ``go_on`` on a change of the machine as it is by then, and ``answer``.
    """

    def __init__(
        self,
        draft: Draft,
        options: ReplayOptions,
        targets: object_hits.Targets,
        before: Callable[[TraceChunk], None] | None = None,
    ) -> None:
        super().__init__(draft, options, targets, before)
        self._place: Place | None = None
        # What ``answer`` has left of a chunk: the chunk, the index of its first record, and the position to go on at.
        self._left: Place | None = None
        self._counted = np.zeros_like(self.tally)
        self._sets = [targets]
        self._set = 0
        self._gone: dict[str, ObjectHits] = {}
        self._changed = False
        self._ended_in = res.VIOLATION
        # Whether a grant has made an access run again.
        self.attempted = False

    # The pause

    # A load of CR3 that is asked about in place of an exit: see ``trace.interactive_timed``.
    load: Load | None = None

    def _stop(self, chunk: TraceChunk, base: int, position: int) -> None:
        self._place = Place(chunk, int(base), int(position))
        self._ended_in = self._ending()

    @property
    def paused_at(self) -> int | None:
        """Index of the record that is asked about; None unless the replay has paused."""
        return self._place.record if self._place is not None else None

    @property
    def timed(self) -> bool:
        """Whether the chunk in which it has paused has operations."""
        return self._place is not None and self._place.chunk.operations is not None

    @property
    def asked(self) -> ExitColumns:
        """The one exit that is asked about."""
        assert self._place is not None
        last = int(self._used[0]) - 1
        return super()._columns(self._log[last : last + 1], self._place.chunk, self._place.base)

    def uncounted(self) -> NDArray[np.int64]:
        added = self.tally - self._counted
        self._counted[:] = self.tally
        return added

    def go_on(
        self, draft: Draft, targets: object_hits.Targets, before: Callable[[TraceChunk], None] | None = None
    ) -> None:
        """The answer is coming, or more of the trace: take on the machine as it is now."""
        # Drafts begin from what was published: the very same arrays unless somebody else changed something.
        self._changed = draft.base is not self._draft.machine
        self._draft, self._before = draft, before
        if self._tables is not None and self._changed:
            self._tables.forget()
        if targets is not self._targets:
            self._take_objects(targets)
        place = self._place or self._left
        if before is not None and place is not None:
            before(place.chunk)

    # The answer

    def answer(self, action: str, most: int | None = None, value: int | None = None) -> bool:
        """Do to the access what was answered and replay the rest of its chunk, or its next ``most`` records. ``value``
        is what ``allow`` loads in place of what is recorded, where a load is asked about.

        False: the replay ends there, or has paused again. Raises InvalidValue for what is no answer.
        """
        if action not in ANSWERS:
            choices(action, ANSWERS, "action")
        place = self._place
        assert place is not None
        if action == "stop":
            self._place = None
            super()._stop(*place)
            return False
        if action == "retry":
            # The guest runs the instruction again: what exits again counts again, for objects as in the totals.
            self._drain(place.chunk, place.base)
            self._seen.fill(-1)
            self._touched.fill(-1)
            return self._run_on(place, 0, most)
        gpa, word = self._accessed(place)
        writes = word >> 16 & acc.ACCESS_MASK == acc.WRITE
        with self._aimed(place.base, place.position, word & 0xFFFF):
            if action == "grant" and writes and (self._grants(gpa, word) or self._changed):
                self._attempt(place)
            else:
                if action == "allow" and writes:
                    self._land(gpa, word)
                self.tally[reg.RECORDS] += 1
                self.tally[reg.WRITES] += writes
        return self._run_on(place, 1, most)

    def _accessed(self, place: Place) -> tuple[int, int]:
        """GPA of the first byte of the access that is asked about, and the second word of its record."""
        return place.words

    def _run_on(self, place: Place, past: int, most: int | None) -> bool:
        """Go on at a place or so many records past it, for ``most`` records."""
        self._place = None
        begin = place.position + past
        end = None if most is None else begin + most
        going = self._run(place.chunk, place.base, begin, end)
        if going and end is not None and end < len(place.chunk):
            self._left = place._replace(position=end)
        return going

    def finish_chunk(self) -> bool:
        """Replay what ``answer`` has left of its chunk. False as there."""
        left, self._left = self._left, None
        return left is None or self._run(left.chunk, left.base, left.position)

    def _ready(self) -> Machine:
        self._draft.ensure()
        return self._draft.machine

    def _land(self, gpa: int, word: int) -> None:
        """Tell the dirty logs of a write that lands though it was refused."""
        if self._ended_in == res.VIOLATION:
            m = self._ready()
            host = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK == acc.HOST
            space = 0 if host else space_of_record(m, int(m.vcpu_of_id[word >> 32 & 0xFFFF]))
            replay.note_landing(m, gpa | space, word & 0xFFFF)

    def _ending(self) -> int:
        """How the last exit of the log ended."""
        return int(self._log[int(self._used[0]) - 1, vcpu_run.EXIT_REASON]) >> 16 & 0xFF

    def _grants(self, gpa: int, word: int) -> bool:
        granted = bool(grant_touched(self._ready(), gpa, word & 0xFFFF, self._trail))
        self.tally[reg.GRANTS] += granted
        return granted

    def _attempt(self, place: Place) -> None:
        """Run the access again after a grant: one that is refused once more is not a second violation."""
        self.attempted = True
        before = self.tally.copy()
        listed = self._run_one(place)
        for counter in COUNTED_ONCE:
            self.tally[counter] = before[counter]
        ending = self._ending() if listed else res.COMPLETED
        hidden = not self._words[replay.OPTION_LIST_ALL] and ending in (res.VIOLATION, res.INTERNAL_ERROR)
        if hidden or ending == res.RUN_FAILED:
            self._used[0] -= 1

    def _run_one(self, place: Place) -> bool:
        """Run one record as ``skip`` does; whether that listed exits."""
        chunk, at = place.chunk, place.position
        run = run_of(chunk, at, at + 1)
        gvas = self._no_gva if chunk.gva is None else frozen(chunk.gva[at : at + 1])
        options = self._words.copy()
        options[replay.OPTION_ON_VIOLATION] = replay.SKIP
        while True:
            listed = int(self._used[0])
            status, _ = replay.replay(
                self._draft.machine,
                run,
                gvas,
                0,
                place.record,
                options,
                self._trail,
                self._log,
                self._used,
                self.tally,
            )
            if status == replay.NEED_FRAMES:
                self._draft.ensure()
            elif status == replay.LOG_FULL:
                self._drain(chunk, place.base)
            elif status == record_checks.DONE:
                return int(self._used[0]) > listed
            else:
                self._refuse_in(chunk, status, run, 0, place.record)

    # Objects that come and go

    def _take_objects(self, targets: object_hits.Targets) -> None:
        """From here on these objects count; what was counted for one by name goes on to count for it."""
        place = self._place
        self._drain() if place is None else self._drain(place.chunk, place.base)
        before, hits, seen, touched = self._by_object(), self._hits, self._seen, self._touched
        position = {name: at for at, name in enumerate(self._targets.names)}
        self._aim(targets)
        for at, name in enumerate(targets.names):
            if name in position:
                was = position[name]
                self._hits[at], self._seen[at], self._touched[at] = hits[was], seen[was], touched[was]
            elif name in self._gone:
                known = self._gone[name]
                first = -1 if known.first_index is None else known.first_index
                self._hits[at] = known.violations, known.collateral, first
        self._gone = {name: hit for name, hit in before.items() if name not in targets.names}
        self._set = self._set_of(targets)

    def _set_of(self, targets: object_hits.Targets) -> int:
        for number, known in enumerate(self._sets):
            if known.names == targets.names and np.array_equal(known.index.ranges, targets.index.ranges):
                return number
        if len(self._sets) == MAX_SETS:
            rule = f"protections have up to {MAX_SETS} states in the course of an interactive replay"
            raise LimitExceeded(rule, field="on_violation", value=ASK)
        self._sets.append(targets)
        return len(self._sets) - 1

    def _by_object(self) -> dict[str, ObjectHits]:
        return {**self._gone, **super()._by_object()}

    def _columns(
        self, log: NDArray[np.int64], chunk: TraceChunk | None, base: int, room: Room | None = None
    ) -> ExitColumns:
        found = super()._columns(log, chunk, base, room)
        if self._set:
            above = np.uint64(self._set << SET_SHIFT)
            places = found.scattered._replace(gpa=found.scattered.gpa | above)
            found = replace(found, record_gpa=found.record_gpa | above, scattered=places)
        return found

    def result(self) -> TraceResult:
        """Totals and exit records of all stretches."""
        found = super().result()
        if len(self._sets) == 1:
            return found
        index, names = _united(self._sets)
        columns = replace(found.exit_columns, object_index=index, object_names=names)
        return replace(found, exit_columns=columns)


def _united(sets: Sequence[object_hits.Targets]) -> tuple[object_hits.ObjectIndex, tuple[str, ...]]:
    """One index for several sets of objects, each at its number above the addresses, and the names of all."""
    names = tuple(dict.fromkeys(name for known in sets for name in known.names))
    position = {name: at for at, name in enumerate(names)}
    parts = [np.zeros((0, 5), dtype=np.int64)]
    for number, known in enumerate(sets):
        ranges = known.index.ranges.copy()
        ranges[:, :2] += number << SET_SHIFT
        ranges[:, 3:] += number << SET_SHIFT - SUBPAGE_SHIFT
        ranges[:, 2] = [position[known.names[at]] for at in ranges[:, 2].tolist()]
        parts.append(ranges)
    return object_hits.index_of(np.concatenate(parts)), names
