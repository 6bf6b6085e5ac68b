"""Entries of the translation cache that a flush is about: marked first, so that they can be counted and shown.

``marks`` is int64[rows of the cache]; a selection adds 1s to it and never takes one away.
"""

from engine.arch import controls as ctl
from engine.arch.words import positions
from engine.cpu import tlb
from engine.jit import kernel

# Whose translations: those a guest made for itself, or those of nested guests.
OWN, NESTED_GUESTS = positions(2)

# A row of ``ranges``: first and last page of a range, linear addresses >> 12 as signed words, or GPAs >> 12.
FIRST, LAST = positions(2)


@kernel
def member(set_bits, number):
    """Whether a set holds a number: bit n of word b of int64[64] stands for b * 64 + n. Greater ones are in none."""
    if number < 0 or number >= set_bits.shape[0] * 64:
        return False
    return (set_bits[number >> 6] >> (number & 63)) & 1 != 0


@kernel
def in_ranges(first, last, ranges):
    """Whether pages ``first`` to ``last`` touch a range."""
    for at in range(ranges.shape[0]):  # noqa: SIM110
        if first <= ranges[at, LAST] and last >= ranges[at, FIRST]:
            return True
    return False


@kernel
def linear_touched(m, row, ranges):
    """Whether a range touches the page of an entry, as large as the guest has it."""
    bits = ((m.tlb[row, tlb.E_FACTS] >> tlb.GUEST_SIZE_AT) & tlb.GUEST_SIZE_MASK) - 12
    first = (m.tlb[row, tlb.E_PAGE] >> bits) << bits
    return in_ranges(first, first + (1 << bits) - 1, ranges)


@kernel
def of_guest(m, row, whose, vm, everyone, vps):
    """Whether an entry is a guest's own, or belongs to a VP of the set, or everyone, in the nested partition ``vm``."""
    nested = m.tlb[row, tlb.E_NESTED]
    if whose == OWN:
        return nested == 0
    if nested == 0 or m.tlb[row, tlb.E_NESTED_VM] != vm:
        return False
    return everyone or member(vps, (nested >> ctl.NESTED_VP_SHIFT) & ctl.NESTED_VP_MASK)


@kernel
def of_space(m, row, space, globals_):
    """Whether an entry translates for an address space, EVERY or the page tables' address; globals are in each."""
    if m.tlb[row, tlb.E_FACTS] & tlb.GUEST_GLOBAL:
        return globals_ == tlb.GLOBALS_TOO
    return space == tlb.EVERY or m.tlb[row, tlb.E_ADDRESS_SPACE] == space


@kernel
def virtual(m, vcpu, whose, vm, everyone, vps, space, globals_, everywhere, ranges, marks):
    """Mark the translations of linear addresses in the cache of a vCPU that a virtual flush is about.

    ``everywhere`` says that ``ranges`` does not count: every address is meant.
    """
    for row in range(1, m.tlb.shape[0]):
        if not tlb.live(m, row) or m.tlb[row, tlb.E_KIND] >> tlb.VCPU_SHIFT != vcpu:
            continue
        if m.tlb[row, tlb.E_KIND] & tlb.KIND_MASK == tlb.PHYSICAL or not of_guest(m, row, whose, vm, everyone, vps):
            continue
        if of_space(m, row, space, globals_) and (everywhere or linear_touched(m, row, ranges)):
            marks[row] = 1


@kernel
def second_level(m, root, everywhere, ranges, marks):
    """Mark what was derived from a second-level root, on every vCPU: GPAs, and linear addresses by way of them.

    The root is one that the processor walked, or one of a guest hypervisor from which that was made.
    """
    for row in range(1, m.tlb.shape[0]):
        if not tlb.live(m, row) or m.tlb[row, tlb.E_KIND] & tlb.KIND_MASK == tlb.LINEAR:
            continue
        page = m.tlb[row, tlb.E_FRAME]
        under = m.tlb[row, tlb.E_ROOT] == root or m.tlb[row, tlb.E_NESTED_ROOT] == root
        if under and (everywhere or in_ranges(page, page, ranges)):
            marks[row] = 1


@kernel
def linear_of_vpid(m, vcpu, vpid, everywhere, ranges, marks):
    """Mark what INVVPID removes: a context, or the pages of ``ranges`` one by one, with every PCID and the globals."""
    for row in range(1, m.tlb.shape[0]):
        if not tlb.live(m, row) or m.tlb[row, tlb.E_KIND] >> tlb.VCPU_SHIFT != vcpu:
            continue
        if m.tlb[row, tlb.E_KIND] & tlb.KIND_MASK == tlb.PHYSICAL:
            continue
        if m.tlb[row, tlb.E_SPACE] & ctl.VPID_MASK == vpid and (everywhere or linear_touched(m, row, ranges)):
            marks[row] = 1


@kernel
def nested_of_vcpu(m, vcpu, marks):
    """Mark everything that a vCPU's cache holds for nested guests."""
    for row in range(1, m.tlb.shape[0]):
        if tlb.live(m, row) and m.tlb[row, tlb.E_KIND] >> tlb.VCPU_SHIFT == vcpu and m.tlb[row, tlb.E_NESTED]:
            marks[row] = 1


@kernel
def remove(m, marks):
    """Remove what is marked."""
    for row in range(1, m.tlb.shape[0]):
        if marks[row]:
            tlb.drop(m, row)
