"""Replay: a run of guest accesses through the fast path, and through KVM_RUN where that has no answer.

One loop serves a record in a few instructions when the page is in the fast path. Everything else, from a first touch
to a violation or a malformed record, goes through the same functions as a single access.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch import exits
from engine.arch.controls import V_GUEST_MODE
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import access_over_pages, ept, fastpath, guest_tables
from engine.cpu.frames import FIRST_VCPU_FRAME, STATE_FRAME, ample, read_word
from engine.cpu.memory_slots import find_slot, home, space_of, within
from engine.jit import kernel
from engine.kvm import bitmaps, dirty_marking, emulator, exit_handling, shadow_paging, vcpu_run
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.granted_subpages import grant_touched
from engine.kvm.slots import writable_bytes
from engine.trace.record_checks import DONE, describe, refusal
from engine.trace.refused import count_refused
from engine.trace.serving import BUT_LENGTH, WHOLE, count_of, record_at, serve

# Why the loop came back, beside DONE and what is wrong with a record
NEED_FRAMES = 1
LOG_FULL = 2
STOPPED = 3
UNTRANSLATED = 47

# What becomes of a write that is refused
SKIP = 0
STOP = 1
ALLOW = 2
GRANT = 3

# Positions in the options array
OPTION_ON_VIOLATION = 0
OPTION_LIST_ALL = 1
OPTION_CIRCUMSTANCES = 3  # bits of ``how`` that records do not hold
OPTION_KINDS = 2  # records may say what kind of access they are; else those bits are zeros
OPTION_NOWHERE = 4  # what becomes of records whose address leads nowhere (``cpu.guest_tables``); 0: there are none

# What becomes of them: the loop comes back for each, or counts it and goes on.
LISTED = 1
COUNTED = 2

NO_GVA = np.int64(0)


@kernel
def place_of(m, source, vcpu, gpa):
    """Where an access is by whoever makes it: in the address space of its vCPU, unless the host makes it."""
    return gpa if source == acc.HOST else gpa | space_of(m, vcpu)


@kernel
def in_protected_page(m, gpa, size):
    """Whether an access touches a page with a sub-page that may not be written: what page granularity would stop."""
    if fastpath.whole(m, gpa, size):
        return False
    done = 0
    while done < size:
        at = access_over_pages.place(m, gpa, done)
        page = home(m, at >> 12)
        if bitmaps.effective(m, page) != FULL_ACCESS and find_slot(m, page) >= 0:
            return True
        done += access_over_pages.page_part(at, at + size - done)
    return False


@kernel
def passes_unenforced(m, vcpu, gpa, size):
    """Whether a write is one that a nested guest makes past sub-page protection: its own tables do not have it."""
    if not read_word(m, FIRST_VCPU_FRAME + vcpu, V_GUEST_MODE) or not read_word(m, STATE_FRAME, reg.SPP_ACTIVE):
        return False
    if not writable_bytes(m, gpa, size):
        return False
    return bitmaps.refuses(m, gpa, size)


@kernel
def note_landing(m, gpa, size):
    """Tell the dirty logs of a write that lands by the caller's choice, if all of it is in writable memory."""
    if dirty_marking.mode(m) and writable_bytes(m, gpa, size):
        dirty_marking.note_host_write(m, gpa, size)


@kernel
def attempt(m, source, vcpu, gpa, word, index, gva, how, trail, log, used, tally, list_all):
    """Run an access by whoever makes it; returns as ``run.execute`` does."""
    place = place_of(m, source, vcpu, gpa)
    if source != acc.GUEST:
        ending, reason, q, denied, at = emulator.execute(m, source, place, word & 0xFFFF, how & acc.ACCESS_MASK, tally)
        return ending, reason, q, denied, within(at)
    if not ept.mode_of(m, vcpu) & ept.MODE_EPT:
        return shadow_paging.execute(m, place, word & 0xFFFF, how & acc.ACCESS_MASK)
    return vcpu_run.execute(m, vcpu, gpa, word, index, gva, how, trail, log, used, tally, list_all)


