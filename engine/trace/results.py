"""What a replay gives back: totals, hits per object, and exit records as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.arch import exits
from engine.arch.access import ACCESS_NAMES
from engine.cpu import sppt
from engine.jit import kernel
from engine.kvm import vcpu_run
from engine.kvm.resolutions import RESOLUTION_NAMES
from engine.trace import scattered
from engine.trace.object_hits import ObjectIndex, build_index, objects_of, objects_of_scattered
from engine.trace.scattered import NONE, Scattered
from engine.trace.taken import Taken
from engine.trace.translations import Translations

# Name, dtype and meaning of the columns of an exit record, in the order in which they are shown.
EXIT_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("index", "uint64", "position of the record in the trace"),
    ("vcpu", "uint16", "KVM vCPU id"),
    ("reason", "uint16", "basic exit reason"),
    ("qualification", "uint64", "exit qualification"),
    ("gpa", "uint64", "guest-physical address that the exit reports"),
    ("gva", "uint64", "guest-linear address of the access, where the trace has it"),
    ("size", "uint16", "bytes of the whole access"),
    ("access", "uint8", "0 read, 1 write, 2 execute"),
    ("gfn", "uint64", "guest frame number of gpa"),
    ("subpages", "uint32", "sub-pages of that page which the access touches"),
    ("denied", "uint32", "sub-pages among them that refuse it"),
    ("resolution", "uint8", "what the hypervisor did about it"),
    ("stale", "uint8", "1 where a cached translation decided against what the tables say"),
    ("source", "uint8", "0 guest, 1 emulated by KVM, 2 host"),
    ("insn_len", "uint8", "bytes of the instruction, 0 if not known"),
)


# Columns, and the first byte of each access, that are to be filled.
Room = tuple[dict[str, NDArray[Any]], NDArray[np.uint64]]


@dataclass(frozen=True)
class ExitColumns:
    """Exit records: equally long numpy columns (see ``EXIT_COLUMNS``) and what is needed to name objects.

    ``record_gpa`` is the first byte of the access, which differs from ``gpa`` where the second page of an access
    exits; ``scattered`` are those whose frames are no neighbours. Indexing with a slice, or with positions, gives
    those records.
    """

    columns: Mapping[str, NDArray[Any]]
    record_gpa: NDArray[np.uint64]
    has_gva: bool
    carry: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    object_index: ObjectIndex = field(default_factory=lambda: build_index((), ()))
    object_names: tuple[str, ...] = ()
    scattered: Scattered = NONE

    def __len__(self) -> int:
        return len(self.record_gpa)

    def __getitem__(self, key: slice | NDArray[np.int64]) -> ExitColumns:
        return ExitColumns(
            {name: column[key] for name, column in self.columns.items()},
            self.record_gpa[key],
            self.has_gva,
            {name: column[key] for name, column in self.carry.items()},
            self.object_index,
            self.object_names,
            self.scattered.window(key, len(self)),
        )

    def column(self, name: str) -> NDArray[Any]:
        """One column by name."""
        return self.columns[name]

    def object_positions(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(offsets int64[n + 1], positions in ``object_names``): the objects each record touches."""
        sizes = self.columns["size"]
        if not len(self.scattered.rows):
            return objects_of(self.object_index, self.record_gpa, sizes)
        return objects_of_scattered(self.object_index, self.record_gpa, sizes, self.scattered)

    def objects(self) -> list[list[str]]:
        """Names of the objects each record touches."""
        offsets, positions = self.object_positions()
        names = [self.object_names[i] for i in positions.tolist()]
        bounds = offsets.tolist()
        return [names[a:b] for a, b in pairwise(bounds)]

    def reason_names(self) -> list[str]:
        """Names of the exit reasons."""
        return [exits.name_of(r) for r in self.columns["reason"].tolist()]

    def resolution_names(self) -> list[str]:
        """Names of what the hypervisor did."""
        return [RESOLUTION_NAMES[r] for r in self.columns["resolution"].tolist()]

    def access_names(self) -> list[str]:
        """Names of the kinds of access."""
        return [ACCESS_NAMES[a] for a in self.columns["access"].tolist()]


