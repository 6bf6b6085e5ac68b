"""Protections: named objects, and pages without a name, that may not be written, whatever SET says.

Objects are rounded outward to 128 bytes, or to whole pages. Several may cover a sub-page; it stays covered until the
last one goes, because what is stored for a page is always worked out from what is left.
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
MAX_RANGES = 1 << 16
MAX_NAME = 256

# Outward to what an object is rounded, as a shift of addresses.
GRANULARITIES = {"subpage": SUBPAGE_SHIFT, "page": 12}


@dataclass(frozen=True, slots=True)
class ProtectedObject:
    """A named byte range of guest memory. Ranges of one name count as one object.

    ``granularity`` is one of GRANULARITIES. ``gva``, where the guest sees it, and ``about`` are notes. With ``vcpu``,
    ``gpa`` was found by ``gva`` through the page tables of that vCPU, those that ``cr3`` names unless it is None.
    """

    name: str
    gpa: int
    size: int
    granularity: str = "subpage"
    gva: int | None = None
    about: str | None = None
    vcpu: int | None = None
    cr3: int | None = None

    @property
    def first_subpage(self) -> int:
        shift = GRANULARITIES[self.granularity]
        return self.gpa >> shift << shift - SUBPAGE_SHIFT

    @property
    def last_subpage(self) -> int:
        shift = GRANULARITIES[self.granularity]
        return ((self.gpa + self.size - 1 >> shift) + 1 << shift - SUBPAGE_SHIFT) - 1

    @property
    def first_gfn(self) -> int:
        return self.gpa >> 12

    @property
    def pages(self) -> int:
        return ((self.gpa + self.size - 1) >> 12) - self.first_gfn + 1


@dataclass(frozen=True, slots=True)
class VirtualObject:
    """A named byte range of the guest's linear addresses; members as in ``ProtectedObject``."""

    name: str
    gva: int
    size: int
    granularity: str = "subpage"
    about: str | None = None
    vcpu: int = 0
    cr3: int | None = None


@dataclass(frozen=True, slots=True)
class ProtectedPages:
    """``npages`` pages from ``gfn`` on, without a name; they are covered where ``access``, a 32-bit map, has a 0."""

    gfn: int
    npages: int
    access: int

    @property
    def mask(self) -> int:
        """The sub-pages that are covered in each of the pages."""
        return ~self.access & FULL_ACCESS


@dataclass(frozen=True)
class Protection:
    """Objects and pages that are protected together, under one name; ``about`` is a note."""

    name: str
    objects: tuple[ProtectedObject, ...]
    ranges: tuple[ProtectedPages, ...] = ()
    about: str | None = None

    @property
    def first_in_part(self) -> str | None:
        """Place of the first item that may cover a page in part, None where all of it is whole pages."""
        for position, item in enumerate(self.objects):
            if item.granularity != "page":
                return f"objects[{position}]"
        for position, pages in enumerate(self.ranges):
            if pages.access not in (0, FULL_ACCESS):
                return f"pages[{position}]"
        return None

    @property
    def subpages(self) -> int:
        """Distinct sub-pages covered."""
        return covered_subpages(self.objects, self.ranges)

    @property
    def pages(self) -> int:
        """Distinct pages with a covered sub-page."""
        return len(page_masks(self.objects, self.ranges)[0])

    @property
    def end(self) -> int:
        """The first address after all that it covers."""
        objects = [item.last_subpage + 1 << SUBPAGE_SHIFT for item in self.objects]
        return max(objects + [item.gfn + item.npages << 12 for item in self.ranges], default=0)

    @property
    def extent(self) -> int:
        """Pages of all that it names, one by one."""
        return sum(item.pages for item in self.objects) + sum(item.npages for item in self.ranges)


def covered_subpages(objects: Sequence[ProtectedObject], ranges: Sequence[ProtectedPages] = ()) -> int:
    """How many distinct sub-pages a set of objects and pages covers."""
    if len(objects) == 1 and not ranges:
        return objects[0].last_subpage - objects[0].first_subpage + 1
    return int(np.bitwise_count(page_masks(objects, ranges)[1]).sum())


