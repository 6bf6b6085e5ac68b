"""What a footprint shows without a replay: its pages, its buckets of time and its writers, each with what it counts.

With ``refused`` (``costs.refused_places``) also how many violations each has under a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.errors import InvalidValue, LimitExceeded
from engine.footprint.costs import Outcome
from engine.footprint.intervals import Numbers
from engine.footprint.places import Footprint
from engine.footprint.question import Check, slices, unbounded

Mask = NDArray[np.bool_]
_PAGE = 5  # sub-pages of a page, as a shift
_ROW = 128  # memory of a key while it is added up


class Counts(NamedTuple):
    """Equally long columns: ``key`` uint64 in order (a page's number, a bucket, a pc), accesses, writes, violations;
    ``subpages`` uint32, those of a page that are touched, empty for the others."""

    key: NDArray[np.uint64]
    accesses: Numbers
    writes: Numbers
    violations: Numbers
    subpages: NDArray[np.uint32]

    def order(self) -> Numbers:
        """Positions, those with the most violations first, then writes, then accesses."""
        return np.lexsort((self.key, -self.accesses, -self.writes, -self.violations))

    def most(self, count: int) -> list[int]:
        """The first positions of ``order``."""
        return [int(at) for at in self.order()[:count]]


def pages(footprint: Footprint, refused: Mask | None = None, check: Check = unbounded) -> Counts:
    """By page. An access over several pages counts in each. Raises what ``check`` does."""
    return _in_slices(_pages, footprint, refused, check)


def _pages(footprint: Footprint, refused: Mask | None) -> Counts:
    first, last = footprint.first_subpage, footprint.last_subpage
    spanned = (last >> _PAGE) - (first >> _PAGE) + 1
    owner = np.repeat(np.arange(len(first)), spanned)
    page = (first >> _PAGE)[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(spanned) - spanned, spanned)
    low = np.maximum(first[owner] - (page << _PAGE), 0)
    high = np.minimum(last[owner] - (page << _PAGE), 31)
    masks = ((np.int64(2) << high) - (np.int64(1) << low)).astype(np.uint32)
    count = footprint.count[owner]
    writes = np.where(footprint.access[owner] == acc.WRITE, count, 0)
    violations = np.zeros(len(owner), dtype=np.int64) if refused is None else np.where(refused[owner], count, 0)
    return _added(Counts(page.view(np.uint64), count, writes, violations, masks))


def timeline(footprint: Footprint, refused: Mask | None = None, check: Check = unbounded) -> Counts:
    """By bucket, those without an access left out. Raises InvalidValue where places are not apart by them, and what
    ``check`` does."""
    return _in_slices(
        lambda part, mask: _counted(_there(part.bucket, "time or records"), part, mask), footprint, refused, check
    )


class Bucket(NamedTuple):
    """Its number, and what a policy costs in it."""

    bucket: int
    violations: int
    page_granular_violations: int


def costs_over_time(
    footprint: Footprint, found: Outcome, most: int | None = None, check: Check = unbounded
) -> list[Bucket]:
    """What a policy costs by bucket, those in which it costs nothing left out. Raises as ``timeline`` does, and
    LimitExceeded where there are more than ``most``."""
    bucket, count = _there(footprint.bucket, "time or records"), footprint.count
    taken = found.refused | found.page_granular
    check(int(np.count_nonzero(taken)) * _ROW)
    keys, place = np.unique(bucket[taken], return_inverse=True)
    if most is not None and len(keys) > most:
        rule = f"must be false where a policy costs something in more than {most} buckets: make them larger"
        raise LimitExceeded(rule, field="timeline", value=len(keys))
    sums = [np.zeros(len(keys), dtype=np.int64) for _ in found]
    for total, mask in zip(sums, found, strict=True):
        np.add.at(total, place, np.where(mask[taken], count[taken], 0))
    return [Bucket(*row) for row in zip(keys.tolist(), *(total.tolist() for total in sums), strict=True)]


def writers(footprint: Footprint, refused: Mask | None = None, check: Check = unbounded) -> Counts:
    """By address of the instruction. Raises InvalidValue where places are not apart by it, and what ``check`` does."""
    return _in_slices(lambda part, mask: _counted(_there(part.pc, "pc"), part, mask), footprint, refused, check)


def _there(column: NDArray[np.uint64] | None, name: str) -> NDArray[np.uint64]:
    if column is None:
        raise InvalidValue(f"must have been made by {name}", field="by", value=None)
    return column


def _counted(key: NDArray[np.uint64], footprint: Footprint, refused: Mask | None) -> Counts:
    """Counts by ``key``, one for each place."""
    count = footprint.count
    writes = np.where(footprint.access == acc.WRITE, count, 0)
    violations = np.zeros(len(count), dtype=np.int64) if refused is None else np.where(refused, count, 0)
    return _added(Counts(key, count, writes, violations, np.zeros(0, dtype=np.uint32)))


def _in_slices(
    counted: Callable[[Footprint, Mask | None], Counts], footprint: Footprint, refused: Mask | None, check: Check
) -> Counts:
    """Counts of a footprint, those of some places at a time added up: what each takes is more than what is left."""
    parts: list[Counts] = []
    done = rows = 0
    for part in slices(footprint, check):
        parts.append(counted(part, None if refused is None else refused[done : done + len(part)]))
        done += len(part)
        rows += len(parts[-1].key)
        check(rows * _ROW)
    return _added(Counts(*(np.concatenate(column) for column in zip(*parts, strict=True))))


def _added(rows: Counts) -> Counts:
    """One row for each key, in order."""
    keys, place = np.unique(rows.key, return_inverse=True)
    sums = [np.zeros(len(keys), dtype=np.int64) for _ in range(3)]
    for total, values in zip(sums, (rows.accesses, rows.writes, rows.violations), strict=True):
        np.add.at(total, place, values)
    touched = np.zeros(len(keys) if len(rows.subpages) else 0, dtype=np.uint32)
    if len(touched):
        np.bitwise_or.at(touched, place, rows.subpages)
    return Counts(keys, sums[0], sums[1], sums[2], touched)
