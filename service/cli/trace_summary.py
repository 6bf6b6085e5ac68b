"""What a trace is made of: records by kind, the pages and sub-pages that they touch, where those are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.trace.columns import TraceChunk

PAGE_BITS, SUBPAGE_BITS = 12, 7
PAGE = 1 << PAGE_BITS
MERGE_PAGES = 1 << 20  # pages of chunks that are put aside before they are added up
NEAR = 1 << 21  # bytes between pages of one range
GPA_LIMIT = 1 << 52
SLOTS = 16  # that cover a flat trace
USER_TOP = 1 << 47

# Where programs and kernels are loaded on x86-64 and no guest has memory: above 64 TiB.
_LINEAR_FROM = 1 << 46


class Range(NamedTuple):
    """Addresses from ``first`` to ``last``, whole pages, of which ``pages`` are touched."""

    first: int
    last: int
    pages: int


class Summary:
    """Adds chunks up. Memory grows with the pages that are touched, some 40 bytes each."""

    def __init__(self) -> None:
        self.records = 0
        self.by_access = [0, 0, 0]
        self.vcpus: set[int] = set()
        self.bytes_written = 0
        self._pages: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._masks: NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)
        self._counts: NDArray[np.int64] = np.zeros((0, 2), dtype=np.int64)
        self._aside: list[tuple[Any, Any, Any]] = []
        self._aside_pages = 0
        self._times: tuple[int, int] | None = None

    def add(self, chunk: TraceChunk, records: NDArray[np.uint64]) -> None:
        """Take in a chunk; ``records`` are its records, perhaps with other addresses. Operations are no accesses."""
        if chunk.operations is not None and len(chunk.operations.at):
            records = np.delete(records, chunk.operations.at, axis=0)
        self.records += len(records)
        if not len(records):
            return
        word = records[:, 1]
        access = (word >> np.uint64(16) & np.uint64(3)).astype(np.int64)
        for kind, count in enumerate(np.bincount(access, minlength=3)[:3].tolist()):
            self.by_access[kind] += count
        size = (word & np.uint64(0xFFFF)).astype(np.int64)
        self.bytes_written += int(size[access == acc.WRITE].sum())
        self.vcpus |= set(np.unique(word >> np.uint64(32) & np.uint64(0xFFFF)).tolist())
        self._touch(records[:, 0], size, access == acc.WRITE)
        time = chunk.carry.get("time")
        if time is not None and len(time) and time.any():
            low, high = self._times or (int(time[0]), int(time[0]))
            self._times = min(low, int(time.min())), max(high, int(time.max()))

    def _touch(self, gpa: NDArray[np.uint64], size: NDArray[np.int64], writes: NDArray[np.bool_]) -> None:
        """Count the pages of accesses, each once, and their sub-pages."""
        offset = (gpa & np.uint64(PAGE - 1)).astype(np.int64)
        page = gpa >> np.uint64(PAGE_BITS)
        end = offset + np.maximum(size, 1)
        spanned = (end - 1 >> PAGE_BITS) + 1
        if int(spanned.max()) > 1:
            each = np.repeat(np.arange(len(page)), spanned)
            nth = np.arange(len(each)) - np.repeat(np.cumsum(spanned) - spanned, spanned)
            page = page[each] + nth.astype(np.uint64)
            offset = np.maximum(offset[each] - (nth << PAGE_BITS), 0)
            end = np.minimum(end[each] - (nth << PAGE_BITS), PAGE)
            writes = writes[each]
        first, last = offset >> SUBPAGE_BITS, end - 1 >> SUBPAGE_BITS
        mask = ((np.int64(2) << last - first) - 1 << first).astype(np.uint32)
        counts = np.stack((np.ones(len(page), dtype=np.int64), writes.astype(np.int64)), axis=1)
        self._aside.append(_added(page, mask, counts))
        self._aside_pages += len(self._aside[-1][0])
        if self._aside_pages > max(MERGE_PAGES, len(self._pages)):
            self._merge()

    def _merge(self) -> None:
        parts = [(self._pages, self._masks, self._counts), *self._aside]
        pages, masks, counts = (np.concatenate([part[at] for part in parts]) for at in range(3))
        self._pages, self._masks, self._counts = _added(pages, masks, counts)
        self._aside, self._aside_pages = [], 0

    def ranges(self, near: int = NEAR) -> list[Range]:
        """Where pages are touched, with up to ``near`` bytes between those of one range."""
        self._merge()
        if not len(self._pages):
            return []
        gaps = np.flatnonzero(np.diff(self._pages) > np.uint64(near >> PAGE_BITS))
        begins, ends = np.append(0, gaps + 1), np.append(gaps, len(self._pages) - 1)
        firsts, lasts = self._pages[begins].tolist(), self._pages[ends].tolist()
        held = (ends - begins + 1).tolist()
        return [
            Range(first << PAGE_BITS, (last << PAGE_BITS) + PAGE - 1, pages)
            for first, last, pages in zip(firsts, lasts, held, strict=True)
        ]

    def slots(self) -> list[dict[str, Any]] | None:
        """Memory slots that cover all pages, at most ``SLOTS``; None where an address is beyond any guest's."""
        near = NEAR
        ranges = self.ranges(near)
        while len(ranges) > SLOTS:
            near <<= 1
            ranges = self.ranges(near)
        if ranges and ranges[-1].last >= GPA_LIMIT:
            return None
        return [
            {"slot": slot, "gpa": f"{each.first:#x}", "size": f"{each.last + 1 - each.first:#x}"}
            for slot, each in enumerate(ranges)
        ]

    @property
    def virtual(self) -> str | None:
        """Why addresses look virtual; None where they may well be physical."""
        self._merge()
        if not len(self._pages):
            return None
        if int(self._pages[-1]) << PAGE_BITS >= GPA_LIMIT:
            return f"{int(self._pages[-1]) << PAGE_BITS:#x} is beyond the 52 bits of physical addresses"
        high = int((self._pages >= np.uint64(_LINEAR_FROM >> PAGE_BITS)).sum())
        if high:
            return f"{high:,} of {len(self._pages):,} pages are above 64 TiB, where programs have libraries and stacks"
        return None

    def document(self, top: int) -> dict[str, Any]:
        """All of it as numbers and texts, with the ``top`` pages that are accessed most."""
        ranges = self.ranges()
        order = np.lexsort((self._pages, -self._counts[:, 0]))[:top]
        return {
            "records": self.records,
            "reads": self.by_access[acc.READ],
            "writes": self.by_access[acc.WRITE],
            "executes": self.by_access[acc.EXECUTE],
            "bytes_written": self.bytes_written,
            "vcpus": sorted(self.vcpus),
            "pages": len(self._pages),
            "subpages": int(np.bitwise_count(self._masks).sum()),
            "written_pages": int((self._counts[:, 1] > 0).sum()),
            "seconds": None if self._times is None else (self._times[1] - self._times[0]) / 1e9,
            "ranges": [
                {"first": f"{each.first:#x}", "last": f"{each.last:#x}", "pages": each.pages} for each in ranges
            ],
            "top_pages": [
                {
                    "page": f"{int(self._pages[at]) << PAGE_BITS:#x}",
                    "accesses": int(self._counts[at, 0]),
                    "writes": int(self._counts[at, 1]),
                    "subpages": f"{int(self._masks[at]):#010x}",
                }
                for at in order.tolist()
            ],
            "virtual": self.virtual,
        }


def _added(page: NDArray[np.uint64], mask: NDArray[np.uint32], counts: NDArray[np.int64]) -> tuple[Any, Any, Any]:
    """Each page once, in order, with the sub-pages and counts of all its entries."""
    order = np.argsort(page, kind="stable")
    page, mask, counts = page[order], mask[order], counts[order]
    begins = np.flatnonzero(np.append(True, page[1:] != page[:-1])) if len(page) else np.zeros(0, dtype=np.int64)
    if not len(begins):
        return page, mask, counts
    return page[begins], np.bitwise_or.reduceat(mask, begins), np.add.reduceat(counts, begins, axis=0)
