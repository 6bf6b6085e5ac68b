"""One replay: chunks in, totals and exit records out, all of it one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.cpu.ept import MODE_VE, TRAIL_ROWS, mode_of
from engine.cpu.frames import NO_PLACE, STATE_FRAME, Machine
from engine.errors import InvalidValue, TraceError
from engine.kvm import state_frame as reg
from engine.kvm import vcpu_run
from engine.state.config import choices
from engine.state.frame_store import Draft
from engine.trace import guest_virtual, object_hits, record_checks, replay, scattered
from engine.trace.addresses import RULES, Addresses, GuestTables, frozen, refusal
from engine.trace.columns import TraceChunk
from engine.trace.gathered import Gathered
from engine.trace.option_names import ADDRESSES, ASK, INCLUDE, ON_VIOLATION
from engine.trace.results import ExitColumns, ObjectHits, Room, TraceResult, Untranslated, columns_of_log
from engine.trace.serving import Run

# Rows of the exit buffer: drained into columns when full, so a replay's memory is its kept exits and this.
LOG_ROWS = 1 << 13

# What the kernel does for each ``on_violation``: it stops where somebody is to be asked.
_DOES: dict[str, int] = {
    "skip": replay.SKIP,
    "stop": replay.STOP,
    "allow": replay.ALLOW,
    "grant": replay.GRANT,
    ASK: replay.STOP,
}

# What is counted once of a record that runs again because it was refused.
COUNTED_ONCE = (reg.VIOLATIONS, reg.PAGE_GRANULAR, reg.STALE_ACCESSES)

REFUSALS = {
    record_checks.BAD_SIZE: ("size", "must be at least one byte"),
    record_checks.BAD_ACCESS: ("access", "must be 0 read, 1 write or 2 execute"),
    record_checks.BAD_VCPU: ("vcpu", "must be the id of a vCPU of this machine: make it with as many as the trace has"),
    record_checks.BAD_ADDRESS: (
        "gpa",
        "must keep the access at or below guest-physical address 2^52; is it a virtual one (address=gva)?",
    ),
    record_checks.BAD_RESERVED: ("record", "must have zeros in its reserved bytes"),
    record_checks.BAD_KIND: ("kind", acc.KIND_RULE),
    record_checks.BAD_SOURCE: ("source", acc.SOURCE_RULE),
    record_checks.BAD_LINEAR: ("linear", acc.LINEAR_RULE),
    **RULES,
}

# How many records that do not translate are listed; totals count them all.
MOST_UNTRANSLATED = 100


_NO_GPAS = frozen(np.zeros(0, dtype=np.uint64))
_NO_SIZES = np.zeros(0, dtype=np.uint8)
_NO_SIZES.flags.writeable = False


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """How to replay.

    ``on_violation`` skip, stop, allow, grant or ask; ``start`` the first record to run (indices stay absolute);
    ``include`` which exits are listed, violations or all; ``max_exit_records`` how many are kept; ``carry`` trace
    columns that go into the exit records beside those that always do; ``circumstances`` (bits of
    ``arch.access.CIRCUMSTANCES``) those of every access; ``address`` what the addresses are (``trace.addresses``).
    With ``goes_on`` record 0 may be the one at which the machine stopped, as any other ``start`` may. With
    ``published`` it can be published between chunks (``trace.published``).
    """

    on_violation: str = "skip"
    start: int = 0
    include: str = "violations"
    max_exit_records: int = 10_000_000
    carry: tuple[str, ...] = ()
    circumstances: int = 0
    goes_on: bool = False
    address: str = "gpa"
    published: bool = False

    def validate(self) -> None:
        choices(self.on_violation, ON_VIOLATION, "on_violation")
        choices(self.address, ADDRESSES, "address")
        choices(self.include, INCLUDE, "include")
        if self.start < 0:
            raise InvalidValue("must not be negative", field="start", value=self.start)
        if self.max_exit_records < 0:
            raise InvalidValue("must not be negative", field="max_exit_records", value=self.max_exit_records)

    def words(self) -> NDArray[np.int64]:
        """The options as the kernel reads them."""
        kinds = False  # known of each chunk
        does, lists = _DOES[self.on_violation], self.include == "all"
        nowhere = replay.LISTED if self.address == "gva" else 0
        return np.array([does, lists, kinds, self.circumstances, nowhere], dtype=np.int64)


class Replay:
    """A replay under way. ``records_done`` may be read from other threads."""

    def __init__(
        self,
        draft: Draft,
        options: ReplayOptions,
        targets: object_hits.Targets,
        before: Callable[[TraceChunk], None] | None = None,
    ) -> None:
        self._draft = draft
        self._before = before
        self._options = options
        self._words = options.words()
        self._aim(targets)
        self._trail = np.zeros((TRAIL_ROWS, 4), dtype=np.int64)
        self._log = np.zeros((LOG_ROWS, vcpu_run.EXIT_WORDS), dtype=np.int64)
        self._used = np.zeros(1, dtype=np.int64)
        self._no_gva = frozen(np.zeros(0, dtype=np.uint64))
        self._exits = Gathered()
        self._kept = 0
        self._dropped = 0
        self._next = 0
        self._again = _stop_of(draft.machine) if options.goes_on or options.start else None
        self._has_gva = False
        self._addresses = Addresses(options.address, modelled=len(draft.machine.tlb) != 0)
        self._tables = GuestTables() if options.address == "gva" else None
        self._untranslated: list[Untranslated] = []
        # Where the records are whose frames are no neighbours, by index, as far as the log has exits of theirs.
        self._split: dict[int, scattered.Runs] = {}
        self.tally = np.zeros(len(reg.COUNTERS), dtype=np.int64)
        self.stopped_at: int | None = None
        # The index of that record, and its words.
        self.stop = (0, 0, 0)

    def _aim(self, targets: object_hits.Targets) -> None:
        """Count violations for these objects from here on."""
        self._targets = targets
        names = len(targets.names)
        self._hits = np.zeros((names, object_hits.HIT_WORDS), dtype=np.int64)
        self._hits[:, object_hits.HIT_FIRST] = -1
        self._seen = np.full(names, -1, dtype=np.int64)
        self._touched = np.full(names, -1, dtype=np.int64)
        self._recent = object_hits.no_recent()

    @property
    def records_done(self) -> int:
        return int(self.tally[reg.RECORDS])

    def feed(self, chunk: TraceChunk) -> bool:
        """Replay a chunk. False: the replay stopped and takes no more.

        Raises TraceError, with the absolute record index, for a record that is no access.
        """
        if self.stopped_at is not None:
            return False
        chunk = self._addresses.of(chunk, self._next)
        if self._before is not None:
            self._before(chunk)
        if chunk.late is not None and self._wants_gva(chunk):
            chunk = chunk.with_gva()
        count = len(chunk)
        self._has_gva = self._has_gva or chunk.gva is not None or chunk.late is not None
        self._words[replay.OPTION_KINDS] = chunk.kinds
        base = self._next
        self._next = base + count
        position = max(0, min(count, self._options.start - base))
        if position < count and self._again is not None:
            again, self._again = self._again, None
            if again == self._identity(chunk, base, position):
                if not self._run_again(chunk, base, position):
                    return False
                position += 1
        return self._run(chunk, base, position)

    def _wants_gva(self, chunk: TraceChunk) -> bool:
        """Whether the processor itself has a use for linear addresses: it tells a guest of them that handles #VE."""
        m = self._draft.machine
        known = (int(m.vcpu_of_id[vcpu]) for vcpu in chunk.vcpus() if vcpu < len(m.vcpu_of_id))
        return any(position >= 0 and mode_of(m, position) & MODE_VE for position in known)

    def _run_again(self, chunk: TraceChunk, base: int, position: int) -> bool:
        """Run the record at which an earlier replay stopped, and which that one counted as a violation."""
        before = self.tally.copy()
        self._seen.fill(base + position)
        self._touched.fill(base + position)
        going = self._run(chunk, base, position, position + 1)
        for counter in COUNTED_ONCE:
            self.tally[counter] = before[counter]
        return going

    def _run(self, chunk: TraceChunk, base: int, position: int, end: int | None = None) -> bool:
        """Replay a chunk, whose first record has index ``base``, from a position up to an end. False: it stopped."""
        run = run_of(chunk, 0, len(chunk) if end is None else end)
        gvas = self._no_gva if chunk.gva is None else frozen(chunk.gva)
        if self._tables is not None:
            self._tables.begin(position)
        while position < run.length:
            status, position = self._enter(chunk, run, gvas, position, base)
            if status == replay.UNTRANSLATED:
                self._pass_over(chunk, base, position)
                position += 1
            elif status == replay.NEED_FRAMES:
                self._draft.ensure()
            elif status == replay.LOG_FULL:
                self._drain(chunk, base)
            elif status == replay.STOPPED:
                self._stop(chunk, base, position)
                return False
            elif status != record_checks.DONE:
                self._refuse_in(chunk, status, run, position, base)
        self._end_chunk(chunk, base)
        return True

    def _identity(self, chunk: TraceChunk, base: int, position: int) -> tuple[int, int, int]:
        """Index and words of a record, the address as it was given."""
        address, word = chunk.at(position)
        if self._tables is not None and chunk.gva is not None:
            address = int(chunk.gva[position : position + 1].view(np.int64)[0])
        return base + position, address, word

    def _stop(self, chunk: TraceChunk, base: int, position: int) -> None:
        """The replay ends at a record of a chunk, which has not been run to its end."""
        self.stop = self._identity(chunk, base, position)
        self.stopped_at = self.stop[0]
        self._end_chunk(chunk, base)

    def _end_chunk(self, chunk: TraceChunk, base: int) -> None:
        if chunk.carry or chunk.late is not None:
            self._drain(chunk, base)

    def uncounted(self) -> NDArray[np.int64]:
        """What is to be added to the totals of the machine, handed out once."""
        return self.tally

    def _enter(self, chunk: TraceChunk, run: Run, gvas: NDArray[np.int64], position: int, base: int) -> tuple[int, int]:
        """Go on from a position of the chunk; returns why the kernel came back, and the record it has not run.

        Operations are for ``trace.timed``; others refuse them rather than pass them over.
        """
        tables = self._tables
        if tables is None:
            if chunk.operations is not None and not chunk.operations.plain:
                rule = "a replay that is published while it runs takes no operations and no address spaces"
                raise TraceError(rule, index=base + position, field="op")
            return self._replay(run, gvas, position, base)
        if position == tables.ready and tables.why == record_checks.DONE:
            tables.translate(self._draft.machine, chunk, self._words)
        if position < tables.ready:
            return self._replay(run.upto(tables.ready), gvas, position, base)
        if tables.why == guest_virtual.SPLIT:
            return self._enter_split(tables, run.upto(position + 1), gvas, position, base)
        return tables.why, position

    def _replay(self, run: Run, gvas: NDArray[np.int64], position: int, base: int) -> tuple[int, int]:
        m = self._draft.machine
        options, trail = self._words, self._trail
        status, position = replay.replay(
            m, run, gvas, position, base, options, trail, self._log, self._used, self.tally
        )
        return int(status), int(position)

    def _enter_split(
        self, tables: GuestTables, run: Run, gvas: NDArray[np.int64], position: int, base: int
    ) -> tuple[int, int]:
        """Run the last record of a run, whose frames are no neighbours."""
        with self._aimed(base, position, run.at(position)[1] & 0xFFFF):
            status, after = self._replay(run, gvas, position, base)
        if after > position:
            tables.begin(after)
        return status, after

    @contextmanager
    def _aimed(self, base: int, position: int, size: int) -> Iterator[None]:
        """While the record at a position of the chunk runs: if its frames are no neighbours, the machine knows them,
        and the log will be told."""
        tables = self._tables
        if tables is None or tables.why != guest_virtual.SPLIT or position != tables.ready:
            yield
            return
        index = base + position
        places = self._draft.machine.places
        places[:] = tables.places
        self._split.pop(index, None)
        self._split[index] = scattered.runs_of(tables.places, size)
        try:
            yield
        finally:
            places[0] = NO_PLACE

    def _pass_over(self, chunk: TraceChunk, base: int, position: int) -> None:
        """Take note of a record whose address leads nowhere: it is no access."""
        assert self._tables is not None
        self.tally[reg.UNTRANSLATED] += 1
        gva, level = self._tables.blame(self._draft.machine, chunk, position)
        self._untranslated.append(Untranslated(base + position, gva, level))
        if len(self._untranslated) == MOST_UNTRANSLATED:
            self._words[replay.OPTION_NOWHERE] = replay.COUNTED

    def _refuse_in(self, chunk: TraceChunk, status: int, run: Run, position: int, base: int) -> None:
        """Raise TraceError for the record at a position of the chunk."""
        if status in RULES:
            raise refusal(status, chunk, base, position)
        raise refused_record(status, run.at(position), 0, base + position)

    def _drain(self, chunk: TraceChunk | None = None, base: int = 0) -> None:
        """Turn the exit buffer into columns; what is carried is taken from the chunk that the exits are in."""
        count = int(self._used[0])
        if count == 0:
            return
        self._used[0] = 0
        told = self._log[:count]
        if chunk is not None and chunk.late is not None:
            told[:, vcpu_run.EXIT_GVA] = chunk.late.at(told[:, vcpu_run.EXIT_INDEX] - base).view(np.int64)
        if self._split:
            told = scattered.for_objects(told, self._split)
        if len(self._recent) == object_hits.RECENT_FEW < count:
            self._recent = object_hits.no_recent(object_hits.RECENT_MANY)
        found = (self._hits, self._seen, self._touched, self._recent)
        object_hits.attribute(self._targets.index, told, len(told), *found)
        kept = min(count, self._options.max_exit_records - self._kept)
        self._dropped += count - kept
        if kept:
            self._kept += kept
            self._exits.add(self._columns(self._log[:kept], chunk, base, self._exits.room(kept)))
        if self._split:
            self._split = dict([self._split.popitem()])  # the last one may still be under way

    def _columns(
        self, log: NDArray[np.int64], chunk: TraceChunk | None, base: int, room: Room | None = None
    ) -> ExitColumns:
        """The exits of log rows, in ``room`` for so many if given."""
        split, bounds = scattered.in_log(log, self._split)
        columns, record_gpa = columns_of_log(bounds, room)
        record_gpa[split.rows] = log[split.rows, vcpu_run.EXIT_GPA].view(np.uint64)
        carry = {}
        if chunk is not None and chunk.carry:
            at = log[:, vcpu_run.EXIT_INDEX] - base
            names = dict.fromkeys((*self._options.carry, *chunk.carry))
            carry = {name: np.array(chunk.carry[name][at]) for name in names}
        targets = self._targets
        return ExitColumns(columns, record_gpa, self._has_gva, carry, targets.index, targets.names, split)

    def result(self) -> TraceResult:
        """Totals and exit records so far."""
        self._drain()
        t = [int(value) for value in self.tally]
        columns, record_gpa = columns_of_log(self._log[:0])
        empty = ExitColumns(columns, record_gpa, self._has_gva, {}, self._targets.index, self._targets.names)
        return TraceResult(
            records=t[reg.RECORDS],
            writes=t[reg.WRITES],
            violations=t[reg.VIOLATIONS],
            page_granular_violations=t[reg.PAGE_GRANULAR],
            by_object=self._by_object(),
            mmio=t[reg.MMIO],
            unenforced_writes=t[reg.UNENFORCED],
            exits={
                "ept_violation": t[reg.EPT_VIOLATION],
                "ept_misconfiguration": t[reg.EPT_MISCONFIGURATION],
                "spp_miss": t[reg.SPP_MISS],
                "spp_misconfiguration": t[reg.SPP_MISCONFIGURATION],
            },
            exit_records_dropped=self._dropped,
            stopped_at=self.stopped_at,
            exit_columns=self._exits.exits(empty),
            untranslated=t[reg.UNTRANSLATED],
            untranslated_records=tuple(self._untranslated),
        )

    def _by_object(self) -> dict[str, ObjectHits]:
        targets = self._targets
        return {
            name: ObjectHits(violations, collateral, first if first >= 0 else None, subpages)
            for name, subpages, (violations, collateral, first) in zip(
                targets.names, targets.subpages, self._hits.tolist(), strict=True
            )
        }


