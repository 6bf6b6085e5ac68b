"""What goes into a store and comes out of it, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Block = tuple[str, int, bytes]
"""Kind, number and 4096 bytes; the kind ``free`` means that the block is gone."""


@dataclass(frozen=True, slots=True)
class VmRecord:
    """One machine without its blocks. ``created`` is RFC 3339, ``head`` the JSON of ``VirtualMachine.head``, which may
    be left out where it is not looked at. ``next_event`` is the id that its next event gets, ``frames`` how many
    blocks it has, where that is asked for."""

    number: int
    id: str
    created: str
    revision: int
    head: str = ""
    tenant: str = "default"
    next_event: int = 1
    frames: int = 0


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One replay's result. ``object_index`` and each of ``parts`` are blobs of columns.

    With ``goes_on`` it replaces what the store has under its id, and of the parts those from ``first_part`` on.
    """

    id: str
    sequence: int
    created: str
    exit_records: int
    head: str
    object_index: bytes
    parts: Sequence[bytes] = ()
    first_part: int = 0
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A row of an event log: ``count`` events with ids from ``first`` on. ``body`` is the JSON of what they tell.

    ``created`` is RFC 3339 in UTC with six decimals. With ``trace`` they are the violations of that replay.
    """

    first: int
    count: int
    created: str
    kind: str
    body: str
    trace: str | None = None


@dataclass(frozen=True, slots=True)
class LogPruning:
    """What is left of a log: its last ``kept`` rows, and of these the ones ``since`` a time (empty: all)."""

    kept: int
    since: str


@dataclass(frozen=True, slots=True)
class LogChange:
    """What a commit adds to the event log of its machine, and takes off its beginning."""

    events: Sequence[EventRecord] = ()
    pruning: LogPruning | None = None


def no_blocks() -> Iterator[Block]:
    return iter(())


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Long work: what became of it. Times are RFC 3339, ``error`` is the JSON of a problem."""

    number: int
    id: str
    tenant: str
    vm: str
    state: str
    created: str
    started: str | None = None
    finished: str | None = None
    records: int = 0
    trace: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """What was answered under the ``key`` of ``owner``, until Unix time ``until`` (ms); see the table."""

    owner: str
    key: str
    fingerprint: bytes
    status: int
    headers: str
    body: bytes
    size: int
    until: int


@dataclass(frozen=True, slots=True)
class FootprintRecord:
    """A footprint: ``head`` is the JSON of what is in its file, which has ``size`` bytes in ``parts``; those are left
    out where they are not looked at. ``created`` is RFC 3339 in UTC with six decimals, ``vm`` the id of the machine
    whose replay it was collected beside, or empty."""

    id: str
    tenant: str
    vm: str
    created: str
    size: int
    head: str
    parts: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Side:
    """What is no machine's: stored with a change of one, or alone. Jobs and answers replace those of before.

    ``forgotten`` are ids of jobs that go, ``dropped`` those of footprints; answers whose time ended at ``expired`` (ms)
    or before go, too.
    """

    jobs: Sequence[JobRecord] = ()
    forgotten: Sequence[str] = ()
    answers: Sequence[AnswerRecord] = ()
    expired: int = 0
    footprints: Sequence[FootprintRecord] = ()
    dropped: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """What one transaction makes durable: all of it or nothing.

    ``before`` is the revision that the store must have (None: the machine is new), ``after`` what it has then
    (None: the machine is deleted; both None: no machine is concerned). ``head`` and ``blocks`` are called in the
    writing thread, perhaps more than once.
    """

    number: int
    before: int | None
    after: VmRecord | None
    head: Callable[[], str] = str
    blocks: Callable[[], Iterator[Block]] = no_blocks
    traces: Sequence[TraceRecord] = ()
    dropped: Sequence[str] = ()
    log: LogChange = LogChange()
    sides: Sequence[Side] = ()

    @property
    def count(self) -> int:
        """How many changes of a machine these are: each of them counts its revision up."""
        return 1 if self.before is None or self.after is None else self.after.revision - self.before
