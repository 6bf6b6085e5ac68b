"""The fast path: a small, derived cache of what the next plain access to a page will do.

Two words an entry: the GFN, and what is known of the page: bits 31:0 the sub-pages that may be written at once,
bits 63:32 the exit qualification of a write to any other, 0 where that is not known; all ones where every sub-page
may be written. An entry is made only where the
accessed and dirty flags are set, nothing is to be logged and nothing is modelled, so a hit is the whole effect of the
access. It is never state: dropping it changes no answer.
"""

from engine.arch.sppt import FULL_ACCESS
from engine.cpu import sppt
from engine.jit import kernel

CACHE_BITS = 12
CACHE_ENTRIES = 1 << CACHE_BITS
CACHE_MASK = CACHE_ENTRIES - 1
CACHE_WORDS = 2 * CACHE_ENTRIES

# No GFN: an address shifted by 12 does not reach it.
EMPTY = -1 << 63

ALL_WRITABLE = -1
DENIAL_SHIFT = 32


@kernel
def remember(m, gfn, writable):
    """Cache that a page is mapped and which of its sub-pages a write may touch."""
    at = 2 * (gfn & CACHE_MASK)
    m.cache[at] = gfn
    m.cache[at + 1] = ALL_WRITABLE if writable == FULL_ACCESS else writable


@kernel
def remember_denial(m, gfn, writable, qualification):
    """Cache how a write to the other sub-pages ends.

    ``writable`` is the whole truth about the page; unless it is already cached, or nothing may be written, a write
    that it allows still has flags to set, and nothing is cached.
    """
    at = 2 * (gfn & CACHE_MASK)
    known = m.cache[at] == gfn and m.cache[at + 1] & FULL_ACCESS == writable
    if known or writable == 0:
        m.cache[at] = gfn
        m.cache[at + 1] = writable | qualification << DENIAL_SHIFT


@kernel
def denial(m, gpa, size):
    """(qualification, refused sub-pages) of a plain write in one page that is known to be refused, else (0, 0)."""
    at = 2 * ((gpa >> 12) & CACHE_MASK)
    if m.cache[at] != gpa >> 12 or (gpa & 0xFFF) + size > 4096:
        return 0, 0
    refused = sppt.touched(gpa, size) & ~m.cache[at + 1] & FULL_ACCESS
    if refused == 0:
        return 0, 0
    return m.cache[at + 1] >> DENIAL_SHIFT, refused


@kernel
def forget(m, gfn):
    """Drop a page."""
    at = 2 * (gfn & CACHE_MASK)
    if m.cache[at] == gfn:
        m.cache[at] = EMPTY


@kernel
def forget_all(m):
    """Drop everything."""
    for i in range(CACHE_ENTRIES):
        m.cache[2 * i] = EMPTY