def run_of(chunk: TraceChunk, begin: int, end: int) -> Run:
    """Records of a chunk as kernels take them."""
    if chunk.columns is None:
        return Run(frozen(chunk.records[begin:end].reshape(-1)), _NO_GPAS, _NO_SIZES, np.int64(0))
    sizes = chunk.columns.size[begin:end]
    sizes.flags.writeable = False
    return Run(_NO_GPAS, frozen(chunk.columns.gpa[begin:end]), sizes, np.int64(chunk.columns.above))


def refused_record(status: int, words: Sequence[int] | NDArray[np.int64], position: int, index: int) -> TraceError:
    """What is wrong (a status of ``record_checks``) with the record at a position of ``words``, which has an index."""
    name, rule = REFUSALS[status]
    gpa, word = (int(w) & ((1 << 64) - 1) for w in words[2 * position : 2 * position + 2])
    values = {"size": word & 0xFFFF, "access": (word >> 16) & 0xFF, "vcpu": (word >> 32) & 0xFFFF, "gpa": gpa}
    values["source"] = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK
    values["kind"] = word >> acc.RECORD_KIND_SHIFT & 7
    values["linear"] = word >> acc.RECORD_LINEAR_SHIFT & acc.LINEAR_BITS ^ acc.LINEAR_VALID
    return TraceError(rule, index=index, field=name, value=values.get(name, word))


