"""Which neighbours a policy pays for, what it would cost without them, and what is too dear at a budget of exits.

Every piece of advice is an edit, and its price is what the edited policy costs: moved objects take the accesses to
their own bytes along (``moved``), everything else stays where it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch.sppt import SUBPAGE_SHIFT
from engine.errors import InvalidValue
from engine.footprint.combine import coarser, gathered
from engine.footprint.costs import Cost, Costs, outcome
from engine.footprint.intervals import Numbers, touched, united
from engine.footprint.places import BYTES, By, Footprint, made
from engine.footprint.question import WIDTH, Check, Question, slices, unbounded
from engine.kvm.protections import ProtectedObject, Protection, page_masks, validate

MOVE, NARROW = "move", "narrow"
MOST_NEIGHBOURS = 8
_SUBPAGE = 1 << SUBPAGE_SHIFT
_PAGE = 4096
_RUN_BITS = 5  # that a number of pages of one place has, less one
_NONE = np.zeros(0, dtype=np.int64)
# Memory of a place near a policy while objects are moved, and of a run of pages that are accessed elsewhere.
_NEAR, _RUN = 400, 64


class Neighbour(NamedTuple):
    """Bytes beside an object, in its sub-pages, and the violations that accesses to them cost."""

    gpa: int
    size: int
    violations: int


@dataclass(frozen=True, slots=True)
class Advice:
    """One edit of a policy: an object is moved to sub-pages of its own at ``to``, or protected by sub-pages instead of
    pages. ``cost`` is that of the whole policy then, and ``saves`` the difference in violations."""

    object: str
    action: str
    to: int | None
    saves: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class Cut:
    """What is left out of a policy so that its exits are within a budget: the dearest objects first."""

    budget: float
    dropped: tuple[str, ...]
    cost: Cost


@dataclass(frozen=True, slots=True)
class Report:
    """``cost`` as the policy is; ``neighbours`` of each object that pays for some; edits that save something, the best
    first; ``together`` what the policy costs with all of its objects moved; ``cut`` where a budget was given."""

    cost: Cost
    neighbours: dict[str, tuple[Neighbour, ...]]
    advice: tuple[Advice, ...]
    together: Cost | None
    cut: Cut | None


def advise(
    footprint: Footprint,
    policy: Protection,
    question: Question | None = None,
    budget: float | None = None,
    check: Check = unbounded,
    costs: Costs | None = None,
) -> Report:
    """What to do about a policy. ``budget`` is how many violations the accesses of the footprint may cost; ``costs``
    are those of the footprint under this question, where they are there.

    Raises InvalidValue where the footprint has no bytes, and what ``Costs``, its ``of`` and ``check`` raise.
    """
    if footprint.level != BYTES:
        rule = "must be bytes: sub-pages do not tell an object from its neighbours"
        raise InvalidValue(rule, field="level", value=footprint.level)
    validate(policy, WIDTH)
    question, policy = question or Question(), by_objects(policy)
    fine = coarser(footprint, by=By(), check=check)
    costs = costs or Costs(fine, question, check)
    (cost,) = costs.of([policy], check)
    guest = _Guest.of(fine, policy, cost, question, check)
    refused = outcome(guest.near, policy, question, check).refused
    paying = [item for item in _single(policy) if cost.by_object[item.name].collateral]
    neighbours = {item.name: _neighbours(guest.near, refused, item) for item in paying}
    edits = [_narrowed(costs, policy, item, cost, check) for item in paying if item.granularity == "page"]
    edits += [edit for item in paying for edit in _moved_away(guest, policy, item, cost)]
    useful = sorted((edit for edit in edits if edit.saves > 0), key=lambda edit: -edit.saves)
    away = [edit.object for edit in useful if edit.action == MOVE]
    together = _all_moved(guest, policy, away) if len(away) > 1 else None
    cut = None if budget is None else _cut(costs, policy, cost, budget, check)
    return Report(cost, neighbours, tuple(useful), together, cut)


@dataclass(frozen=True, slots=True)
class _Guest:
    """The accesses as advice looks at them. What touches no page of a policy costs it nothing, wherever its objects are
    moved that nobody comes: of these places there are their pages, ``far``, and what they count as MMIO. ``near`` are
    the others."""

    near: Footprint
    far: tuple[Numbers, Numbers]
    mmio: int
    question: Question
    check: Check

    @classmethod
    def of(cls, fine: Footprint, policy: Protection, cost: Cost, question: Question, check: Check) -> _Guest:
        """``cost`` is what the policy costs on ``fine``."""
        protected, near, far = _pages_of(policy), [], []
        for part in slices(fine, check):
            begin, end = part.begin.view(np.int64) >> 12, part.last >> 12
            close = touched(protected, begin, end)
            near.append({name: column[close] for name, column in part.columns().items()})
            far.append(np.unique(begin[~close] << _RUN_BITS | (end - begin)[~close]))
        check(sum(len(rows["begin"]) for rows in near) * _NEAR + sum(map(len, far)) * _RUN)
        columns = {name: np.concatenate([rows[name] for rows in near]) for name in near[0]}
        runs = np.unique(np.concatenate(far))
        pages = _united(runs >> _RUN_BITS, (runs >> _RUN_BITS) + (runs & (1 << _RUN_BITS) - 1))
        found = cls(made(fine.level, fine.by, fine.origins, columns), pages, 0, question, check)
        return replace(found, mmio=cost.mmio - found.cost(found.near, policy).mmio)

    def cost(self, near: Footprint, policy: Protection) -> Cost:
        """What a policy costs where objects of it were moved, and ``near`` with them."""
        self.check(len(near) * _NEAR)
        (cost,) = Costs(near, self.question, self.check).of([policy], self.check)
        return replace(cost, mmio=cost.mmio + self.mmio)

    def place(self, near: Footprint, policy: Protection, item: ProtectedObject) -> int | None:
        """As ``free_place``."""
        return free_place(near, self.question, policy, item, self.far)


def _united(first: Numbers, last: Numbers) -> tuple[Numbers, Numbers]:
    """Ranges in any order as ranges in order that do not touch."""
    return united(np.zeros(len(first), dtype=np.int64), first, last, 1).lot(0)


def _pages_of(policy: Protection) -> tuple[Numbers, Numbers]:
    """Ranges of pages that a policy is about."""
    rows = [(item.gpa >> 12, item.gpa + item.size - 1 >> 12) for item in policy.objects]
    rows += [(item.gfn, item.gfn + item.npages - 1) for item in policy.ranges]
    first, last = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    return _united(first, last)


def by_objects(policy: Protection) -> Protection:
    """A policy without its nameless pages where these only repeat what its objects cover: an object takes them along
    when it moves."""
    whole, named = page_masks(policy.objects, policy.ranges), page_masks(policy.objects)
    repeats = all(np.array_equal(one, other) for one, other in zip(whole, named, strict=True))
    return replace(policy, ranges=()) if repeats else policy


def applied(policy: Protection, advice: Advice) -> Protection:
    """The policy with an edit."""
    policy = by_objects(policy)
    changes = {"gpa": advice.to} if advice.action == MOVE else {"granularity": "subpage"}
    objects = (replace(item, **changes) if item.name == advice.object else item for item in policy.objects)
    return replace(policy, objects=tuple(objects))


def moved(footprint: Footprint, item: ProtectedObject, to: int) -> Footprint:
    """The same accesses with those that touch bytes of an object where the object is then: at ``to``."""
    begin = footprint.begin.view(np.int64)
    own = (begin < item.gpa + item.size) & (footprint.last >= item.gpa)
    columns = footprint.columns()
    columns["begin"] = np.where(own, begin + (to - item.gpa), begin).view(np.uint64)
    return gathered(footprint.level, footprint.by, footprint.origins, columns)


def _single(policy: Protection) -> list[ProtectedObject]:
    """Objects that are one range each: the others cannot be moved by one distance."""
    names = Counter(item.name for item in policy.objects)
    return [item for item in policy.objects if names[item.name] == 1]


def _neighbours(fine: Footprint, refused: NDArray[np.bool_], item: ProtectedObject) -> tuple[Neighbour, ...]:
    """Runs of bytes whose accesses are an object's collateral, the dearest first."""
    begin, last = fine.begin.view(np.int64), fine.last
    low, high = np.searchsorted(begin, [item.first_subpage * _SUBPAGE - 65535, (item.last_subpage + 1) * _SUBPAGE])
    near = np.arange(low, high)
    near = near[refused[near] & (last[near] >= item.first_subpage * _SUBPAGE)]
    near = near[(begin[near] >= item.gpa + item.size) | (last[near] < item.gpa)]
    runs = united(np.zeros(len(near), dtype=np.int64), begin[near], last[near], 1)
    counts = np.zeros(len(runs.first), dtype=np.int64)
    np.add.at(counts, np.searchsorted(runs.first, begin[near], side="right") - 1, fine.count[near])
    order = np.argsort(-counts, kind="stable")[:MOST_NEIGHBOURS]
    return tuple(
        Neighbour(int(runs.first[at]), int(runs.last[at] - runs.first[at]) + 1, int(counts[at])) for at in order
    )


