"""Why a translation was still there: the operation of a trace that came nearest to removing it, in a sentence.

Nothing is decided here: the caches are what the operations left. What an operation was about is its own reading of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.arch import hypercall as hv
from engine.cpu import tlb, tlb_select
from engine.hyperv.flush_execution import Effect
from engine.hyperv.flush_or_refusal import Flush
from engine.hyperv.outcome import Outcome
from engine.trace.operations import HYPERCALL, INVLPG, MOV_CR3, OP_NAMES
from engine.trace.translations import MISSES, Miss

# Translations by (position of the vCPU, page, address space).
Key = tuple[int, int, int]

_MASK_VPS = 64


@dataclass(frozen=True)
class Place:
    """A stale translation: whose, of which page in which address space; between which records it should have gone."""

    position: int
    vp_index: int
    page: int
    space: int
    after: int
    index: int

    @property
    def key(self) -> Key:
        return self.position, self.page, self.space


@dataclass(frozen=True)
class Done:
    """An operation of the trace as far as it matters to translations that stayed.

    ``position`` is that of the vCPU that executed it; ``targets`` positions and ``reached`` VP indices of a flush;
    ``left`` what it had to remove and did not. ``page`` is that of an INVLPG; ``keeps`` a load of CR3 with bit 63.
    """

    index: int
    op: int
    position: int
    outcome: str
    name: str
    status: hv.Status | None = None
    flush: Flush | None = None
    targets: frozenset[int] = frozenset()
    reached: tuple[int, ...] = ()
    left: frozenset[Key] = frozenset()
    page: int | None = None
    keeps: bool = False

    @classmethod
    def hypercall(cls, index: int, position: int, outcome: Outcome) -> Done:
        """A hypercall by what became of it."""
        call = hv.CALLS.get(outcome.control.code)
        return cls(
            index,
            HYPERCALL,
            position,
            outcome.outcome,
            f"hypercall {outcome.control.code:#x}" if call is None else call.name,
            status=None if outcome.result is None else hv.status_of(outcome.result),
            flush=outcome.flush if isinstance(outcome.flush, Flush) else None,
            targets=frozenset(effect.vp.position for effect in outcome.effects if effect.targeted),
            reached=outcome.flushed,
            left=frozenset(key for effect in outcome.effects if not effect.queued for key in _left(effect)),
        )


def _left(effect: Effect) -> Iterable[Key]:
    for row in effect.left:
        yield effect.vp.position, int(row[tlb.E_PAGE]), int(row[tlb.E_ADDRESS_SPACE])


def nearest(done: Iterable[Done], place: Place) -> Done | None:
    """The operation that came nearest to removing the translation: by MISSES, the latest of several; None without."""
    found: tuple[int, Done] | None = None
    for item in done:
        if not place.after < item.index < place.index:
            continue
        why = miss(item, place)
        if why is not None and (found is None or MISSES.index(why) <= found[0]):
            found = MISSES.index(why), item
    return None if found is None else found[1]


def miss(item: Done, place: Place) -> str | None:
    """Why an operation did not remove a translation, one of MISSES; None for one that was not about it at all."""
    return _RULES[item.op](item, place)


def _hypercall(item: Done, place: Place) -> str | None:
    if item.outcome != "completed":
        return "not-executed"
    if item.status != hv.Status.SUCCESS:
        return "refused"
    if place.key in item.left:
        return "left"
    if item.flush is None:
        return None
    pages = item.flush.covered is None or bool(
        tlb_select.in_ranges(np.int64(place.page), np.int64(place.page), item.flush.covered)
    )
    spaces = item.flush.space is None or item.flush.space == place.space
    if place.position not in item.targets:
        return "not-targeted" if pages and spaces else None
    return "other-space" if pages else "other-page"


def _mov_cr3(item: Done, place: Place) -> str | None:
    if item.position != place.position:
        return None
    if item.outcome != "completed":
        return "not-executed"
    return "kept" if item.keeps else "other-space"


def _invlpg(item: Done, place: Place) -> str | None:
    if item.position == place.position:
        return "other-space" if item.page == place.page else "other-page"
    return "local" if item.page == place.page else None


_RULES = {HYPERCALL: _hypercall, MOV_CR3: _mov_cr3, INVLPG: _invlpg}

_SENTENCES = {
    "not-targeted": "{name} at record {index} flushed VPs {reached}; VP {vp} was not in its processor set",
    "left": "{name} at record {index} had to remove it by the specification; KVM reads less into the call",
    "refused": "{name} at record {index} was refused with status {status} and flushed nothing",
    "not-executed": "{name} at record {index} was not executed ({outcome}) and flushed nothing",
    "kept": "{name} at record {index} had bit 63 set and kept what was cached",
    "local": "{name} at record {index} was on another processor, and is of its own processor only",
    "other-space": "{name} at record {index} was for another address space",
    "other-page": "{name} at record {index} was for other pages",
}


def told(item: Done, place: Place) -> Miss:
    """The operation that came nearest, for the result."""
    why = miss(item, place)
    assert why is not None
    status = None if item.status is None else int(item.status)
    return Miss(item.index, OP_NAMES[item.op], why, item.reached, status)


def explanation(item: Done | None, place: Place) -> str:
    """What would have removed the translation, and why the nearest operation did not."""
    suffix = "" if place.vp_index < _MASK_VPS else "Ex"
    after = f"after record {place.after}" if place.after >= 0 else "since the translation was made"
    address = (place.page << 12) % (1 << 64)
    needed = (
        f"VP {place.vp_index} needed a flush of {address:#x} {after} and before record {place.index}: "
        f"HvCallFlushVirtualAddressList{suffix} or HvCallFlushVirtualAddressSpace{suffix} with that VP, or INVLPG or a "
        "load of CR3 on it"
    )
    if item is None:
        return f"{needed}; there was none"
    sentence = _SENTENCES[miss(item, place) or ""].format(
        name=item.name,
        index=item.index,
        reached="{" + ", ".join(map(str, item.reached)) + "}",
        vp=place.vp_index,
        status="" if item.status is None else f"{int(item.status):#x} ({item.status.name})",
        outcome=item.outcome,
    )
    return f"{needed}; {sentence}"