def _stop_of(m: Machine) -> tuple[int, int, int]:
    """Where the machine stopped: index and words of the record. No record is without a size."""
    index, gpa, word = m.rows[m.row_of[STATE_FRAME], reg.STOPPED_AT : reg.STOPPED_WORD + 1].tolist()
    return index, gpa, word


class ReplayTransaction:
    """Context manager around a Replay: ``finish`` publishes, leaving without it changes nothing."""

    def __init__(self, replay_: Replay, publish: Callable[[Replay], None], abandon: Callable[[], None]) -> None:
        self._replay = replay_
        self._publish = publish
        self._abandon = abandon
        self._open = True

    @property
    def replay(self) -> Replay:
        return self._replay

    @property
    def records_done(self) -> int:
        return self._replay.records_done

    @property
    def stopped_at(self) -> int | None:
        return self._replay.stopped_at

    def feed(self, chunk: TraceChunk) -> bool:
        """See ``Replay.feed``."""
        return self._replay.feed(chunk)

    def pause(self) -> None:
        """Publish state and counters; the replay goes on in another transaction."""
        self._open = False
        self._publish(self._replay)

    def finish(self) -> TraceResult:
        """Publish state and counters, and return the result."""
        result = self._replay.result()
        self._open = False
        self._publish(self._replay)
        return result

    def __enter__(self) -> ReplayTransaction:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._open = False
            self._abandon()
