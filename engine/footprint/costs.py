"""What policies cost: for each of them what a replay of the traces would count, without one.

The answers are those of a machine that was made with the memory slots, on which the policy was put before the guest
began, and which drops refused writes. What is not in the question (grants, answers of tools, page access, raw entries,
nested guests, host events, translation caches) depends on more than the accesses: replay the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch.sppt import SUBPAGE_SHIFT
from engine.errors import EngineError, InvalidValue
from engine.footprint.combine import coarser as coarser_footprint
from engine.footprint.hits import NEVER, Lines
from engine.footprint.intervals import Numbers, coarser, touched, united
from engine.footprint.places import BYTES, INDEX_BITS, SPANS, UNKNOWN, By, Footprint, made
from engine.footprint.question import (
    WIDTH,
    Check,
    Mixed,
    Question,
    Sorted,
    mixed_places,
    slices,
    sort_places,
    unbounded,
)
from engine.kvm.protections import GRANULARITIES, ProtectedObject, Protection, validate

_PAGE = 12 - SUBPAGE_SHIFT
_SPAN = 200  # memory of a span while sums are made of it
_TOGETHER = 32  # policies that are asked at one time


class First(NamedTuple):
    """The first access of a kind: position of its trace in the footprint, and of its record in the trace."""

    trace: int
    record: int


@dataclass(frozen=True, slots=True)
class ObjectCost:
    """Of one object: its violations; those of them that touched none of its own bytes, None where the footprint has no
    bytes and they cannot be told; the first, None if there is none or it is not known; the sub-pages it covers."""

    violations: int
    collateral: int | None
    first: First | None
    subpages: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one policy costs; totals are those of ``trace.results.TraceResult``.

    ``first`` is the first violation, None if there is none or it is not known; ``subpages`` and ``pages`` are what the
    policy covers.
    """

    name: str
    violations: int
    page_granular_violations: int
    by_object: Mapping[str, ObjectCost]
    mmio: int
    unenforced_writes: int
    first: First | None
    subpages: int
    pages: int


class _Policies:
    """Many policies as arrays: what each covers, and where its objects are."""

    def __init__(self, policies: Sequence[Protection]) -> None:
        objects = [item for policy in policies for item in policy.objects]
        gpa, size = _places(objects)
        shift = np.fromiter((GRANULARITIES[item.granularity] for item in objects), dtype=np.int64, count=len(objects))
        first = gpa >> shift << shift - SUBPAGE_SHIFT
        last = ((gpa + size - 1 >> shift) + 1 << shift - SUBPAGE_SHIFT) - 1
        counts = np.array([len(policy.objects) for policy in policies], dtype=np.int64)
        owner = np.repeat(np.arange(len(policies)), counts)
        self.names: list[tuple[str, ...]] = []
        numbers = np.empty(len(objects), dtype=np.int64)
        at = used = 0
        for policy in policies:
            places: dict[str, int] = {}
            for item in policy.objects:
                numbers[at] = used + places.setdefault(item.name, len(places))
                at += 1
            used += len(places)
            self.names.append(tuple(places))
        ranges = _ranges(policies)
        self.covered = united(
            np.concatenate([owner, ranges[0]]),
            np.concatenate([first, ranges[1]]),
            np.concatenate([last, ranges[2]]),
            len(policies),
        )
        self.pages = coarser(self.covered, _PAGE)
        self.objects = united(numbers, first, last, used)
        self.own = united(numbers, gpa, gpa + size - 1, used)


def _places(objects: Sequence[ProtectedObject]) -> tuple[Numbers, Numbers]:
    """First bytes and sizes."""
    gpa = np.fromiter((item.gpa for item in objects), dtype=np.int64, count=len(objects))
    return gpa, np.fromiter((item.size for item in objects), dtype=np.int64, count=len(objects))


def runs_of(policies: Sequence[Protection]) -> int:
    """How many runs of sub-pages the nameless ranges of policies cover, page by page: what asking them takes is made of
    these."""
    return sum(
        item.npages * (item.mask & ~(item.mask << 1)).bit_count() for policy in policies for item in policy.ranges
    )