@kernel
def split_log(
    log: Any,
    index: Any,
    vcpu: Any,
    reason: Any,
    qualification: Any,
    gpa: Any,
    gva: Any,
    size: Any,
    access: Any,
    gfn: Any,
    subpages: Any,
    denied: Any,
    resolution: Any,
    stale: Any,
    source: Any,
    insn_len: Any,
    first: Any,
) -> None:
    """Take the words of log rows apart into the columns of ``EXIT_COLUMNS`` and the first byte of each access."""
    for i in range(log.shape[0]):
        word = log[i, vcpu_run.EXIT_RECORD]
        at = log[i, vcpu_run.EXIT_AT]
        end = min(log[i, vcpu_run.EXIT_GPA] + (word & 0xFFFF), (at | 0xFFF) + 1)
        index[i] = log[i, vcpu_run.EXIT_INDEX]
        vcpu[i] = (word >> 32) & 0xFFFF
        reason[i] = log[i, vcpu_run.EXIT_REASON] & 0xFFFF
        qualification[i] = log[i, vcpu_run.EXIT_QUALIFICATION]
        gpa[i] = at
        gva[i] = log[i, vcpu_run.EXIT_GVA]
        size[i] = word & 0xFFFF
        access[i] = (word >> 16) & 0xFF
        gfn[i] = at >> 12
        subpages[i] = sppt.touched(at, end - at)
        denied[i] = log[i, vcpu_run.EXIT_DENIED]
        resolution[i] = (log[i, vcpu_run.EXIT_REASON] >> 16) & 0xFF
        stale[i] = log[i, vcpu_run.EXIT_REASON] >> 24
        source[i] = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK
        insn_len[i] = word >> acc.RECORD_LENGTH_SHIFT & acc.RECORD_LENGTH_MASK
        first[i] = log[i, vcpu_run.EXIT_GPA]


def room_for(count: int) -> Room:
    """Room for so many exit records."""
    return {name: np.empty(count, dtype=dtype) for name, dtype, _ in EXIT_COLUMNS}, np.empty(count, dtype=np.uint64)


def columns_of_log(
    log: NDArray[np.int64], room: Room | None = None
) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint64]]:
    """Columns, and the first byte of each access, from int64[n, EXIT_WORDS] log rows; in ``room`` for n, if given."""
    columns, first = room or room_for(len(log))
    signed = [c.view(np.int64) if c.dtype == np.uint64 else c for c in (*columns.values(), first)]
    split_log(log, *signed)
    return columns, first


def join(parts: Sequence[ExitColumns], empty: ExitColumns) -> ExitColumns:
    """One after the other; the parts belong to one replay."""
    if len(parts) < 2:
        return parts[0] if parts else empty
    return ExitColumns(
        {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
        np.concatenate([p.record_gpa for p in parts]),
        parts[0].has_gva,
        {name: np.concatenate([p.carry[name] for p in parts]) for name in parts[0].carry},
        parts[0].object_index,
        parts[0].object_names,
        scattered.joined([p.scattered for p in parts], [len(p) for p in parts]),
    )


@dataclass(frozen=True, slots=True)
class ObjectHits:
    """Violations of one object; ``collateral`` is the part that touched none of its own bytes.

    ``first_index`` is the first record that hit it, None if none did; ``subpages`` how many sub-pages it covers.
    """

    violations: int
    collateral: int
    first_index: int | None
    subpages: int


@dataclass(frozen=True, slots=True)
class Untranslated:
    """A record that is no access, for its address leads nowhere: the first such ``gva`` of it, and the ``level`` of the
    entry that says so, 0 where the address is not canonical."""

    index: int
    gva: int
    level: int


@dataclass(frozen=True)
class TraceResult:
    """Totals of one replay. ``stopped_at`` is the index of the record at which ``on_violation=stop`` ended it;
    ``untranslated`` counts records beside ``records``, of which the first ones are listed.

    ``taken`` is what the body of a tool was taken for, None for other bodies.
    """

    records: int
    writes: int
    violations: int
    page_granular_violations: int
    by_object: Mapping[str, ObjectHits]
    mmio: int
    unenforced_writes: int
    exits: Mapping[str, int]
    exit_records_dropped: int
    stopped_at: int | None
    exit_columns: ExitColumns
    translations: Translations = field(default_factory=Translations)
    taken: Taken | None = None
    untranslated: int = 0
    untranslated_records: tuple[Untranslated, ...] = ()

    def with_exits(self, exits: ExitColumns) -> TraceResult:
        """The same with other exit records."""
        return replace(self, exit_columns=exits)

    def with_translations(self, found: Translations) -> TraceResult:
        """The same with what was found out about translations."""
        return replace(self, translations=found)
