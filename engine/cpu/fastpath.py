"""The fast path: a small, derived cache of pages whose accesses need nothing else.

One word an entry: bits 63:32 the page's tag (GPA[51:24]), bits 31:0 the sub-pages that may be written at once. An
entry is made only where the accessed and dirty flags are set, nothing is to be logged and nothing is modelled, so a
hit is the whole effect of the access. It is never state: dropping it changes no answer.
"""

from engine.arch.sppt import FULL_ACCESS
from engine.jit import kernel

CACHE_BITS = 12
CACHE_ENTRIES = 1 << CACHE_BITS
CACHE_MASK = CACHE_ENTRIES - 1

# A tag that no address below 2^52 has, and no sub-page.
EMPTY = -1 << 32


@kernel
def remember(m, gfn, writable):
    """Cache that a page is mapped and which of its sub-pages a write may touch."""
    m.cache[gfn & CACHE_MASK] = gfn >> CACHE_BITS << 32 | (writable & FULL_ACCESS)


@kernel
def forget(m, gfn):
    """Drop a page."""
    slot = gfn & CACHE_MASK
    if m.cache[slot] >> 32 == gfn >> CACHE_BITS:
        m.cache[slot] = EMPTY


@kernel
def forget_all(m):
    """Drop everything."""
    for i in range(CACHE_ENTRIES):
        m.cache[i] = EMPTY