def _ranges(policies: Sequence[Protection]) -> tuple[Numbers, Numbers, Numbers]:
    """(policy, first, last sub-page) of the nameless ranges of policies: runs of sub-pages that are covered."""
    rows = [
        (number, item.gfn, item.npages, item.mask) for number, policy in enumerate(policies) for item in policy.ranges
    ]
    if not rows:
        return (np.zeros(0, dtype=np.int64),) * 3
    policy_of, gfn, npages, mask = np.array(rows, dtype=np.int64).T
    covered = np.zeros((len(rows), 34), dtype=np.int8)
    covered[:, 1:-1] = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little").reshape(-1, 32)
    edges = np.diff(covered, axis=1)
    item, begin = np.nonzero(edges == 1)
    end = np.nonzero(edges == -1)[1] - 1
    pages = npages[item]
    run = np.repeat(np.arange(len(item)), pages)
    page = np.arange(len(run)) - np.repeat(np.cumsum(pages) - pages, pages) + gfn[item][run] << _PAGE
    return policy_of[item][run], page + begin[run], page + end[run]


def _check_slots(policies: Sequence[Protection], question: Question) -> None:
    """Refuse what a machine with these slots would: a policy over pages without one."""
    if question.memory_slots is None:
        return
    gpa, size = _places([item for policy in policies for item in policy.objects])
    _check_pages(policies, question, gpa >> 12, gpa + size - 1 >> 12, named=True)
    rows = [(item.gfn, item.gfn + item.npages - 1) for policy in policies for item in policy.ranges]
    if rows:
        first, last = np.array(rows, dtype=np.int64).T
        _check_pages(policies, question, first, last, named=False)


def _check_pages(
    policies: Sequence[Protection], question: Question, first: Numbers, last: Numbers, *, named: bool
) -> None:
    """``_check_slots`` of the pages of all objects, or of all ranges, of policies."""
    missing = question.without_slot(first, last)
    lacking = np.flatnonzero(missing >= 0)
    if not len(lacking):
        return
    counts = [len(policy.objects if named else policy.ranges) for policy in policies]
    number = int(np.searchsorted(np.cumsum(counts), lacking[0], side="right"))
    position = int(lacking[0]) - sum(counts[:number])
    if named:
        where, value = f"objects[{position}].gpa", policies[number].objects[position].gpa
    else:
        where, value = f"pages[{position}][0]", policies[number].ranges[position].gfn
    raise _no_slot(policies, number, where, value, int(missing[lacking[0]]))


def _no_slot(policies: Sequence[Protection], number: int, field: str, value: int, page: int) -> InvalidValue:
    rule = f"must have a memory slot for every page; GFN {page:#x} has none"
    where = "" if len(policies) == 1 else f"policies[{number}]."
    return InvalidValue(rule, field=where + field, value=value, errno="EFAULT")