def validate(protection: Protection, width: int, owners: Sequence[int] | None = None) -> None:
    """Refuse names and ranges that mean nothing; ``width`` is the guest-physical address width in bits.

    ``owners`` are the positions by which objects are called, unless it is their own.
    """
    name, objects, ranges = protection.name, protection.objects, protection.ranges
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidValue(f"must have 1 to {MAX_NAME} characters", field="name", value=name)
    if not objects and not ranges:
        raise InvalidValue("must hold an object or a range of pages", field="objects", value=0)
    if len(objects) > MAX_OBJECTS:
        raise InvalidValue(f"must be at most {MAX_OBJECTS} objects", field="objects", value=len(objects))
    if len(ranges) > MAX_RANGES:
        raise InvalidValue(f"must be at most {MAX_RANGES} ranges", field="pages", value=len(ranges))
    for position, item in zip(owners or range(len(objects)), objects, strict=True):
        _check_object(item, f"objects[{position}]", width)
    for position, pages in enumerate(ranges):
        _check_range(pages, f"pages[{position}]", width)
    if protection.extent > MAX_PAGES:
        raise LimitExceeded(
            f"must lie in at most {MAX_PAGES} pages",
            field="objects" if objects else "pages",
            value=protection.extent,
        )


def _check_object(item: ProtectedObject, where: str, width: int) -> None:
    if not 1 <= len(item.name) <= MAX_NAME:
        raise InvalidValue(f"must have 1 to {MAX_NAME} characters", field=f"{where}.name", value=item.name)
    if item.granularity not in GRANULARITIES:
        rule = f"must be one of {', '.join(GRANULARITIES)}"
        raise InvalidValue(rule, field=f"{where}.granularity", value=item.granularity)
    if item.size <= 0:
        raise InvalidValue("must be at least one byte", field=f"{where}.size", value=item.size)
    if item.gpa < 0 or item.gpa + item.size > 1 << width:
        rule = f"must keep the object within the guest-physical address width of {width} bits"
        raise InvalidValue(rule, field=f"{where}.gpa", value=item.gpa)


def _check_range(item: ProtectedPages, where: str, width: int) -> None:
    if item.npages <= 0:
        raise InvalidValue("must be at least one page", field=f"{where}[1]", value=item.npages)
    if item.gfn < 0 or item.gfn + item.npages > 1 << width - 12:
        rule = f"must keep the range within the guest-physical address width of {width} bits"
        raise InvalidValue(rule, field=f"{where}[0]", value=item.gfn)
    if not 0 <= item.access <= FULL_ACCESS:
        raise InvalidValue("must fit in 32 bits without a sign", field=f"{where}[2]", value=item.access)


def page_masks(
    objects: Sequence[ProtectedObject], ranges: Sequence[ProtectedPages] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(GFNs ascending, 32-bit masks): the sub-pages that objects and pages cover, page by page."""
    gfn, mask = (np.concatenate(pair) for pair in zip(_object_masks(objects), _range_masks(ranges), strict=True))
    gfns, position = np.unique(gfn, return_inverse=True)
    masks = np.zeros(len(gfns), dtype=np.int64)
    np.bitwise_or.at(masks, position, mask)
    return gfns, masks


def _object_masks(objects: Sequence[ProtectedObject]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(GFN, mask) of each page of each object."""
    first = np.array([o.first_subpage for o in objects], dtype=np.int64)
    last = np.array([o.last_subpage for o in objects], dtype=np.int64)
    owner, step = _steps((last >> 5) - (first >> 5) + 1)
    gfn = (first[owner] >> 5) + step
    low = np.where(step == 0, first[owner] & 31, 0)
    high = np.where(gfn == last[owner] >> 5, last[owner] & 31, 31)
    return gfn, ((np.int64(2) << high) - (np.int64(1) << low)) & FULL_ACCESS


def _range_masks(ranges: Sequence[ProtectedPages]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(GFN, mask) of each page of each range that covers something."""
    rows = np.array([(r.gfn, r.npages, r.mask) for r in ranges if r.mask], dtype=np.int64).reshape(-1, 3)
    owner, step = _steps(rows[:, 1])
    return rows[owner, 0] + step, rows[owner, 2]


def _steps(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(owner, step) of each page, when owner i has ``counts[i]`` of them."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def masks_at(
    gfns: NDArray[np.int64], objects: Sequence[ProtectedObject], ranges: Sequence[ProtectedPages] = ()
) -> NDArray[np.int64]:
    """Sub-pages that objects and pages cover on the given pages."""
    known, masks = page_masks(objects, ranges)
    if not len(known):
        return np.zeros(len(gfns), dtype=np.int64)
    at = np.minimum(np.searchsorted(known, gfns), len(known) - 1)
    return np.where(known[at] == gfns, masks[at], 0)
