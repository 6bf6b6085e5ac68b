"""One memory access of a guest instruction, by linear address: guest paging, EPT, SPP, flags and log, in their order.

The pages of an access are taken low page first, each through its whole translation, with the guest's accessed and
dirty flags. Nothing else is left behind unless every page allows the access.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.arch import access as acc
from engine.arch import exceptions, exits
from engine.arch import paging as guest
from engine.cpu import (
    access_check,
    access_over_pages,
    cached_check,
    ept,
    exit_qualification,
    guest_paging,
    page_log,
    tlb,
    ve,
)
from engine.cpu.frames import Machine, Words
from engine.jit import kernel

# Rows of ``pages``: how each page of an access was translated. 64 KBytes touch at most 17 pages.
(P_LINEAR, P_GPA, P_SIZE, P_HOW, P_FACTS, P_SOURCE, P_KIND, P_REMEMBERED) = range(8)
PAGE_WORDS = 8
MAX_PAGES = 18

LOW_32 = 0xFFFF_FFFF
NO_ERROR = np.int64(0)


class Access(NamedTuple):
    """What an access came to.

    ``reason`` is 0 when it completed, a VM-exit reason, or minus the vector of an exception. ``gpa`` and ``gla`` are
    the exit's addresses, ``gla`` also CR2 of a page fault; ``denied`` the sub-pages that refuse; ``stale`` says that a
    cached translation decided against the tables.
    """

    reason: int
    qualification: int
    gpa: int
    gla: int
    error_code: int
    denied: int
    stale: bool


@kernel
def effective(m, vcpu, linear):
    """The linear address as the paging mode has it: 32 bits outside 64-bit mode."""
    return linear if guest_paging.mode_of(m, vcpu) >= guest_paging.FOUR_LEVELS else linear & LOW_32


@kernel
def canonical(m, vcpu, linear):
    """Whether the paging mode can translate a linear address at all."""
    paging = guest_paging.mode_of(m, vcpu)
    if paging < guest_paging.FOUR_LEVELS:
        return True
    bits = guest.LINEAR_57 if paging == guest_paging.FIVE_LEVELS else guest.LINEAR_48
    return guest_paging.canonical(linear, bits)


@kernel
def by_entry(m, vcpu, row, linear, size, how, mode, trail):
    """Decide by a linear or combined entry, which serves the access; returns (reason, value, gpa, how, denied)."""
    facts = m.tlb[row, tlb.E_FACTS]
    gpa = m.tlb[row, tlb.E_FRAME] << 12 | linear & 0xFFF
    if guest_paging.refused(m, vcpu, how, facts):
        error = guest_paging.error_code(m, vcpu, how, exceptions.PF_PRESENT)
        return -exceptions.PAGE_FAULT, error, NO_ERROR, how, NO_ERROR
    how |= tlb.linear_bits(facts)
    if not mode & ept.MODE_EPT:
        return exits.NONE, NO_ERROR, gpa, how, NO_ERROR
    reason, q, denied = cached_check.judge_entry(m, vcpu, row, gpa, size, how, mode, trail)
    return reason, q, gpa, how, denied


@kernel
def by_walk(m, vcpu, linear, size, how, doing, trail, steps):
    """Decide by the guest's paging and then EPT.

    Returns (reason, value, gpa, how, denied, facts, source, final): ``final`` is how the page itself was decided,
    ``source`` the stalest of all the decisions on the way.
    """
    reason, value, gpa, facts, source = guest_paging.walk(
        m, vcpu, guest_paging.OWN_SPACE, linear, how, doing, trail, steps
    )
    if reason != exits.NONE:
        return reason, value, gpa, how, 0, facts, source, cached_check.WALKED
    how |= tlb.linear_bits(facts)
    if doing & guest_paging.FRESH:
        reason, q, denied = access_check.check(m, vcpu, gpa, size, how, trail)
        return reason, q, gpa, how, denied, facts, source, cached_check.WALKED
    reason, q, denied, final = cached_check.check(m, vcpu, gpa, size, how, trail)
    return reason, q, gpa, how, denied, facts, max(source, final), final


@kernel
def entry_for(m, vcpu, linear, how, mode):
    """Row of the entry that serves an access to a page by its linear address, MISSING if none does."""
    if not tlb.modelled(m):
        return tlb.MISSING
    row = tlb.find(m, vcpu, tlb.COMBINED if mode & ept.MODE_EPT else tlb.LINEAR, linear >> 12)
    if row == tlb.MISSING or not cached_check.serves(m, row, how, mode):
        return tlb.MISSING
    if guest_paging.writes(how) and not m.tlb[row, tlb.E_FACTS] & tlb.GUEST_DIRTY:
        return tlb.MISSING
    return row


@kernel
def page(m, vcpu, linear, size, how, trail, steps, pages, at):
    """Translate and decide about the part of an access that lies in one page, and note it in ``pages[at]``.

    Returns (reason, value, gpa, denied, stale); value is a qualification or an error code.
    """
    mode = ept.mode_of(m, vcpu)
    kind = tlb.COMBINED if mode & ept.MODE_EPT else tlb.LINEAR
    row = entry_for(m, vcpu, linear, how, mode)
    if row == tlb.MISSING:
        reason, value, gpa, how, denied, facts, source, final = by_walk(
            m, vcpu, linear, size, how, guest_paging.EXECUTE, trail, steps
        )
        pages[at, P_FACTS] = facts
        pages[at, P_SOURCE] = final
        pages[at, P_REMEMBERED] = 0
        stale = source == cached_check.STALE
    else:
        real_reason, real_value, real_gpa, _, real_denied, _, _, _ = by_walk(
            m, vcpu, linear, size, how, guest_paging.FRESH, trail, steps
        )
        reason, value, gpa, how, denied = by_entry(m, vcpu, row, linear, size, how, mode, trail)
        stale = reason != real_reason or value != real_value or gpa != real_gpa or denied != real_denied
        pages[at, P_SOURCE] = cached_check.CACHED
        pages[at, P_REMEMBERED] = 1
        if reason < 0:
            tlb.drop(m, row)
    pages[at, P_LINEAR] = linear
    pages[at, P_GPA] = gpa
    pages[at, P_SIZE] = size
    pages[at, P_HOW] = how
    pages[at, P_KIND] = kind
    return reason, value, gpa, denied, stale


@kernel
def log_fits(m, vcpu, pages, count, trail):
    """Whether the page-modification log has room for all pages of an access."""
    mode = ept.mode_of(m, vcpu)
    if not page_log.on(mode):
        return True
    index = page_log.index_of(m, vcpu)
    for at in range(count):
        if pages[at, P_SOURCE] == cached_check.WALKED:
            access_check.check(m, vcpu, pages[at, P_GPA], pages[at, P_SIZE], pages[at, P_HOW], trail)
            room, index = page_log.take(pages[at, P_HOW], mode, index, trail)
            if not room:
                return False
    return True


@kernel
def finish(m, vcpu, pages, count, trail):
    """Leave behind what a completed access leaves: EPT flags, log entries, cached translations."""
    mode = ept.mode_of(m, vcpu)
    for at in range(count):
        how = pages[at, P_HOW]
        gpa = pages[at, P_GPA]
        linear = pages[at, P_LINEAR]
        if pages[at, P_SOURCE] == cached_check.WALKED:
            access_check.check(m, vcpu, gpa, pages[at, P_SIZE], how, trail)
            cached_check.finish(m, vcpu, mode, gpa, how, cached_check.WALKED, trail)
            if tlb.modelled(m):
                tlb.remember(m, vcpu, pages[at, P_KIND], linear >> 12, gpa >> 12, pages[at, P_FACTS], trail)
        elif not pages[at, P_REMEMBERED]:
            tlb.combine(m, vcpu, linear >> 12, gpa >> 12, pages[at, P_FACTS])


@kernel
def attempt(m, vcpu, linear, size, how, trail, steps, pages):
    """Run an access up to its first event, or to its end.

    Returns (reason, value, gpa, gla, denied, stale, count): value is the qualification of an exit or the error code of
    an exception; ``count`` rows of ``pages`` are filled. ``trail`` holds the last EPT walk, that of an exit's GPA.
    """
    how &= ~(15 << acc.LINEAR_SHIFT) & ~acc.UNVERIFIED_PAGING
    done = 0
    count = 0
    stale = False
    while done < size:
        at = effective(m, vcpu, linear + done)
        if not canonical(m, vcpu, at):
            return -exceptions.GENERAL_PROTECTION, 0, 0, at, 0, stale, count
        part = access_over_pages.page_part(at, at + size - done)
        reason, value, gpa, denied, misled = page(m, vcpu, at, part, how, trail, steps, pages, count)
        stale = stale or misled
        if reason == exits.EPT_VIOLATION:
            if tlb.modelled(m):
                tlb.violated(m, vcpu, gpa, at)
            vector = ve.convert(m, vcpu, how, value, at, gpa, trail)
            if vector:
                return -vector, value, gpa, at, denied, stale, count
        if reason != exits.NONE:
            return reason, value, gpa, at, denied, stale, count
        count += 1
        done += part
    if not log_fits(m, vcpu, pages, count, trail):
        return exits.PML_FULL, exit_qualification.nmi_unblocking(how), pages[0, P_GPA], linear, 0, stale, count
    finish(m, vcpu, pages, count, trail)
    return exits.NONE, 0, pages[0, P_GPA], linear, 0, stale, count


def scratch() -> tuple[Words, Words, Words]:
    """The arrays that ``attempt`` works in: trail, steps, pages."""
    trail = np.zeros((ept.TRAIL_ROWS, 4), dtype=np.int64)
    steps = np.zeros((guest_paging.STEP_ROWS, 4), dtype=np.int64)
    return trail, steps, np.zeros((MAX_PAGES, PAGE_WORDS), dtype=np.int64)


def access(m: Machine, vcpu: int, linear: int, size: int, how: int) -> Access:
    """Run one access as the processor does; the caller provides for the frames that guest memory may need."""
    trail, steps, pages = scratch()
    reason, value, gpa, gla, denied, stale, _ = attempt(m, vcpu, linear, size, how, trail, steps, pages)
    fault = reason < 0 and reason != -exceptions.VIRTUALIZATION
    q, error = (0, int(value)) if fault else (int(value), 0)
    return Access(int(reason), q, int(gpa), int(gla), error, int(denied), bool(stale))