class Costs:
    """What policies cost on one footprint, under one question. Made once; each further policy is a few look-ups."""

    def __init__(self, footprint: Footprint, question: Question | None = None, check: Check = unbounded) -> None:
        """Raises InvalidValue for a question that means nothing or has no answer, and what ``check`` does."""
        self.question = question or Question()
        self.question.validate()
        fine = coarser_footprint(footprint, by=By(), check=check)
        spans = coarser_footprint(fine, SPANS, check=check)
        check(len(spans) * _SPAN)
        found = sort_places(spans, self.question, check)
        first, extent = spans.first_subpage, spans.extent
        page = first >> _PAGE
        pages = (spans.last_subpage >> _PAGE) - page + 1
        rank, count = spans.rank, spans.count
        self._mmio = int(count[found.mmio].sum())
        self._plain = Lines(found.plain, first, extent, count, rank)
        self._paging = Lines(found.paging, first, extent, count, rank)
        self._paging_pages = Lines(found.paging, page, pages, count, rank)
        self._passing = Lines(found.passing, first, extent, count, None)
        self._guarded = Lines(found.guarded, page, pages, count, None)
        self._in_bytes = fine.level == BYTES
        sorted_fine = found if fine is spans else sort_places(fine, self.question, check)
        self._own = _own(fine, sorted_fine)
        self._mixed = mixed_places(fine, self.question, sorted_fine, check)
        columns = {name: column[self._mixed.at] for name, column in fine.columns().items()}
        self._mixed_fine = made(fine.level, fine.by, fine.origins, columns)

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept of the footprint."""
        lines = (self._plain, self._paging, self._paging_pages, self._passing, self._guarded, self._own)
        mixed: int = sum(getattr(self._mixed, item.name).nbytes for item in fields(Mixed))
        return sum(line.nbytes for line in lines) + mixed + self._mixed_fine.nbytes

    @property
    def mixed(self) -> int:
        """Places over pages of several sorts, and the pages of them: each is looked at for each policy and object."""
        return len(self._mixed.at) + len(self._mixed.owner)

    def of(self, policies: Sequence[Protection], check: Check = unbounded) -> list[Cost]:
        """What each policy costs. Raises EngineError, with the position of the policy where there are several, for one
        that no machine with these slots takes, and what ``check`` does, which is called every moment."""
        for number, policy in enumerate(policies):
            check(0)
            try:
                validate(policy, WIDTH)
            except EngineError as error:
                error.field = error.field if len(policies) == 1 else f"policies[{number}].{error.field}"
                raise
        _check_slots(policies, self.question)
        found: list[Cost] = []
        for begin in range(0, len(policies), _TOGETHER):
            found += self._of(policies[begin : begin + _TOGETHER], lambda: check(0))
        return found

    def _of(self, policies: Sequence[Protection], check: Callable[[], None]) -> list[Cost]:
        """What each of some policies costs, which are valid."""
        check()
        given = _Policies(policies)
        violations, ranks = self._plain.touching(given.covered, check)
        paging, paging_ranks = self._paging_pages.touching(given.pages, check)
        violations, ranks = violations + paging, np.minimum(ranks, paging_ranks)
        guarded, _ = self._guarded.touching(given.pages, check)
        passing, _ = self._passing.touching(given.covered, check)
        mmio = np.full(len(policies), self._mmio, dtype=np.int64)
        hits, first = self._plain.touching(given.objects, check)
        more, more_first = self._paging.touching(given.objects, check)
        hits, first = hits + more, np.minimum(first, more_first)
        own = self._own.touching(given.own, check)[0] if self._in_bytes else np.zeros(len(hits), dtype=np.int64)
        objects = np.append(0, np.cumsum([len(names) for names in given.names]))
        totals = _Totals(violations, ranks, guarded, passing, mmio, hits, first, own)
        if len(self._mixed.at):
            for number in range(len(policies)):
                self._add_mixed(totals, given, number, range(int(objects[number]), int(objects[number + 1])), check)
        return self._costs(policies, given, totals, objects)

    def of_nothing(self, name: str) -> Cost:
        """What the accesses cost where nothing is protected."""
        return Cost(name, 0, 0, {}, self._mmio, 0, None, 0, 0)

    def _add_mixed(
        self, totals: _Totals, given: _Policies, number: int, objects: range, check: Callable[[], None]
    ) -> None:
        """Add the places over pages of several sorts, one by one, for one policy and its objects."""
        check()
        mixed = self._mixed
        covered, pages = given.covered.lot(number), given.pages.lot(number)
        near = touched(pages, mixed.first >> _PAGE, mixed.last >> _PAGE)
        if not near.any():
            return
        fine = self._mixed_fine
        refused = _refused(mixed, covered, pages)
        count, rank = fine.count, fine.rank
        totals.violations[number] += count[refused].sum()
        totals.ranks[number] = min(totals.ranks[number], rank[refused].min(initial=NEVER))
        totals.mmio[number] -= count[refused & mixed.mmio].sum()
        totals.guarded[number] += count[refused & ~mixed.writes].sum()
        lands = ~refused & ~mixed.mmio & mixed.writes & touched(covered, mixed.first, mixed.last)
        totals.passing[number] += count[lands].sum()
        if not refused.any():
            return
        for item in objects:
            check()
            hit = refused & touched(given.objects.lot(item), mixed.first, mixed.last)
            totals.hits[item] += count[hit].sum()
            totals.first[item] = min(totals.first[item], rank[hit].min(initial=NEVER))
            if self._in_bytes:
                low, high = fine.begin.view(np.int64), fine.last
                totals.own[item] += count[refused & touched(given.own.lot(item), low, high)].sum()

    def _costs(self, policies: Sequence[Protection], given: _Policies, totals: _Totals, objects: Numbers) -> list[Cost]:
        subpages = given.objects.sizes
        collateral = self._collateral(given, totals, subpages)
        hits, firsts = totals.hits.tolist(), [_first(rank) for rank in totals.first.tolist()]
        items = [
            ObjectCost(violations, beside, first, covers)
            for violations, beside, first, covers in zip(hits, collateral, firsts, subpages.tolist(), strict=True)
        ]
        columns = zip(
            policies,
            given.names,
            objects[:-1].tolist(),
            totals.violations.tolist(),
            totals.guarded.tolist(),
            totals.mmio.tolist(),
            totals.passing.tolist(),
            totals.ranks.tolist(),
            given.covered.sizes.tolist(),
            given.pages.sizes.tolist(),
            strict=True,
        )
        return [
            Cost(
                policy.name,
                violations,
                guarded,
                dict(zip(names, items[begin : begin + len(names)], strict=True)),
                mmio,
                passing,
                _first(rank),
                covers,
                pages,
            )
            for policy, names, begin, violations, guarded, mmio, passing, rank, covers, pages in columns
        ]

    def _collateral(self, given: _Policies, totals: _Totals, subpages: Numbers) -> list[int | None]:
        """Of each object; without bytes it is known where there is nothing, or no byte is a neighbour's."""
        if self._in_bytes:
            return list((totals.hits - totals.own).tolist())
        filled = given.own.sizes == subpages << SUBPAGE_SHIFT
        known = filled | (totals.hits == 0)
        return [0 if certain else None for certain in known.tolist()]


