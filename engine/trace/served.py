"""Which accesses the fast path serves: one rule for one record. ``lanes`` is the same for many side by side."""

from __future__ import annotations

import numpy as np

from engine.cpu import fastpath
from engine.jit import kernel

CACHE_MASK = np.uint64(fastpath.CACHE_MASK)
PAGES = np.uint64(fastpath.PAGES)
GUARDED = np.int64(fastpath.GUARDED)


@kernel
def miss(cache, gpa, more):
    """What keeps an access of ``more`` bytes beyond its first from being served: 0 for nothing, GUARDED for sub-pages
    that may not be written.

    0 if ``more`` is from 0 to 65,535 and the tag is the GFN of the last byte; no GFN but that of the first byte can be
    in its place.
    """
    return (cache[np.uint64(gpa >> 12) & CACHE_MASK] ^ ((gpa + more) >> 12)) | (more >> 16)


@kernel
def refuses(cache, gpa, more):
    """What a write of ``more`` bytes beyond its first touches in a page in the fast path and may not; 0 for nothing."""
    last = ((gpa & 0xFFF) + more) >> 7 & 31  # that of one in two pages, or of none, is not looked at
    touched = (2 << last) - (1 << ((gpa >> 7) & 31))
    return touched & ~cache[PAGES | (np.uint64(gpa >> 12) & CACHE_MASK)]
