"""One sentence on why an access ends as it does, from the entries that were read.

Which entry is to blame follows ``access_check.permitted``, entry by entry; nothing is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.arch import exits, sppt
from engine.arch.words import signed
from engine.cpu import access_rights, ept


@dataclass(frozen=True)
class ReadEntry:
    """One table entry that was read; ``fields`` by name, ``absent`` when no table memory is at that address."""

    structure: str
    level: int
    table: int
    index: int
    raw: int
    absent: bool
    fields: dict[str, int] = field(default_factory=dict)


class Verdict(NamedTuple):
    """What ``access_check.check`` returned."""

    reason: int
    qualification: int
    denied: int


def sentence_on(
    verdict: Verdict, walked: tuple[ReadEntry, ...], vectors: tuple[ReadEntry, ...], how: int, mode: int
) -> str:
    """The sentence; ``walked`` and ``vectors`` are the EPT and SPPT entries from the root."""
    reason, qualification, denied = verdict
    if reason == exits.NONE:
        return _allowed(walked, vectors, how, mode)
    if not walked:
        return "denied: the GPA is wider than the EPT walk translates"
    last = walked[-1]
    if reason == exits.EPT_MISCONFIGURATION:
        return f"EPT misconfiguration: {_place(last)} = {last.raw:#x} is not a valid entry"
    if reason == exits.SPP_EVENT:
        what = "is not valid (SPP miss)" if qualification & exits.Q_SPP_MISS else "has a reserved bit set"
        return f"SPP-related event: {_place(vectors[-1])} = {vectors[-1].raw:#x} {what}"
    if qualification & exits.Q_PAGING_VERIFICATION:
        return f"denied: {_place(last)} wants paging-write access of every guest paging structure on the way"
    if denied:
        subpages = ", ".join(str(s) for s in range(sppt.SUBPAGES) if denied >> s & 1)
        noun, verb = ("sub-pages", "are") if denied & (denied - 1) else ("sub-page", "is")
        return f"denied: {noun} {subpages} of {_place(vectors[-1])} {verb} 0"
    if not ept.present(signed(last.raw), mode):
        return f"not mapped: {_place(last)} is not present (exit {exits.EPT_VIOLATION}, EPT violation)"
    blamed = next((entry for entry in walked if _refuses(entry, last, how, mode)), last)
    return f"denied: {_place(blamed)} does not permit {_name(how, mode)}"


def _allowed(walked: tuple[ReadEntry, ...], vectors: tuple[ReadEntry, ...], how: int, mode: int) -> str:
    if not mode & ept.MODE_EPT:
        return "allowed: EPT is off"
    if vectors:
        return f"allowed: every touched sub-page is 1 in {_place(vectors[-1])}, though EPT write permission is 0"
    last = walked[-1]
    if access_rights.is_paging(how) and _wants_write(how, mode) and not all(entry.raw & bits.WRITE for entry in walked):
        return f"allowed: {_place(last)} has paging-write access, though EPT write permission is 0"
    return f"allowed: every EPT entry used permits {_name(how, mode)}"


def _name(how: int, mode: int) -> str:
    """What the access asks for, in words."""
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    if kind != acc.DATA:
        return f"a {acc.KIND_NAMES[kind]} access"
    access = how & acc.ACCESS_MASK
    if access == acc.EXECUTE and mode & ept.MODE_MBEC:
        who = "user" if how >> acc.LINEAR_SHIFT & acc.LINEAR_USER else "supervisor"
        return f"execute through a {who}-mode address"
    return acc.ACCESS_NAMES[access]


def _wants_write(how: int, mode: int) -> bool:
    return bool(access_rights.wants(how, mode) & bits.WRITE)


def _refuses(entry: ReadEntry, last: ReadEntry, how: int, mode: int) -> bool:
    """Whether an entry of a whole walk is why the access is refused; asked from the root, of the last one in the end.

    Paging-write access of the leaf needs no word here: where it is not enough, an entry above is to blame.
    """
    leaf = entry is last
    if access_rights.supervisor_shadow_stack(how, mode):
        right = bits.SUPERVISOR_SHADOW_STACK if leaf else bits.WRITE
        return not entry.raw & bits.READ or not entry.raw & right
    wanted = int(access_rights.wants(how, mode))
    if wanted & bits.EXECUTE and mode & ept.MODE_MBEC and how >> acc.LINEAR_SHIFT & acc.LINEAR_USER:
        wanted = bits.USER_EXECUTE
    return bool(wanted & ~entry.raw)


def _place(entry: ReadEntry) -> str:
    return f"{entry.structure} at {entry.table + 8 * entry.index:#x}"
