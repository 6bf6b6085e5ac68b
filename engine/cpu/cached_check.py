"""The access decision through the translation cache: what every access of a guest goes by.

Without a cache this is ``access_check.check``. With one, an access that an entry can serve is decided by what the entry
remembers, and by the tables as well, to say whether the answer is stale: whether a walk would have given another.

An entry serves an access if nothing is left to be done for it: a write needs a set dirty flag, and the vector where
sub-page permissions decide. Otherwise the processor walks, as if there were no entry.
"""

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.cpu import access_check, access_rights, ept, page_log, tlb
from engine.jit import kernel

# How an access was decided: by a walk, by an entry, by an entry that a walk would contradict.
WALKED = 0
CACHED = 1
STALE = 2


@kernel
def serves(m, row, how, mode):
    """Whether an entry can serve an access without a walk."""
    writes = access_rights.wants(how, mode) & bits.WRITE != 0
    if not writes:
        return True
    leaf = m.tlb[row, tlb.E_LEAF]
    if mode & ept.MODE_ACCESSED_DIRTY and not leaf & bits.DIRTY:
        return False
    rights = m.tlb[row, tlb.E_RIGHTS]
    asks_vector = mode & ept.MODE_SPP and not rights & bits.WRITE and leaf & bits.SPP
    return not asks_vector or m.tlb[row, tlb.E_FACTS] & tlb.VECTOR_READ != 0


@kernel
def judge_entry(m, vcpu, row, gpa, size, how, mode, trail):
    """Decide by an entry; returns as ``access_check.check`` does."""
    word = m.tlb[row, tlb.E_RIGHTS]
    return access_check.judge(
        m,
        vcpu,
        gpa,
        size,
        how,
        mode,
        (word >> tlb.LEVEL_SHIFT) & 15,
        word & tlb.RIGHTS_MASK,
        ((word >> tlb.UPPER_SHIFT) & 1) << 1,
        m.tlb[row, tlb.E_LEAF],
        access_check.VECTOR_KNOWN,
        m.tlb[row, tlb.E_VECTOR],
        trail,
    )


@kernel
def check(m, vcpu, gpa, size, how, trail):
    """Decide about ``size`` bytes at ``gpa``, all in one page; changes nothing.

    Returns (reason, qualification, denied, source): the first three as ``access_check.check`` does, and WALKED, CACHED
    or STALE. ``trail`` holds a walk of the tables as they are, whatever decided.
    """
    reason, q, denied = access_check.check(m, vcpu, gpa, size, how, trail)
    if not tlb.modelled(m):
        return reason, q, denied, WALKED
    return through_cache(m, vcpu, gpa, size, how, reason, q, denied, trail)


@kernel
def through_cache(m, vcpu, gpa, size, how, reason, q, denied, trail):
    """``check`` where the walk gave the first three and a cache may know otherwise."""
    mode = ept.mode_of(m, vcpu)
    row = tlb.find(m, vcpu, tlb.PHYSICAL, gpa >> 12) if mode & ept.MODE_EPT else tlb.MISSING
    if row == tlb.MISSING or not serves(m, row, how, mode):
        return reason, q, denied, WALKED
    cached_reason, cached_q, cached_denied = judge_entry(m, vcpu, row, gpa, size, how, mode, trail)
    if cached_reason == reason and cached_q == q and cached_denied == denied:
        return reason, q, denied, CACHED
    return cached_reason, cached_q, cached_denied, STALE


@kernel
def finish(m, vcpu, mode, gpa, how, source, trail):
    """Leave behind what an allowed access to a page leaves; returns whether its leaf is dirty.

    An entry that served it has nothing left to do; a walk sets flags, logs, and is remembered.
    """
    if source != WALKED:
        return True
    dirty = page_log.commit(m, vcpu, mode, gpa, how, trail)
    if tlb.modelled(m) and trail[ept.TRAIL_COUNTS, 0]:
        facts = acc.LINEAR_VALID | 12 << tlb.GUEST_SIZE_AT
        tlb.remember(m, vcpu, tlb.PHYSICAL, gpa >> 12, gpa >> 12, facts, trail)
    return dirty