@kernel
def run_record(m, gpa, word, index, gva, options, trail, log, used, tally):
    """Run one record the long way; returns DONE, or STOPPED, or why the record is refused."""
    bad = refusal(m, gpa, word, options[OPTION_KINDS])
    if bad != DONE:
        return bad
    access = (word >> 16) & acc.ACCESS_MASK
    vcpu = m.vcpu_of_id[(word >> 32) & 0xFFFF]
    how = describe(word) | options[OPTION_CIRCUMSTANCES]
    list_all = options[OPTION_LIST_ALL]
    source = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK
    place = place_of(m, source, vcpu, gpa)
    if access == acc.WRITE and source == acc.GUEST and passes_unenforced(m, vcpu, place, word & 0xFFFF):
        note_landing(m, place, word & 0xFFFF)
        tally[reg.UNENFORCED] += 1
        tally[reg.PAGE_GRANULAR] += 1
        tally[reg.WRITES] += 1
        return DONE
    plain = how == acc.PLAIN_WRITE and source == acc.GUEST
    q, denied = fastpath.denial(m, gpa, word & 0xFFFF) if plain else (0, 0)
    if q:
        ending, reason, at = res.VIOLATION, exits.EPT_VIOLATION, gpa
        exit_handling.count_exit(tally, reason, q)
    else:
        ending, reason, q, denied, at = attempt(
            m, source, vcpu, gpa, word, index, gva, how, trail, log, used, tally, list_all
        )
    resolution = ending & ~res.STALE
    tally[reg.STALE_ACCESSES] += ending != resolution
    refused = resolution == res.VIOLATION and denied != 0
    closed = access == acc.WRITE and source != acc.HOST and (refused or in_protected_page(m, place, word & 0xFFFF))
    guarded = closed and (refused or emulator.obeys(m, source))
    if access != acc.WRITE:
        guarded = resolution == res.VIOLATION  # page access is of whole pages anyway
    if resolution == res.VIOLATION or resolution == res.INTERNAL_ERROR or resolution == res.RUN_FAILED:
        vcpu_run.log_exit(log, used, index, gpa, word, gva, reason, q, ending, denied, at)
        if resolution == res.VIOLATION:
            tally[reg.VIOLATIONS] += 1
        if options[OPTION_ON_VIOLATION] == STOP:
            tally[reg.PAGE_GRANULAR] += guarded
            return STOPPED
        if options[OPTION_ON_VIOLATION] == ALLOW and resolution == res.VIOLATION and access == acc.WRITE:
            note_landing(m, place, word & 0xFFFF)
        grants = options[OPTION_ON_VIOLATION] == GRANT and access == acc.WRITE
        if grants and grant_touched(m, gpa, word & 0xFFFF, trail):
            tally[reg.GRANTS] += 1
            ending, reason, q, denied, at = attempt(
                m, source, vcpu, gpa, word, index, gva, how, trail, log, used, tally, list_all
            )
            resolution = ending & ~res.STALE
            if list_all and (resolution == res.VIOLATION or resolution == res.INTERNAL_ERROR):
                vcpu_run.log_exit(log, used, index, gpa, word, gva, reason, q, ending, denied, at)
    if resolution == res.MMIO or resolution == res.EXCEPTION:
        tally[reg.MMIO] += resolution == res.MMIO
        if list_all:
            vcpu_run.log_exit(log, used, index, gpa, word, gva, reason, q, ending, denied, at)
    elif resolution == res.COMPLETED:
        if ending != resolution:
            vcpu_run.log_exit(log, used, index, gpa, word, gva, reason, q, ending, denied, at)
        tally[reg.UNENFORCED] += closed and bitmaps.refuses(m, place, word & 0xFFFF)
    tally[reg.PAGE_GRANULAR] += guarded
    tally[reg.WRITES] += access == acc.WRITE
    return DONE


@kernel
def only_counts_refused(m, options):
    """Whether a plain write that is refused is counted and listed, and nothing else."""
    skips = options[OPTION_ON_VIOLATION] == SKIP
    allows = options[OPTION_ON_VIOLATION] == ALLOW and not dirty_marking.mode(m)
    return (skips or allows) and options[OPTION_CIRCUMSTANCES] == 0


@kernel
def replay(m, run, gvas, start, base, options, trail, log, used, tally):
    """Replay a ``serving.Run`` of n records from position ``start``; ``base`` is the index of the chunk's first.

    ``gvas`` is int64[n] or empty. Returns (status, position): DONE with n, or why it came back and the record it has
    not run; NEED_FRAMES and LOG_FULL ask the caller to make room and call again from there, UNTRANSLATED to take note
    of a record whose address leads nowhere, which is no access.
    """
    status = DONE
    i = start
    nowhere = np.int64(0)
    seen = BUT_LENGTH if options[OPTION_KINDS] else WHOLE
    counting = only_counts_refused(m, options)
    while True:
        i = serve(m.cache, m.vcpu_of_id, run, i, seen, tally)
        if i == count_of(run):
            break
        if counting:
            after = count_refused(m, run, gvas, i, base, seen, log, used, tally)
            if after > i:
                i = after
                continue
        gpa, word = record_at(run, i)
        if options[OPTION_NOWHERE] and gpa >= guest_tables.NOWHERE:
            if options[OPTION_NOWHERE] == LISTED:
                status = UNTRANSLATED
                break
            nowhere += 1
            i += 1
            continue
        if not ample(m):
            status = NEED_FRAMES
            break
        if used[0] + 2 * vcpu_run.MAX_EXITS + 2 > log.shape[0]:
            status = LOG_FULL
            break
        gva = gvas[i] if gvas.shape[0] else NO_GVA
        status = run_record(m, gpa, word, base + i, gva, options, trail, log, used, tally)
        if status != DONE:
            break
        i += 1
    tally[reg.RECORDS] += i - start - nowhere
    tally[reg.UNTRANSLATED] += nowhere
    return status, i
