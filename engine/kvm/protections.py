"""Protections: named objects whose sub-pages may not be written, whatever SET says.

Objects are rounded outward to 128 bytes. Several may cover a sub-page; it stays covered until the last one goes,
because what is stored for a page is always worked out from the objects that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch.sppt import FULL_ACCESS, SUBPAGE_SHIFT
from engine.errors import InvalidValue, LimitExceeded

MAX_PAGES = 1 << 20
MAX_OBJECTS = 1 << 16
MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class ProtectedObject:
    """A named byte range of guest memory. Ranges of one name count as one object."""

    name: str
    gpa: int
    size: int

    @property
    def first_subpage(self) -> int:
        return self.gpa >> SUBPAGE_SHIFT

    @property
    def last_subpage(self) -> int:
        return (self.gpa + self.size - 1) >> SUBPAGE_SHIFT

    @property
    def first_gfn(self) -> int:
        return self.gpa >> 12

    @property
    def pages(self) -> int:
        return ((self.gpa + self.size - 1) >> 12) - self.first_gfn + 1


@dataclass(frozen=True)
class Protection:
    """Objects that are protected together, under one name."""

    name: str
    objects: tuple[ProtectedObject, ...]

    @property
    def subpages(self) -> int:
        """Distinct sub-pages covered."""
        return covered_subpages(self.objects)

    @property
    def pages(self) -> int:
        """Distinct pages with a covered sub-page."""
        return len(page_masks(self.objects)[0])


def covered_subpages(objects: Sequence[ProtectedObject]) -> int:
    """How many distinct sub-pages a set of objects covers."""
    if len(objects) == 1:
        return objects[0].last_subpage - objects[0].first_subpage + 1
    return int(np.bitwise_count(page_masks(objects)[1]).sum())


def validate(name: str, objects: Sequence[ProtectedObject], width: int) -> None:
    """Refuse names and ranges that mean nothing; ``width`` is the guest-physical address width in bits."""
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidValue(f"a name has 1 to {MAX_NAME} characters", field="name", value=name)
    if not 1 <= len(objects) <= MAX_OBJECTS:
        raise InvalidValue(f"a protection has 1 to {MAX_OBJECTS} objects", field="objects", value=len(objects))
    for position, item in enumerate(objects):
        where = f"objects[{position}]"
        if not 1 <= len(item.name) <= MAX_NAME:
            raise InvalidValue(f"a name has 1 to {MAX_NAME} characters", field=f"{where}.name", value=item.name)
        if item.size <= 0:
            raise InvalidValue("an object has at least one byte", field=f"{where}.size", value=item.size)
        if item.gpa < 0 or item.gpa + item.size > 1 << width:
            raise InvalidValue(
                f"an object ends within the guest-physical address width of {width} bits",
                field=f"{where}.gpa",
                value=item.gpa,
            )
    pages = sum(item.pages for item in objects)
    if pages > MAX_PAGES:
        raise LimitExceeded(
            f"the objects of a protection lie in {MAX_PAGES} pages at most", field="objects", value=pages
        )


def page_masks(objects: Sequence[ProtectedObject]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(GFNs ascending, 32-bit masks): the sub-pages that objects cover, page by page."""
    if not objects:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    first = np.array([o.first_subpage for o in objects], dtype=np.int64)
    last = np.array([o.last_subpage for o in objects], dtype=np.int64)
    counts = (last >> 5) - (first >> 5) + 1
    owner = np.repeat(np.arange(len(objects)), counts)
    step = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    gfn = (first[owner] >> 5) + step
    low = np.where(step == 0, first[owner] & 31, 0)
    high = np.where(gfn == last[owner] >> 5, last[owner] & 31, 31)
    mask = ((np.int64(2) << high) - (np.int64(1) << low)) & FULL_ACCESS
    gfns, position = np.unique(gfn, return_inverse=True)
    masks = np.zeros(len(gfns), dtype=np.int64)
    np.bitwise_or.at(masks, position, mask)
    return gfns, masks


def masks_at(gfns: NDArray[np.int64], objects: Sequence[ProtectedObject]) -> NDArray[np.int64]:
    """Sub-pages that objects cover on the given pages."""
    known, masks = page_masks(objects)
    if not len(known):
        return np.zeros(len(gfns), dtype=np.int64)
    at = np.minimum(np.searchsorted(known, gfns), len(known) - 1)
    return np.where(known[at] == gfns, masks[at], 0)
