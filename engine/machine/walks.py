"""An access explained: what the processor finds now, and how it ends once KVM has done its part.

KVM maps and arms a page when it is first touched, so what the processor finds first says little about the policy. The
ending is found by executing the access on a twin of the machine (``VirtualMachine.walk``); here it is put in words.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from engine.arch.exits import EPT_MISCONFIGURATION, name_of
from engine.cpu.explain import Explanation
from engine.cpu.frames import Machine
from engine.cpu.memory_slots import find_slot
from engine.errors import EngineError
from engine.kvm import kvmi_page_access, kvmi_rights
from engine.kvm import resolutions as res
from engine.kvm.slots import SLOT_ID
from engine.machine.page_access import text_of
from engine.trace.results import ExitColumns
from engine.trace.single import AccessResult

# What KVM does about an exit that user space never sees; the guest then tries again.
HANDLED = {
    res.MAPPED: "KVM maps the page",
    res.ARMED: "KVM maps the page and arms it for its sub-pages",
    res.FILLED: "KVM fills the SPPT from the page's bitmap",
    res.RESTORED: "KVM gives back what it took from the entry itself",
    res.LOG_EMPTIED: "KVM empties the page-modification log",
    res.DIRTY_LOGGED: "KVM notes the write in the dirty log and opens the sub-page",
}

# The ending of an access for which the machine may not have the frames.
LIMIT_EXCEEDED = "limit-exceeded"


@dataclass(frozen=True)
class Ending:
    """How the access ends.

    ``resolution`` is that of ``AccessResult``, or LIMIT_EXCEEDED; ``exits`` every exit on the way, the last included;
    ``after`` what the processor finds by then. Both are None where the access could not be executed.
    """

    resolution: str
    sentence: str
    exits: ExitColumns | None
    after: Explanation | None


@dataclass(frozen=True)
class Walk(Explanation):
    """What the processor finds now, and ``then``, how the access ends."""

    then: Ending


def walk_of(m: Machine, now: Explanation, result: AccessResult, after: Explanation, space: int = 0) -> Walk:
    """The whole of it; ``m`` is the machine after the access, ``now`` and ``after`` what the processor finds, ``space``
    where the vCPU finds its memory (see ``cpu.memory_slots``)."""
    exits = result.exits
    resolutions = exits.column("resolution").tolist()
    if resolutions and resolutions[0] in HANDLED and now.reason is not None:
        found = now.sentence.removeprefix("denied: ")
        now = replace(now, sentence=f"{found}; {HANDLED[resolutions[0]]}, and the guest tries again")
    return _joined(now, Ending(result.resolution, _sentence(m, result, after, space), exits, after))


def cut_short(now: Explanation, error: EngineError) -> Walk:
    """Of an access that the machine cannot execute."""
    return _joined(now, Ending(LIMIT_EXCEEDED, f"not executed: {error.rule}", None, None))


def _joined(now: Explanation, then: Ending) -> Walk:
    return Walk(**{member.name: getattr(now, member.name) for member in fields(now)}, then=then)


def _sentence(m: Machine, result: AccessResult, after: Explanation, space: int) -> str:
    resolution = res.RESOLUTION_NAMES.index(result.resolution)
    if result.stale:
        return f"{result.resolution}: a cached translation decides, against what the tables say ({after.sentence})"
    if resolution == res.COMPLETED:
        return _completed(result, after)
    last = {name: int(result.exits.column(name)[-1]) for name in ("reason", "gpa")}
    if resolution == res.MMIO:
        return _mmio(m, last["gpa"] >> 12, last["reason"], space)
    if resolution == res.RUN_FAILED and last["reason"] == EPT_MISCONFIGURATION:
        return f"KVM_RUN fails with EINVAL, for KVM has made no such entry: {after.sentence}"
    if resolution == res.RUN_FAILED:
        return (
            f"KVM_RUN fails with EFAULT: no memory slot holds GFN {last['gpa'] >> 12:#x}, so KVM has no bitmap for it"
        )
    if resolution == res.EXCEPTION:
        return f"the guest takes a {result.exception} instead of the exit: {after.sentence}"
    if resolution == res.INTERNAL_ERROR:
        name = name_of(last["reason"])
        told = "KVM_EXIT_INTERNAL_ERROR" if last["reason"] == EPT_MISCONFIGURATION else "KVM_EXIT_UNKNOWN"
        return f"KVM cannot handle the exit ({name}) and gives up with {told}: {after.sentence}"
    return _violation(m, last["gpa"] >> 12, after)


def _completed(result: AccessResult, after: Explanation) -> str:
    if result.unenforced:
        return "allowed: a larger page maps it writable, though the page's bitmap refuses it"
    return after.sentence


def _mmio(m: Machine, gfn: int, reason: int, space: int) -> str:
    if reason == EPT_MISCONFIGURATION:
        return f"MMIO: the entry of GFN {gfn:#x} is one with which KVM marks MMIO; the access goes to user space"
    position = int(find_slot(m, gfn | space >> 12))
    where = " of address space 1" if space else ""
    if position < 0:
        return f"MMIO: no memory slot{where} holds GFN {gfn:#x}; the access goes to user space"
    return f"MMIO: memory slot {int(m.slots[position, SLOT_ID])}{where} is read-only; the write goes to user space"


def _violation(m: Machine, gfn: int, after: Explanation) -> str:
    """A page that lacks read or execute is refused before KVM maps it; there is no entry to blame then.

    Nor is there where KVM shadows the guest's tables.
    """
    row = np.zeros((1, kvmi_page_access.ROW_WORDS), dtype=np.int64)
    kvmi_page_access.read_rights(m, np.array([gfn], dtype=np.int64), row)
    rights = int(row[0, kvmi_page_access.ROW_RIGHTS])
    if not after.denied and kvmi_rights.KEPT & ~rights:
        return f"denied: the page access of GFN {gfn:#x} is {text_of(rights)}"
    if after.reason is None:
        return f"denied: KVM's shadow of the guest's tables does not permit write at GFN {gfn:#x}"
    return after.sentence