def _narrowed(costs: Costs, policy: Protection, item: ProtectedObject, now: Cost, check: Check) -> Advice:
    edit = Advice(item.name, NARROW, None, 0, now)
    (cost,) = costs.of([applied(policy, edit)], check)
    return replace(edit, saves=now.violations - cost.violations, cost=cost)


def _moved_away(guest: _Guest, policy: Protection, item: ProtectedObject, now: Cost) -> list[Advice]:
    """One edit, or none where there is no place."""
    to = guest.place(guest.near, policy, item)
    if to is None:
        return []
    edit = Advice(item.name, MOVE, to, 0, now)
    cost = guest.cost(moved(guest.near, item, to), applied(policy, edit))
    return [replace(edit, saves=now.violations - cost.violations, cost=cost)]


def _all_moved(guest: _Guest, policy: Protection, names: Sequence[str]) -> Cost | None:
    near = guest.near
    for name in names:
        guest.check(len(near) * _NEAR)
        item = next(item for item in policy.objects if item.name == name)
        to = guest.place(near, policy, item)
        if to is None:
            return None
        near = moved(near, item, to)
        objects = (replace(other, gpa=to) if other is item else other for other in policy.objects)
        policy = replace(policy, objects=tuple(objects))
    return guest.cost(near, policy)


