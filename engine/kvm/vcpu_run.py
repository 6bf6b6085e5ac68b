"""KVM_RUN for one memory access: the processor decides, KVM handles the exit, the guest tries again.

What the processor does with an access over several pages is in ``cpu.access_over_pages``.
"""

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import access_over_pages, ept, fastpath, sppt, tlb, ve
from engine.cpu.frames import CAP_FAST_PATH
from engine.cpu.memory_slots import space_of
from engine.jit import kernel
from engine.kvm import bitmaps, dirty_marking, page_tracking
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.exit_handling import block_nmis, count_exit, handle_exit

# Entries that a read or a fetch leaves as they are.
SETTLED = bits.READ | bits.EXECUTE | bits.ACCESSED

# A page needs at most three exits (map and arm, SPPT miss, violation); one access touches at most 17 pages.
# What takes longer is a table that a client broke, and would loop for ever on hardware.
MAX_EXITS = 64

# Words of an exit record in the buffer that replay and single access share.
EXIT_INDEX = 0
EXIT_GPA = 1  # of the record: the exit's own is derived (see trace/results)
EXIT_RECORD = 2  # word 1 of the record: size, access, vCPU
EXIT_GVA = 3
EXIT_QUALIFICATION = 4
EXIT_REASON = 5  # bits 15:0 reason, 23:16 resolution, 24 stale
EXIT_DENIED = 6
EXIT_AT = 7  # GPA that the exit reports
EXIT_WORDS = 8


@kernel
def log_exit(log, used, index, gpa, word, gva, reason, qualification, resolution, denied, at):
    """Append an exit record; ``gpa`` and ``word`` are the trace record's two words."""
    row = used[0]
    log[row, EXIT_INDEX] = index
    log[row, EXIT_GPA] = gpa
    log[row, EXIT_RECORD] = word
    log[row, EXIT_GVA] = gva
    log[row, EXIT_QUALIFICATION] = qualification
    log[row, EXIT_REASON] = reason | resolution << 16
    log[row, EXIT_DENIED] = denied
    log[row, EXIT_AT] = at
    used[0] = row + 1


@kernel
def remember(m, gpa, dirty, trail):
    """Put a page in the fast path if its next access needs nothing but what its entries say now."""
    if not m.caps[CAP_FAST_PATH]:
        return
    rights = bits.RIGHTS
    for row in range(trail[ept.TRAIL_COUNTS, 0]):
        rights &= trail[row, 3]
    if rights & (bits.READ | bits.EXECUTE) != bits.READ | bits.EXECUTE:
        return
    writable = 0
    mask = bitmaps.effective(m, gpa >> 12)
    if dirty and rights & bits.WRITE:
        writable = mask  # where that is not all, a write that goes through against the map is counted
    elif dirty and trail[ept.TRAIL_COUNTS, 1] == 4 and sppt.gather(trail[ept.TRAIL_SPPT + 3, 3]) == mask:
        writable = mask
    fastpath.remember(m, gpa >> 12, writable)


@kernel
def remember_denial(m, gpa, size, qualification, denied, trail):
    """Put a refusal in the fast path if the page's map alone explains it, and reads and fetches need nothing."""
    mask = bitmaps.effective(m, gpa >> 12)
    if not m.caps[CAP_FAST_PATH] or denied != sppt.touched(gpa, size) & ~mask:
        return
    settled = SETTLED
    for row in range(trail[ept.TRAIL_COUNTS, 0]):
        settled &= trail[row, 3]
    if settled == SETTLED:
        fastpath.remember_denial(m, gpa >> 12, mask, qualification)


@kernel
def refused_by_policy(m, at, end, qualification, denied):
    """Sub-pages that a policy refuses of the access up to ``end``, of a page that is tracked or out of those that an
    SPPT refused: a dirty log closes sub-pages as well.
    """
    if denied == 0:
        return page_tracking.refused(m, at, end, qualification)
    refused = denied & ~bitmaps.effective(m, at >> 12)
    return refused or denied


@kernel
def execute(m, vcpu, gpa, word, index, gva, how, trail, log, used, tally, list_all):
    """Run one access to its end.

    ``gpa`` and ``word`` are the trace record's two words (size in bits 15:0). Returns (resolution, reason,
    qualification, denied, at) of the exit that ended it, or COMPLETED; an EXCEPTION is the #VE that an EPT violation
    became. STALE stands beside the resolution where a cached translation gave it. Exits that KVM handles itself are
    counted in ``tally`` and listed in ``log`` when ``list_all``; the one that ends the access is counted but left to
    the caller to list.
    """
    size = word & 0xFFFF
    whole = access_over_pages.page_part(gpa, gpa + size) == size
    count = 0
    while True:
        reason, qualification, denied, at, source, misled = access_over_pages.decide(m, vcpu, gpa, size, how, trail)
        stale = res.STALE if misled else 0
        if reason == exits.NONE:
            break
        if reason == exits.EPT_VIOLATION and tlb.modelled(m):
            tlb.violated(m, vcpu, at, tlb.EVERY)
        linear = gva + access_over_pages.offset_of(m, gpa, at)
        if reason == exits.EPT_VIOLATION and ve.convert(m, vcpu, how, qualification, linear, at, trail):
            tally[reg.EXCEPTIONS] += 1
            return res.EXCEPTION | stale, reason, qualification, denied, at
        count_exit(tally, reason, qualification)
        block_nmis(m, vcpu, how, qualification)
        resolution = handle_exit(m, vcpu, at, how, reason, qualification, denied, trail, tally)
        if resolution == res.VIOLATION:
            place = at | space_of(m, vcpu)
            end = place + size - access_over_pages.offset_of(m, gpa, at)
            denied = refused_by_policy(m, place, end, qualification, denied)
        count += 1
        tlb.transition(m, vcpu)
        if resolution == res.VIOLATION and denied and whole and how == acc.PLAIN_WRITE:
            remember_denial(m, gpa, size, qualification, denied, trail)
        if resolution > res.LAST_INTERNAL or count == MAX_EXITS:
            ending = resolution if resolution > res.LAST_INTERNAL else res.INTERNAL_ERROR
            return ending | stale, reason, qualification, denied, at
        if list_all:
            log_exit(log, used, index, gpa, word, gva, reason, qualification, resolution | stale, denied, at)
    dirty = access_over_pages.settle(m, vcpu, gpa, size, how, source, trail)
    space = space_of(m, vcpu)
    if space and how & acc.ACCESS_MASK == acc.WRITE:
        dirty_marking.note_host_write(m, gpa | space, size)
    if whole:
        remember(m, gpa, dirty, trail)
    return res.COMPLETED | stale, 0, 0, 0, gpa
