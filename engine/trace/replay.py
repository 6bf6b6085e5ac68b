"""Replay: a run of guest accesses through the fast path, and through KVM_RUN where that has no answer.

One loop serves a record in a few instructions when the page is in the fast path. Everything else, from a first touch
to a violation or a malformed record, goes through the same functions as a single access.
"""

from engine.arch import access as acc
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import fastpath, sppt
from engine.cpu.frames import CAP_VCPUS, STATE_FRAME, ample, read_word
from engine.jit import kernel
from engine.kvm import layers, run, spp
from engine.kvm import registers as reg
from engine.kvm import resolutions as res
from engine.kvm.slots import find_slot

# Why the loop came back
DONE = 0
NEED_FRAMES = 1
LOG_FULL = 2
STOPPED = 3
BAD_SIZE = 4
BAD_ACCESS = 5
BAD_VCPU = 6
BAD_ADDRESS = 7
BAD_RESERVED = 8

# on_violation
SKIP = 0
STOP = 1
ALLOW = 2
GRANT = 3
ON_VIOLATION = ("skip", "stop", "allow", "grant")

# Positions in the options array
OPTION_ON_VIOLATION = 0
OPTION_LIST_ALL = 1

GPA_LIMIT = 1 << 52


@kernel
def refusal(m, gpa, word):
    """Why a record is no access at all, DONE if it is one."""
    size = word & 0xFFFF
    if size == 0:
        return BAD_SIZE
    if (word >> 16) & 0xFF > acc.EXECUTE:
        return BAD_ACCESS
    if (word >> 24) & 0xFF or (word >> 48) & 0xFFFF:
        return BAD_RESERVED
    vcpu = (word >> 32) & 0xFFFF
    if vcpu >= m.caps[CAP_VCPUS] or m.vcpu_of_id[vcpu] < 0:
        return BAD_VCPU
    if gpa < 0 or gpa + size > GPA_LIMIT or gpa + size < 0:
        return BAD_ADDRESS
    return DONE


@kernel
def in_protected_page(m, gpa, size):
    """Whether an access touches a page with a sub-page that may not be written: what page granularity would stop."""
    if not read_word(m, STATE_FRAME, reg.SPP_ACTIVE):
        return False
    for gfn in range(gpa >> 12, ((gpa + size - 1) >> 12) + 1):
        if layers.effective(m, gfn) != FULL_ACCESS and find_slot(m, gfn) >= 0:
            return True
    return False


@kernel
def grant_touched(m, gpa, size, trail):
    """Open every refused sub-page that an access touches; returns whether there was one."""
    opened = False
    at = gpa
    while at < gpa + size:
        part = run.page_part(at, gpa + size)
        refused = sppt.touched(at, part) & ~layers.effective(m, at >> 12)
        if refused:
            spp.grant(m, at >> 12, refused, trail)
            opened = True
        at += part
    return opened


@kernel
def run_record(m, gpa, word, index, gva, options, trail, log, used, tally):
    """Run one record the long way; returns DONE, or STOPPED, or why the record is refused."""
    bad = refusal(m, gpa, word)
    if bad != DONE:
        return bad
    access = (word >> 16) & acc.ACCESS_MASK
    vcpu = m.vcpu_of_id[(word >> 32) & 0xFFFF]
    how = access | acc.DEFAULT_LINEAR
    guarded = access == acc.WRITE and in_protected_page(m, gpa, word & 0xFFFF)
    list_all = options[OPTION_LIST_ALL]
    resolution, reason, q, denied, at = run.execute(m, vcpu, gpa, word, index, gva, how, trail, log, used, tally, list_all)
    if resolution == res.MMIO:
        tally[reg.MMIO] += 1
        if list_all:
            run.log_exit(log, used, index, gpa, word, gva, reason, q, resolution, denied, at)
    elif resolution != res.COMPLETED:
        run.log_exit(log, used, index, gpa, word, gva, reason, q, resolution, denied, at)
        if resolution == res.VIOLATION:
            tally[reg.VIOLATIONS] += 1
        if options[OPTION_ON_VIOLATION] == STOP:
            tally[reg.PAGE_GRANULAR] += guarded
            return STOPPED
        if options[OPTION_ON_VIOLATION] == GRANT and grant_touched(m, gpa, word & 0xFFFF, trail):
            tally[reg.GRANTS] += 1
            run.execute(m, vcpu, gpa, word, index, gva, how, trail, log, used, tally, list_all)
    tally[reg.PAGE_GRANULAR] += guarded
    tally[reg.WRITES] += access == acc.WRITE
    return DONE


@kernel
def replay(m, records, gvas, start, base, options, trail, log, used, tally):
    """Replay ``records`` (int64[n, 2]) from position ``start``; ``base`` is the index of the first of the chunk.

    ``gvas`` is int64[n] or empty. Returns (status, position): DONE with n, or why it came back and the record it has
    not run; NEED_FRAMES and LOG_FULL ask the caller to make room and call again from there.
    """
    n = records.shape[0]
    cache = m.cache
    ids = m.caps[CAP_VCPUS]
    fast_writes = 0
    guarded = 0
    status = DONE
    i = start
    while i < n:
        gpa = records[i, 0]
        word = records[i, 1]
        entry = cache[(gpa >> 12) & fastpath.CACHE_MASK]
        last = (gpa & 0xFFF) + ((word - 1) & 0xFFFF)
        # gpa >> 40 is below 4096 exactly when the GPA is below 2^52.
        if entry >> 32 == (gpa >> 24) + 1 and (last | (gpa >> 40)) >> 12 == 0:
            vcpu = (word >> 32) & 0xFFFF
            if vcpu < ids and m.vcpu_of_id[vcpu] >= 0:
                kind = word & fastpath.KIND_BITS
                if kind == fastpath.PLAIN_WRITE:
                    touched = (2 << (last >> 7)) - (1 << ((gpa >> 7) & 31))
                    if touched & ~entry == 0:
                        guarded += entry & FULL_ACCESS != FULL_ACCESS
                        fast_writes += 1
                        i += 1
                        continue
                elif kind == fastpath.PLAIN_READ or kind == fastpath.PLAIN_EXECUTE:
                    i += 1
                    continue
        if not ample(m):
            status = NEED_FRAMES
            break
        if used[0] + 2 * run.MAX_EXITS + 2 > log.shape[0]:
            status = LOG_FULL
            break
        gva = gvas[i] if gvas.shape[0] else 0
        status = run_record(m, gpa, word, base + i, gva, options, trail, log, used, tally)
        if status != DONE:
            break
        i += 1
    tally[reg.WRITES] += fast_writes
    tally[reg.PAGE_GRANULAR] += guarded
    tally[reg.RECORDS] += i - start
    return status, i