def _cut(costs: Costs, policy: Protection, now: Cost, budget: float, check: Check) -> Cut:
    """The fewest objects, the dearest first, without which a policy is within a budget, or as near as it comes."""
    order = sorted(now.by_object, key=lambda name: -now.by_object[name].violations)

    def without(count: int) -> Cost:
        names = set(order[:count])
        left = replace(policy, objects=tuple(item for item in policy.objects if item.name not in names))
        return costs.of([left], check)[0] if left.objects or left.ranges else costs.of_nothing(policy.name)

    few, many = 0, len(order)
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if without(middle).violations <= budget else (middle + 1, many)
    return Cut(budget, tuple(order[:few]), without(few))


def free_place(
    fine: Footprint,
    question: Question,
    policy: Protection,
    item: ProtectedObject,
    far: tuple[Numbers, Numbers] = (_NONE, _NONE),
) -> int | None:
    """Where an object can be moved: writable, enforced pages that nothing accesses or protects, ``far`` among those
    that are accessed, with room for all accesses to it. None where there are none."""
    begin, last = fine.begin.view(np.int64), fine.last
    own = (begin < item.gpa + item.size) & (last >= item.gpa)
    low = min(item.gpa, int(begin[own].min(initial=item.gpa)))
    high = max(item.gpa + item.size - 1, int(last[own].max(initial=item.gpa)))
    before = -(-(item.gpa - low) // _PAGE)
    pages = before + (high - item.gpa) // _PAGE + 1
    taken = [(begin >> 12, last >> 12), _pages_of(policy), far]
    first, end = _united(*(np.concatenate([pair[at] for pair in taken]) for at in range(2)))
    for slot_first, slot_end in question.roomy():
        gaps_first = np.append(slot_first, np.maximum(end + 1, slot_first))
        gaps_end = np.append(first, slot_end).clip(slot_first, slot_end)
        gaps_first = gaps_first.clip(slot_first, slot_end)
        fits = np.flatnonzero(gaps_end - gaps_first >= pages)
        # The last one is the furthest from everything.
        for at in fits[::-1].tolist():
            page = int(gaps_first[at])
            if not touched((first, end), np.array([page]), np.array([page + pages - 1])).any():
                return page + before << 12
    return None
