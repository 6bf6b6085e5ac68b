"""Which neighbours a policy pays for, what it would cost without them, and what is too dear at a budget of exits.

Every piece of advice is an edit, and its price is what the edited policy costs: moved objects take the accesses to
their own bytes along (``moved``), everything else stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch.sppt import SUBPAGE_SHIFT
from engine.errors import InvalidValue
from engine.footprint.combine import coarser, gathered
from engine.footprint.costs import Cost, Costs, refused_places
from engine.footprint.intervals import touched, united
from engine.footprint.places import BYTES, By, Footprint
from engine.footprint.question import Question
from engine.kvm.protections import ProtectedObject, Protection, page_masks

MOVE, NARROW = "move", "narrow"
MOST_NEIGHBOURS = 8
_SUBPAGE = 1 << SUBPAGE_SHIFT
_PAGE = 4096
_RUN_BITS = 5  # that a number of pages of one place has, less one


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
    footprint: Footprint, policy: Protection, question: Question | None = None, budget: float | None = None
) -> Report:
    """What to do about a policy. ``budget`` is how many violations the accesses of the footprint may cost.

    Raises InvalidValue where the footprint has no bytes, and what ``Costs`` raises.
    """
    if footprint.level != BYTES:
        rule = "must be bytes: sub-pages do not tell an object from its neighbours"
        raise InvalidValue(rule, field="level", value=footprint.level)
    question, policy = question or Question(), by_objects(policy)
    fine = coarser(footprint, by=By())
    costs = Costs(fine, question)
    (cost,) = costs.of([policy])
    refused = refused_places(fine, policy, question)
    paying = [item for item in _single(policy) if cost.by_object[item.name].collateral]
    neighbours = {item.name: _neighbours(fine, refused, item) for item in paying}
    edits = [_narrowed(costs, policy, item, cost) for item in paying if item.granularity == "page"]
    edits += [edit for item in paying for edit in _moved_away(fine, question, policy, item, cost)]
    useful = sorted((edit for edit in edits if edit.saves > 0), key=lambda edit: -edit.saves)
    away = [edit.object for edit in useful if edit.action == MOVE]
    together = _all_moved(fine, question, policy, away) if len(away) > 1 else None
    cut = None if budget is None else _cut(costs, policy, cost, budget)
    return Report(cost, neighbours, tuple(useful), together, cut)


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
    names = [item.name for item in policy.objects]
    return [item for item in policy.objects if names.count(item.name) == 1]


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


def _narrowed(costs: Costs, policy: Protection, item: ProtectedObject, now: Cost) -> Advice:
    edit = Advice(item.name, NARROW, None, 0, now)
    (cost,) = costs.of([applied(policy, edit)])
    return replace(edit, saves=now.violations - cost.violations, cost=cost)


def _moved_away(
    fine: Footprint, question: Question, policy: Protection, item: ProtectedObject, now: Cost
) -> list[Advice]:
    """One edit, or none where there is no place."""
    to = free_place(fine, question, policy, item)
    if to is None:
        return []
    edit = Advice(item.name, MOVE, to, 0, now)
    (cost,) = Costs(moved(fine, item, to), question).of([applied(policy, edit)])
    return [replace(edit, saves=now.violations - cost.violations, cost=cost)]


def _all_moved(fine: Footprint, question: Question, policy: Protection, names: Sequence[str]) -> Cost | None:
    for name in names:
        item = next(item for item in policy.objects if item.name == name)
        to = free_place(fine, question, policy, item)
        if to is None:
            return None
        fine = moved(fine, item, to)
        objects = (replace(other, gpa=to) if other is item else other for other in policy.objects)
        policy = replace(policy, objects=tuple(objects))
    return Costs(fine, question).of([policy])[0]


def _cut(costs: Costs, policy: Protection, now: Cost, budget: float) -> Cut:
    """The fewest objects, the dearest first, without which a policy is within a budget, or as near as it comes."""
    order = sorted(now.by_object, key=lambda name: -now.by_object[name].violations)

    def without(count: int) -> Cost:
        names = set(order[:count])
        left = replace(policy, objects=tuple(item for item in policy.objects if item.name not in names))
        return costs.of([left])[0] if left.objects or left.ranges else costs.of_nothing(policy.name)

    few, many = 0, len(order)
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if without(middle).violations <= budget else (middle + 1, many)
    return Cut(budget, tuple(order[:few]), without(few))


def free_place(fine: Footprint, question: Question, policy: Protection, item: ProtectedObject) -> int | None:
    """Where an object can be moved: writable, enforced pages that nothing accesses or protects, with room for all
    accesses to it. None where there are none."""
    begin, last = fine.begin.view(np.int64), fine.last
    own = (begin < item.gpa + item.size) & (last >= item.gpa)
    low = min(item.gpa, int(begin[own].min(initial=item.gpa)))
    high = max(item.gpa + item.size - 1, int(last[own].max(initial=item.gpa)))
    before = -(-(item.gpa - low) // _PAGE)
    pages = before + (high - item.gpa) // _PAGE + 1
    runs = np.unique((begin >> 12) << _RUN_BITS | (last >> 12) - (begin >> 12))
    taken = [(runs >> _RUN_BITS, (runs >> _RUN_BITS) + (runs & (1 << _RUN_BITS) - 1))]
    taken += [(np.array([o.gpa >> 12]), np.array([o.gpa + o.size - 1 >> 12])) for o in policy.objects]
    taken += [(np.array([r.gfn]), np.array([r.gfn + r.npages - 1])) for r in policy.ranges]
    first, end = (np.concatenate([pair[at] for pair in taken]) for at in range(2))
    used = united(np.zeros(len(first), dtype=np.int64), first, end, 1)
    for slot_first, slot_end in question.roomy():
        gaps_first = np.append(slot_first, np.maximum(used.last + 1, slot_first))
        gaps_end = np.append(used.first, slot_end).clip(slot_first, slot_end)
        gaps_first = gaps_first.clip(slot_first, slot_end)
        fits = np.flatnonzero(gaps_end - gaps_first >= pages)
        # The last one is the furthest from everything.
        for at in fits[::-1].tolist():
            page = int(gaps_first[at])
            if not touched((used.first, used.last), np.array([page]), np.array([page + pages - 1])).any():
                return page + before << 12
    return None
