"""What is asked beside policies: which memory the guest has and which KVM runs it; and what that makes of places.

By themselves, whatever a policy says, the pages of a place are MMIO or not, and obey sub-page permissions or not. That
is worked out once. The rules are those of the replay: ``kvm.ept_violation``, ``kvm.emulator``, ``kvm.large_pages`` and
``trace.replay``, on a machine that was made with these slots and protected before its guest began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.errors import InvalidValue
from engine.footprint.intervals import Numbers
from engine.footprint.places import Footprint, made
from engine.kvm.slots import SlotSpec
from engine.state.profiles import KVM_2019, kvm_version

WIDTH = 52  # bits of the widest guest-physical address
_PAGE_SUBPAGES = 5  # as a shift
_REGION = 512  # pages of the smallest large page
_FAR = np.int64(1 << 60)
_SLICE = 1 << 14  # places that are worked on at one time
# Memory of a mixed place and of each of its pages, while a policy is held against them.
_MIXED, _PIECE = 128, 128

Check = Callable[[int], None]
"""Told how many bytes are about to be taken for a while, 0 between steps of what takes long; raises where they are too
many, or nobody waits for the outcome any more."""


def unbounded(size: int) -> None:
    """The Check of those who have all memory and all time."""


@dataclass(frozen=True)
class Question:
    """``memory_slots`` of the guest, None for writable memory everywhere, and its ``profile``."""

    memory_slots: tuple[SlotSpec, ...] | None = None
    profile: str = KVM_2019

    def validate(self) -> None:
        """Refuse slots that cannot be, or under which an outcome depends on more than the access."""
        kvm_version(self.profile)
        for position, slot in enumerate(self.memory_slots or ()):
            try:
                slot.validate_place()
                slot.validate_width(WIDTH)
                _check_static(slot)
            except InvalidValue as error:
                error.field = f"memory_slots[{position}].{error.field}"
                raise
        placed = sorted(enumerate(self.memory_slots or ()), key=lambda item: item[1].gpa)
        for (_, one), (position, other) in pairwise(placed):
            if one.overlaps(other):
                rule = f"must not overlap another slot: slot {one.slot} ends at {one.gpa + one.size:#x}"
                raise InvalidValue(rule, field=f"memory_slots[{position}].gpa", value=other.gpa)

    @property
    def emulator_obeys(self) -> bool:
        """Whether writes that KVM emulates obey sub-page permissions."""
        return kvm_version(self.profile).subpages.emulator_checks

    @property
    def leaves_large(self) -> bool:
        """Whether pages of large host pages are mapped large, protected or not."""
        return not kvm_version(self.profile).subpages.force_small

    @cached_property
    def _slots(self) -> tuple[Numbers, Numbers, NDArray[np.bool_], NDArray[np.bool_]]:
        """First page, end, read-only, of large host pages: in order of pages."""
        rows = sorted((s.gfn, s.gfn + s.pages, s.read_only, s.host_page_size > 4096) for s in self.memory_slots or ())
        first, end, read_only, large = np.array(rows, dtype=np.int64).reshape(-1, 4).T
        return first, end, read_only.astype(np.bool_), large.astype(np.bool_)

    def pages(self, page: Numbers) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Of pages: have no slot, are in a read-only one, obey no sub-page permissions."""
        if self.memory_slots is None:
            nothing = np.zeros(len(page), dtype=np.bool_)
            return nothing, nothing, nothing
        if not self.memory_slots:
            nothing = np.zeros(len(page), dtype=np.bool_)
            return ~nothing, nothing, nothing
        first, end, read_only, large = self._slots
        at = np.searchsorted(first, page, side="right") - 1
        hole = (at < 0) | (page >= end[at])
        begin = page & ~np.int64(_REGION - 1)
        whole = (first[at] <= begin) & (begin + _REGION <= end[at])
        unenforced = ~hole & large[at] & whole if self.leaves_large else np.zeros(len(page), dtype=np.bool_)
        return hole, ~hole & read_only[at], unenforced

    def without_slot(self, first: Numbers, last: Numbers) -> Numbers:
        """Of each range of pages the first that has no slot, -1 where there is none."""
        found = np.full(len(first), -1, dtype=np.int64)
        if self.memory_slots is None:
            return found
        begins, ends = self._covered
        at = np.searchsorted(begins, first, side="right") - 1
        reached = np.where(at >= 0, np.append(ends, 0)[at], 0)
        missing = np.where(reached > first, reached, first)
        return np.where(missing <= last, missing, found)

    def roomy(self) -> list[tuple[int, int]]:
        """Runs of pages, first and end, that may be written and obey sub-page permissions."""
        if self.memory_slots is None:
            return [(0, 1 << WIDTH - 12)]
        rows = zip(*(column.tolist() for column in self._slots), strict=True)
        return [
            (first, end) for first, end, read_only, large in rows if not read_only and not (large and self.leaves_large)
        ]

    @cached_property
    def _covered(self) -> tuple[Numbers, Numbers]:
        """Runs of slots without a hole: first page and end."""
        first, end, _, _ = self._slots
        if not len(first):
            return first, end
        breaks = np.flatnonzero(first[1:] > end[:-1])
        return first[np.append(0, breaks + 1)], end[np.append(breaks, len(end) - 1)]


def _check_static(slot: SlotSpec) -> None:
    if slot.address_space:
        rule = "must be 0: whether a vCPU is in system-management mode depends on what was before"
        raise InvalidValue(rule, field="address_space", value=slot.address_space)
    if slot.log_dirty:
        rule = "must be false: what a dirty log does to an access depends on what was written before"
        raise InvalidValue(rule, field="log_dirty", value=True)