def _first(rank: int) -> First | None:
    return None if rank in (NEVER, UNKNOWN) else First(rank >> INDEX_BITS, rank & (1 << INDEX_BITS) - 1)


class Outcome(NamedTuple):
    """Masks over the places of a footprint: those that violate, and those that page granularity would have stopped."""

    refused: NDArray[np.bool_]
    page_granular: NDArray[np.bool_]


def refused_places(footprint: Footprint, policy: Protection, question: Question | None = None) -> NDArray[np.bool_]:
    """Which places of a footprint violate under a policy. Raises what ``Costs`` and its ``of`` do."""
    return outcome(footprint, policy, question).refused


def outcome(
    footprint: Footprint, policy: Protection, question: Question | None = None, check: Check = unbounded
) -> Outcome:
    """What becomes of the places of a footprint under a policy. Raises what ``Costs`` and its ``of`` do."""
    question = question or Question()
    question.validate()
    validate(policy, WIDTH)
    _check_slots([policy], question)
    given = _Policies([policy])
    parts = [_outcome(part, given, question) for part in slices(footprint, check)]
    return Outcome(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _outcome(footprint: Footprint, given: _Policies, question: Question) -> Outcome:
    found = sort_places(footprint, question)
    mixed = mixed_places(footprint, question, found)
    first, last = footprint.first_subpage, footprint.last_subpage
    covered, pages = given.covered.lot(0), given.pages.lot(0)
    refused = found.plain & touched(covered, first, last)
    refused |= found.paging & touched(pages, first >> _PAGE, last >> _PAGE)
    refused[mixed.at] = _refused(mixed, covered, pages)
    page_granular = found.guarded & touched(pages, first >> _PAGE, last >> _PAGE)
    page_granular[mixed.at] |= refused[mixed.at] & ~mixed.writes
    return Outcome(refused, page_granular)


def _refused(mixed: Mixed, covered: tuple[Numbers, Numbers], pages: tuple[Numbers, Numbers]) -> NDArray[np.bool_]:
    """Which of the mixed places violate."""
    paging = mixed.paging[mixed.owner]
    hit = np.where(
        paging,
        touched(pages, mixed.piece_first >> _PAGE, mixed.piece_last >> _PAGE),
        touched(covered, mixed.piece_first, mixed.piece_last),
    )
    refused = np.zeros(len(mixed.at), dtype=np.bool_)
    refused[mixed.owner[hit]] = True
    return refused


class _Totals(NamedTuple):
    """int64 arrays to be added to: one number for each policy, the last three one for each object."""

    violations: Numbers
    ranks: Numbers
    guarded: Numbers
    passing: Numbers
    mmio: Numbers
    hits: Numbers
    first: Numbers
    own: Numbers


def _own(footprint: Footprint, found: Sorted) -> Lines:
    """Places of bytes that violate if they touch one of an object; none of spans, which do not tell."""
    taken = found.plain | found.paging if footprint.level == BYTES else np.zeros(len(footprint), dtype=np.bool_)
    return Lines(taken, footprint.begin.view(np.int64), footprint.extent, footprint.count, None)


def costs(footprint: Footprint, policies: Sequence[Protection], question: Question | None = None) -> list[Cost]:
    """What policies cost on a footprint; see ``Costs``."""
    return Costs(footprint, question).of(policies)
