"""What is known of the 2-MByte and 1-GByte regions of guest memory: protected pages in them, and the host's page size.

Regions have a tree of words of their own (``cpu.radix``), by number: a 2-MByte region is its GFN >> 9, a 1-GByte region
its GFN >> 18 with a bit that no other number has.

bits 31:0   pages (of a 1-GByte region: its 2-MByte regions) that are protected
bit  32     the host backs it with smaller pages than its slot says
bit  33     the host backs it with a 2-MByte page where its slot says 4 KBytes
"""

from engine.arch.sppt import FULL_ACCESS
from engine.cpu.radix import read, write
from engine.jit import kernel
from engine.kvm.state_frame import ROOT_REGIONS

PROTECTED = 0xFFFF_FFFF
SPLIT = 1 << 32
COLLAPSED = 1 << 33
HOST = SPLIT | COLLAPSED

PAGES = 512
LARGE = 1 << 40


@kernel
def number(gfn, level):
    """Number of the region of a page that a leaf of ``level`` 2 or 3 maps."""
    return gfn >> 9 if level == 2 else gfn >> 18 | LARGE


@kernel
def word(m, gfn, level):
    """The word of a region."""
    return read(m, ROOT_REGIONS, number(gfn, level))


@kernel
def store(m, gfn, level, value):
    """Store the word of a region."""
    write(m, ROOT_REGIONS, number(gfn, level), value)


@kernel
def protected(m, gfn, level):
    """Whether a region holds a page whose map is not full."""
    return word(m, gfn, level) & PROTECTED != 0


@kernel
def recount(m, gfn, before, after):
    """Keep the counts in step with the effective map of a page."""
    if (before != FULL_ACCESS) == (after != FULL_ACCESS):
        return
    change = 1 if before == FULL_ACCESS else -1
    small = word(m, gfn, 2)
    store(m, gfn, 2, small + change)
    if small & PROTECTED == 0 or (small + change) & PROTECTED == 0:
        store(m, gfn, 3, word(m, gfn, 3) + change)


@kernel
def mark(m, gfn, level, host):
    """Say how the host backs a region: SPLIT, COLLAPSED, or 0 for what its slot says."""
    store(m, gfn, level, word(m, gfn, level) & ~HOST | host)
