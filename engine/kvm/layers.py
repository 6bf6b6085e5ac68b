"""The layers of sub-page access, each a tree of words by page (see ``cpu.radix``).

POLICY   bits 31:0 sub-pages that SET denies, bits 63:32 sub-pages that a protection covers
GRANTED  bits 31:0 sub-pages on which a protection was lifted by a grant

effective bit = not denied by SET and (not protected or granted)
"""

from engine.arch.sppt import FULL_ACCESS
from engine.cpu import sppt
from engine.cpu.access_check import page_part
from engine.cpu.radix import read, write
from engine.jit import kernel
from engine.kvm import regions
from engine.kvm.registers import ROOT_GRANTED, ROOT_POLICY


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
def effective(m, gfn):
    """Sub-pages of a page that may be written."""
    policy = read(m, ROOT_POLICY, gfn)
    if policy == 0:
        return FULL_ACCESS
    closed = (policy >> 32) & FULL_ACCESS
    if closed:
        closed &= ~granted(m, gfn)
    return ~(policy | closed) & FULL_ACCESS


@kernel
def refuses(m, gpa, size):
    """Whether the maps refuse a write of some bytes, whatever the tables let through."""
    at = gpa
    while at < gpa + size:
        part = page_part(at, gpa + size)
        if sppt.touched(at, part) & ~effective(m, at >> 12):
            return True
        at += part
    return False


@kernel
def store_policy(m, gfn, denied, covered):
    """Store both halves of the policy word of a page."""
    before = effective(m, gfn)
    write(m, ROOT_POLICY, gfn, (covered << 32) | (denied & FULL_ACCESS))
    regions.recount(m, gfn, before, effective(m, gfn))


@kernel
def store_granted(m, gfn, mask):
    """Store the grants of a page."""
    before = effective(m, gfn)
    write(m, ROOT_GRANTED, gfn, mask & FULL_ACCESS)
    regions.recount(m, gfn, before, effective(m, gfn))
