"""The fast path: a small, derived cache of pages whose accesses need nothing else.

One word an entry: bits 63:32 the page's tag, bits 31:0 the sub-pages that may be written at once. An entry is made
only where the accessed and dirty flags are set, nothing is to be logged and nothing is modelled, so a hit is the
whole effect of the access. It is never state: dropping it changes no answer.
"""

from engine.arch.sppt import FULL_ACCESS
from engine.arch.words import signed
from engine.jit import kernel

CACHE_BITS = 12
CACHE_ENTRIES = 1 << CACHE_BITS
CACHE_MASK = CACHE_ENTRIES - 1
EMPTY = 0

# A record that the fast path may serve has nothing in word 1 but size, access and vCPU id.
KIND_BITS = signed(0xFFFF_0000_FFFF_0000)
PLAIN_WRITE = 1 << 16
PLAIN_READ = 0
PLAIN_EXECUTE = 2 << 16


@kernel
def remember(m, gfn, writable):
    """Cache that a page is mapped and which of its sub-pages a write may touch."""
    m.cache[gfn & CACHE_MASK] = ((gfn >> CACHE_BITS) + 1) << 32 | (writable & FULL_ACCESS)


@kernel
def forget(m, gfn):
    """Drop a page."""
    slot = gfn & CACHE_MASK
    if m.cache[slot] >> 32 == (gfn >> CACHE_BITS) + 1:
        m.cache[slot] = EMPTY


@kernel
def forget_all(m):
    """Drop everything."""
    for i in range(CACHE_ENTRIES):
        m.cache[i] = EMPTY
