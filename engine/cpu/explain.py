"""Explaining an access: the entries the processor reads, field by field, and one sentence on why it ends as it does.

Explains what ``access_check.check`` decided; it walks nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch import ept as bits
from engine.arch import exits, sppt
from engine.arch.access import ACCESS_MASK, ACCESS_NAMES, KIND_MASK, KIND_NAMES, KIND_SHIFT
from engine.arch.words import signed, unsigned
from engine.cpu import access_check, ept
from engine.cpu.frames import CAP_EPT_VPID, CAP_RESERVED_ADDRESS, Machine
from engine.cpu.host_physical_memory import frame_at
from engine.cpu.sentences import ReadEntry, Verdict, sentence_on
from engine.cpu.sppt import HIGH

# Name and bits (low, width) of the fields of an entry.
EPT_TABLE_FIELDS = (
    ("read", 0, 1),
    ("write", 1, 1),
    ("execute", 2, 1),
    ("page", 7, 1),
    ("accessed", 8, 1),
    ("user_execute", 10, 1),
    ("suppress_ve", 63, 1),
)
EPT_LEAF_FIELDS = (
    ("read", 0, 1),
    ("write", 1, 1),
    ("execute", 2, 1),
    ("memory_type", 3, 3),
    ("ignore_pat", 6, 1),
    ("page", 7, 1),
    ("accessed", 8, 1),
    ("dirty", 9, 1),
    ("user_execute", 10, 1),
    ("verify_paging", 57, 1),
    ("paging_write", 58, 1),
    ("supervisor_shadow_stack", 60, 1),
    ("spp", 61, 1),
    ("suppress_ve", 63, 1),
)
OUTCOMES = {
    exits.NONE: "allowed",
    exits.EPT_VIOLATION: "ept_violation",
    exits.EPT_MISCONFIGURATION: "ept_misconfiguration",
    exits.SPP_EVENT: "spp_event",
}

SplitFields = Callable[[Machine, int, int], dict[str, int]]


@dataclass(frozen=True)
class Explanation:
    """What an access would do now. ``reason`` and ``qualification`` are None when no exit follows."""

    gpa: int
    size: int
    access: str
    kind: str
    outcome: str
    sentence: str
    reason: int | None
    qualification: int | None
    exit_gpa: int | None
    subpages: int
    denied: int
    ept: tuple[ReadEntry, ...]
    sppt: tuple[ReadEntry, ...]


def explain(m: Machine, vcpu: int, gpa: int, size: int, how: int) -> Explanation:
    """Explain one access without changing anything; of several pages, the first that exits, else the last."""
    trail = np.zeros((ept.TRAIL_ROWS, 4), dtype=np.int64)
    at = gpa
    while True:
        part = min(gpa + size - at, 4096 - at % 4096)
        reason, qualification, denied = (int(x) for x in access_check.check(m, vcpu, at, part, how, trail))
        if reason or at + part == gpa + size:
            break
        at += part
    touched = (2 << ((at + part - 1) >> 7 & 31)) - (1 << (at >> 7 & 31))
    ept_entries = ept_entries_read(m, trail)
    spp_entries = sppt_entries_read(m, trail)
    verdict = Verdict(reason, qualification, denied)
    return Explanation(
        gpa=gpa,
        size=size,
        access=ACCESS_NAMES[how & ACCESS_MASK],
        kind=KIND_NAMES[(how & KIND_MASK) >> KIND_SHIFT],
        outcome=_outcome(reason, qualification),
        sentence=sentence_on(verdict, ept_entries, spp_entries, how, int(ept.mode_of(m, vcpu))),
        reason=reason or None,
        qualification=qualification if reason else None,
        exit_gpa=at if reason else None,
        subpages=touched,
        denied=denied,
        ept=ept_entries,
        sppt=spp_entries,
    )


def _outcome(reason: int, qualification: int) -> str:
    if reason == exits.SPP_EVENT:
        return "spp_miss" if qualification & exits.Q_SPP_MISS else "spp_misconfiguration"
    return OUTCOMES[reason]


def ept_entries_read(m: Machine, trail: NDArray[np.int64]) -> tuple[ReadEntry, ...]:
    """The EPT entries in the trail of a walk, from the root."""
    rows = trail[: int(trail[ept.TRAIL_COUNTS, 0])]
    return tuple(_entry(m, row, bits.LEVEL_NAMES, _ept_fields) for row in rows)


def sppt_entries_read(m: Machine, trail: NDArray[np.int64]) -> tuple[ReadEntry, ...]:
    """The SPPT entries in the trail of a walk, from the root."""
    rows = trail[ept.TRAIL_SPPT : ept.TRAIL_SPPT + int(trail[ept.TRAIL_COUNTS, 1])]
    return tuple(_entry(m, row, sppt.LEVEL_NAMES, _sppt_fields) for row in rows)


def _entry(m: Machine, row: NDArray[np.int64], names: Sequence[str], fields: SplitFields) -> ReadEntry:
    level, table, index, raw = (int(x) for x in row)
    absent = bool(frame_at(m, table) < 0)
    return ReadEntry(names[level], level, table, index, unsigned(raw), absent, fields(m, unsigned(raw), level))


def _ept_fields(m: Machine, raw: int, level: int) -> dict[str, int]:
    leaf = level == 1 or (level <= 3 and raw & bits.PAGE)
    table = EPT_LEAF_FIELDS if leaf else EPT_TABLE_FIELDS
    values = {name: raw >> low & ((1 << width) - 1) for name, low, width in table}
    values["address"] = raw & bits.ADDRESS
    width, capabilities = int(m.caps[CAP_RESERVED_ADDRESS]), int(m.caps[CAP_EPT_VPID])
    values["reserved"] = raw & unsigned(ept.reserved_bits(signed(raw), level, width, capabilities))
    return values


def _sppt_fields(m: Machine, raw: int, level: int) -> dict[str, int]:
    if level == 1:
        mask = sum((raw >> 2 * s & 1) << s for s in range(sppt.SUBPAGES))
        return {"writable_subpages": mask, "reserved": raw & unsigned(sppt.VECTOR_RESERVED)}
    reserved = unsigned(sppt.RESERVED_LOW | int(m.caps[CAP_RESERVED_ADDRESS]) | HIGH)
    return {"valid": raw & 1, "address": raw & bits.ADDRESS, "reserved": raw & reserved}
