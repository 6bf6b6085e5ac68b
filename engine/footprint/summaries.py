"""What a footprint shows without a replay: its pages, its buckets of time and its writers, each with what it counts.

With ``refused`` (``costs.refused_places``) also how many violations each has under a policy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.errors import InvalidValue
from engine.footprint.costs import Outcome
from engine.footprint.intervals import Numbers
from engine.footprint.places import Footprint

Mask = NDArray[np.bool_]
_PAGE = 5  # sub-pages of a page, as a shift


class Counts(NamedTuple):
    """Equally long columns: ``key`` uint64 in order (a page's number, a bucket, a pc), accesses, writes, violations;
    ``subpages`` uint32, those of a page that are touched, empty for the others."""

    key: NDArray[np.uint64]
    accesses: Numbers
    writes: Numbers
    violations: Numbers
    subpages: NDArray[np.uint32]

    def most(self, count: int) -> list[int]:
        """Positions of those with the most violations, then writes, then accesses."""
        order = np.lexsort((self.key, -self.accesses, -self.writes, -self.violations))
        return [int(at) for at in order[:count]]


def pages(footprint: Footprint, refused: Mask | None = None) -> Counts:
    """By page. An access over several pages counts in each."""
    first, last = footprint.first_subpage, footprint.last_subpage
    spanned = (last >> _PAGE) - (first >> _PAGE) + 1
    owner = np.repeat(np.arange(len(first)), spanned)
    page = (first >> _PAGE)[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(spanned) - spanned, spanned)
    low = np.maximum(first[owner] - (page << _PAGE), 0)
    high = np.minimum(last[owner] - (page << _PAGE), 31)
    masks = ((np.int64(2) << high) - (np.int64(1) << low)).astype(np.uint32)
    return _counted(page.view(np.uint64), footprint, owner, refused, masks)


def timeline(footprint: Footprint, refused: Mask | None = None) -> Counts:
    """By bucket, those without an access left out. Raises InvalidValue where places are not apart by them."""
    return _counted(_there(footprint.bucket, "time or records"), footprint, None, refused, None)


class Bucket(NamedTuple):
    """Its number, and what a policy costs in it."""

    bucket: int
    violations: int
    page_granular_violations: int


def costs_over_time(footprint: Footprint, found: Outcome) -> list[Bucket]:
    """What a policy costs by bucket, those in which it costs nothing left out. Raises as ``timeline`` does."""
    bucket, count = _there(footprint.bucket, "time or records"), footprint.count
    taken = found.refused | found.page_granular
    keys, place = np.unique(bucket[taken], return_inverse=True)
    sums = [np.zeros(len(keys), dtype=np.int64) for _ in found]
    for total, mask in zip(sums, found, strict=True):
        np.add.at(total, place, np.where(mask[taken], count[taken], 0))
    return [Bucket(*row) for row in zip(keys.tolist(), *(total.tolist() for total in sums), strict=True)]


def writers(footprint: Footprint, refused: Mask | None = None) -> Counts:
    """By address of the instruction. Raises InvalidValue where places are not apart by it."""
    return _counted(_there(footprint.pc, "pc"), footprint, None, refused, None)


def _there(column: NDArray[np.uint64] | None, name: str) -> NDArray[np.uint64]:
    if column is None:
        raise InvalidValue(f"must have been made by {name}", field="by", value=None)
    return column


def _counted(
    key: NDArray[np.uint64],
    footprint: Footprint,
    owner: Numbers | None,
    refused: Mask | None,
    masks: NDArray[np.uint32] | None,
) -> Counts:
    """Counts by ``key``, one for each place, or for each piece of the place that ``owner`` says."""
    at = np.arange(len(key)) if owner is None else owner
    count = footprint.count[at]
    writes = np.where(footprint.access[at] == acc.WRITE, count, 0)
    violations = np.zeros(len(at), dtype=np.int64) if refused is None else np.where(refused[at], count, 0)
    keys, place = np.unique(key, return_inverse=True)
    sums = [np.zeros(len(keys), dtype=np.int64) for _ in range(3)]
    for total, values in zip(sums, (count, writes, violations), strict=True):
        np.add.at(total, place, values)
    touched = np.zeros(0 if masks is None else len(keys), dtype=np.uint32)
    if masks is not None:
        np.bitwise_or.at(touched, place, masks)
    return Counts(keys, sums[0], sums[1], sums[2], touched)
