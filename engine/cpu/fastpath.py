"""The fast path: a small, derived cache of what the next plain access to a page will do.

Two words an entry, in two halves of the array. The tag: the GFN, with ``GUARDED`` set unless every sub-page may be
written. What is known of a guarded page: bits 31:0 the sub-pages that may be written at once, bits 63:32 the exit
qualification of a write to any other, 0 where that is not known. Most accesses read the tag alone, and all tags
together fit into the first-level cache of a processor.

An entry is made only where the accessed and dirty flags are set, nothing is to be logged and nothing is modelled, so a
hit is the whole effect of the access. It is never state: dropping it changes no answer.
"""

from engine.arch.sppt import FULL_ACCESS
from engine.cpu import sppt
from engine.jit import kernel

CACHE_BITS = 12
CACHE_ENTRIES = 1 << CACHE_BITS
CACHE_MASK = CACHE_ENTRIES - 1
CACHE_WORDS = 2 * CACHE_ENTRIES

# Where the words about the pages begin.
PAGES = CACHE_ENTRIES

# No GFN: an address shifted by 12 reaches neither of the two bits.
EMPTY = -1 << 63
GUARDED = 1 << 62

DENIAL_SHIFT = 32


@kernel
def remember(m, gfn, writable):
    """Cache that a page is mapped and which of its sub-pages a write may touch."""
    at = gfn & CACHE_MASK
    m.cache[at] = gfn if writable == FULL_ACCESS else gfn | GUARDED
    m.cache[PAGES + at] = writable


@kernel
def remember_denial(m, gfn, writable, qualification):
    """Cache how a write to the other sub-pages ends.

    ``writable`` is the whole truth about the page; unless it is already cached, or nothing may be written, a write
    that it allows still has flags to set, and nothing is cached.
    """
    at = gfn & CACHE_MASK
    known = m.cache[at] == gfn | GUARDED and m.cache[PAGES + at] & FULL_ACCESS == writable
    if known or writable == 0:
        m.cache[at] = gfn | GUARDED
        m.cache[PAGES + at] = writable | qualification << DENIAL_SHIFT


@kernel
def denial(m, gpa, size):
    """(qualification, refused sub-pages) of a plain write in one page that is known to be refused, else (0, 0)."""
    at = (gpa >> 12) & CACHE_MASK
    if m.cache[at] != (gpa >> 12) | GUARDED or (gpa & 0xFFF) + size > 4096:
        return 0, 0
    page = m.cache[PAGES + at]
    refused = sppt.touched(gpa, size) & ~page & FULL_ACCESS
    if refused == 0:
        return 0, 0
    return page >> DENIAL_SHIFT, refused


@kernel
def whole(m, gpa, size):
    """Whether an access is in one page, all of whose sub-pages are known to be writable."""
    return m.cache[(gpa >> 12) & CACHE_MASK] == gpa >> 12 and (gpa & 0xFFF) + size <= 4096


@kernel
def forget(m, gfn):
    """Drop a page."""
    at = gfn & CACHE_MASK
    if m.cache[at] & ~GUARDED == gfn:
        m.cache[at] = EMPTY


@kernel
def forget_all(m):
    """Drop everything."""
    for i in range(CACHE_ENTRIES):
        m.cache[i] = EMPTY
