"""The layers of sub-page access, each a tree of words by page (see ``cpu.radix``).

POLICY   bits 31:0 sub-pages that SET denies, bits 63:32 sub-pages that a protection covers
GRANTED  bits 31:0 sub-pages on which a protection was lifted by a grant

effective bit = not denied by SET and (not protected or granted)

They are about address space 0; a page of space 1 has none of them and may be written (kvm-spp 4).
"""

import numpy as np

from engine.arch.sppt import FULL_ACCESS
from engine.cpu import sppt
from engine.cpu.access_over_pages import page_part, place
from engine.cpu.memory_slots import home
from engine.cpu.radix import read, write
from engine.jit import kernel
from engine.kvm import regions
from engine.kvm.state_frame import ROOT_GRANTED, ROOT_POLICY

# Layers of a page's map
LAYER_NAMES = ("effective", "set", "protected", "granted")

NOTHING = np.int64(0)


@kernel
def denied_by_set(m, gfn):
    """Sub-pages of a page that SET denies."""
    return read(m, ROOT_POLICY, gfn) & FULL_ACCESS


@kernel
def protected(m, gfn):
    """Sub-pages of a page that a protection covers."""
    return (read(m, ROOT_POLICY, gfn) >> 32) & FULL_ACCESS


@kernel
def granted(m, gfn):
    """Sub-pages of a page on which a grant stands."""
    return read(m, ROOT_GRANTED, gfn) & FULL_ACCESS


@kernel
def of_page(m, gfn):
    """(denied, covered, lifted): sub-pages that SET denies, that a protection covers, and on which a grant stands."""
    policy = read(m, ROOT_POLICY, gfn)
    return policy & FULL_ACCESS, (policy >> 32) & FULL_ACCESS, granted(m, gfn)


@kernel
def writable(denied, covered, lifted):
    """Sub-pages that may be written, given the layers of their page."""
    return ~(denied | covered & ~lifted) & FULL_ACCESS


@kernel
def effective(m, gfn):
    """Sub-pages of a page that may be written."""
    policy = read(m, ROOT_POLICY, gfn)
    covered = (policy >> 32) & FULL_ACCESS
    return writable(policy & FULL_ACCESS, covered, granted(m, gfn) if covered else NOTHING)


@kernel
def refuses(m, gpa, size):
    """Whether the maps refuse a write of some bytes, whatever the tables let through."""
    done = 0
    while done < size:
        at = place(m, gpa, done)
        part = page_part(at, at + size - done)
        if sppt.touched(at, part) & ~effective(m, home(m, at >> 12)):
            return True
        done += part
    return False


@kernel
def store(m, gfn, before, denied, covered, lifted):
    """Store the layers of a page; ``before`` is what ``of_page`` says of it now."""
    write(m, ROOT_POLICY, gfn, (covered << 32) | denied)
    if lifted != before[2]:
        write(m, ROOT_GRANTED, gfn, lifted)
    regions.recount(m, gfn, writable(before[0], before[1], before[2]), writable(denied, covered, lifted))


@kernel
def store_set(m, gfn, access):
    """SET one page: what it denies is replaced, what protections cover stays, and the grants end."""
    before = of_page(m, gfn)
    store(m, gfn, before, ~access & FULL_ACCESS, before[1], NOTHING)


@kernel
def read_maps(m, gfn, layer, out):
    """Fill ``out`` (uint32) with one layer of the maps of consecutive pages.

    ``effective`` and ``set``: bit 1 = may be written; ``protected`` and ``granted``: bit 1 = covered, lifted.
    """
    for i in range(out.shape[0]):
        if layer == 0:
            out[i] = effective(m, gfn + i)
        elif layer == 1:
            out[i] = ~denied_by_set(m, gfn + i) & FULL_ACCESS
        elif layer == 2:
            out[i] = protected(m, gfn + i)
        else:
            out[i] = granted(m, gfn + i)