@dataclass(frozen=True)
class Sorted:
    """The places of a footprint by what a policy can make of them: masks over them, at most one of the first four.

    ``plain``: violate if they touch a sub-page that may not be written. ``paging``: processor's accesses to paging
    structures, which violate if they touch a page with such a sub-page. ``passing``: land all the same, and count as
    unenforced. ``mixed``: over several pages, some of them MMIO or not enforced; see ``Mixed``. ``guarded``: count for
    page granularity if they touch a page with such a sub-page. ``mmio``: meet MMIO, unless they violate before.
    """

    plain: NDArray[np.bool_]
    paging: NDArray[np.bool_]
    passing: NDArray[np.bool_]
    mixed: NDArray[np.bool_]
    guarded: NDArray[np.bool_]
    mmio: NDArray[np.bool_]
    clear: NDArray[np.uint8]
    """How many pages of each, 17 at most, come before the first that is MMIO."""


def slices(footprint: Footprint, check: Check = unbounded) -> Iterator[Footprint]:
    """A footprint in pieces of some thousand places, one at least, so that what is worked out of the pages of each is
    small: a place may be over 17 of them. ``check`` is called before each."""
    for begin in range(0, len(footprint) or 1, _SLICE):
        check(0)
        part = slice(begin, begin + _SLICE)
        columns = {name: column[part] for name, column in footprint.columns().items()}
        yield made(footprint.level, footprint.by, footprint.origins, columns)


def sort_places(footprint: Footprint, question: Question, check: Check = unbounded) -> Sorted:
    """What slots and profile make of the places of a footprint."""
    parts = [_sorted(part, question) for part in slices(footprint, check)]
    return Sorted(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Sorted)))


def _sorted(footprint: Footprint, question: Question) -> Sorted:
    access, kind, source = footprint.access, footprint.kind, footprint.source
    guest, emulated = source == acc.GUEST, source == acc.EMULATED
    writes = access == acc.WRITE
    paging = (kind == acc.PAGING_UPDATE) | (kind == acc.PAGING_READ) & footprint.translated
    asks = (writes | paging) & (source != acc.HOST)
    obeying = asks if question.emulator_obeys else asks & guest
    first, last = footprint.first_subpage >> _PAGE_SUBPAGES, footprint.last_subpage >> _PAGE_SUBPAGES
    clear, enforced, unenforced = _look(question, first, last, asks)
    whole = clear == last - first + 1
    lands = asks & writes & whole & (emulated if not question.emulator_obeys else np.False_)
    plain = obeying & whole & ~unenforced
    landing = obeying & writes & whole & ~enforced
    return Sorted(
        plain=plain & ~paging,
        paging=plain & paging,
        passing=landing | lands,
        mixed=obeying & enforced & (~whole | unenforced),
        guarded=obeying & writes | plain & (kind == acc.PAGING_READ),
        mmio=~whole,
        clear=clear.astype(np.uint8),
    )


def _look(
    question: Question, first: Numbers, last: Numbers, asks: NDArray[np.bool_]
) -> tuple[Numbers, NDArray[np.bool_], NDArray[np.bool_]]:
    """Of places over pages ``first`` to ``last``: how many pages come before the first that is MMIO, and whether one of
    those obeys sub-page permissions, and one does not."""
    count = last - first + 1
    if question.memory_slots is None:
        return count, count > 0, count == 0
    owner = np.repeat(np.arange(len(first)), count)
    begins = np.cumsum(count) - count
    step = np.arange(len(owner)) - begins[owner]
    hole, read_only, unenforced = question.pages(first[owner] + step)
    mmio = hole | read_only & asks[owner]
    if not len(first):
        return count, asks, asks
    clear = np.minimum(np.minimum.reduceat(np.where(mmio, step, _FAR), begins), count)
    reached = step < clear[owner]
    enforced = np.logical_or.reduceat(reached & ~unenforced, begins)
    return clear, enforced, np.logical_or.reduceat(reached & unenforced, begins)


@dataclass(frozen=True)
class Mixed:
    """Places over several pages of which some are MMIO or not enforced, page by page up to the first that is MMIO.

    ``at`` their positions, ``first`` and ``last`` their sub-pages, and what they are. Pieces are of enforced pages
    alone: ``owner`` is the mixed place that each is of, ``piece_first`` and ``piece_last`` are its sub-pages.
    """

    at: Numbers
    first: Numbers
    last: Numbers
    paging: NDArray[np.bool_]
    writes: NDArray[np.bool_]
    mmio: NDArray[np.bool_]
    owner: Numbers
    piece_first: Numbers
    piece_last: Numbers


def mixed_places(footprint: Footprint, question: Question, found: Sorted, check: Check = unbounded) -> Mixed:
    """Those of a footprint."""
    at = np.flatnonzero(found.mixed)
    check(int(found.clear[at].sum()) * _PIECE + len(at) * _MIXED)
    first, last = footprint.first_subpage[at], footprint.last_subpage[at]
    clear = found.clear[at].astype(np.int64)
    owner = np.repeat(np.arange(len(at)), clear)
    page = (first >> _PAGE_SUBPAGES)[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(clear) - clear, clear)
    enforced = ~question.pages(page)[2]
    owner, page = owner[enforced], page[enforced]
    kind = footprint.kind[at]
    return Mixed(
        at,
        first,
        last,
        (kind == acc.PAGING_UPDATE) | (kind == acc.PAGING_READ),
        footprint.access[at] == acc.WRITE,
        found.mmio[at],
        owner,
        np.maximum(first[owner], page << _PAGE_SUBPAGES),
        np.minimum(last[owner], (page << _PAGE_SUBPAGES) + 31),
    )
