"""Records by linear address: each gets its GPA from the guest's own tables before it is replayed.

Translations that repeat come from a cache, keyed by (vCPU, address space, page). It is right as long as guest memory
and registers are what they were, which is as long as a replay goes on by itself: records carry no data to store, and
an address space of a record is no load of CR3. Whoever changes memory in between has it cleared.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch.controls import V_GUEST_MODE
from engine.arch.words import positions
from engine.cpu import access_over_pages, access_rights, guest_paging, guest_tables
from engine.cpu.frames import FIRST_VCPU_FRAME, NO_PLACE, read_word
from engine.jit import kernel
from engine.trace import record_checks
from engine.trace.translated import BAD_SPACE, fits_space

# Why ``translate`` came back, beside DONE and BAD_SPACE: the record is over frames that are no neighbours, and
# ``Machine.places`` has them; it has no linear address; its vCPU runs a nested guest.
SPLIT = 48
BAD_PLACE = 49
BAD_NESTED = 50

# Rows of the cache: a page of linear addresses under an address space of a vCPU, and what ``locate`` says of it.
C_PAGE, C_SPACE, C_VCPU, C_GPA = positions(4)
CACHE_BITS = 13
CACHE_ROWS = 1 << CACHE_BITS
CACHE_WORDS = 4
NO_VCPU = np.int64(-1)

NO_SPACE = guest_paging.OWN_SPACE
# Word 1 of a record but for its size: who accesses, and how.
WHO = ~0xFFFF
# No record has it, for its reserved bits.
NOBODY = np.int64(-1)


@kernel
def by_linear_address(word):
    """Whether an access has a linear address: one of the guest or of KVM for it, not to a paging structure."""
    how = record_checks.describe(word)
    by_host = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK == acc.HOST
    return not by_host and how & acc.LINEAR_VALID << acc.LINEAR_SHIFT != 0 and not access_rights.is_paging(how)


@kernel
def frame_of(m, cache, vcpu, space, gva, trail, steps):
    """GPA of the page of a linear address, or NOWHERE and a level, from the cache or from the tables."""
    page = gva >> 12
    row = (page ^ space >> 12 ^ vcpu << 7) & (CACHE_ROWS - 1)
    if cache[row, C_PAGE] != page or cache[row, C_SPACE] != space or cache[row, C_VCPU] != vcpu:
        cache[row, C_GPA] = guest_tables.locate(m, vcpu, space, page << 12, trail, steps)
        cache[row, C_PAGE] = page
        cache[row, C_SPACE] = space
        cache[row, C_VCPU] = vcpu
    return cache[row, C_GPA]


@kernel
def place_pages(m, cache, vcpu, space, gva, size, trail, steps):
    """Find the pages of an access over several: (GPA of the first byte or NOWHERE and a level, whether they are
    neighbours). Where they are not, ``m.places`` is filled.
    """
    first = frame_of(m, cache, vcpu, space, gva, trail, steps)
    neighbours = True
    done = access_over_pages.page_part(gva, gva + size)
    count = 1
    while done < size and first < guest_tables.NOWHERE:
        gpa = frame_of(m, cache, vcpu, space, gva + done, trail, steps)
        if gpa >= guest_tables.NOWHERE:
            return gpa, True
        neighbours = neighbours and gpa == first + (count << 12)
        m.places[count] = gpa
        count += 1
        done += access_over_pages.page_part(gva + done, gva + size)
    if first < guest_tables.NOWHERE:
        first |= gva & 0xFFF
        m.places[0] = NO_PLACE if neighbours else first
    return first, neighbours


@kernel
def refuses(m, word, kinds):
    """What is wrong with who accesses, and how, beside what the replay itself says; DONE if nothing is."""
    if not by_linear_address(word):
        return BAD_PLACE
    if read_word(m, FIRST_VCPU_FRAME + m.vcpu_of_id[(word >> 32) & 0xFFFF], V_GUEST_MODE):
        return BAD_NESTED
    return record_checks.DONE


@kernel
def translate(m, words, gvas, spaces, start, kinds, cache, trail, steps):
    """Give the records from ``start`` on their GPAs, in word 0; of one that leads nowhere, NOWHERE and the level.

    ``words`` int64[2n] and ``gvas`` int64[n] as in ``trace.replay``; ``spaces`` int64[n] or empty. Returns (status,
    position): DONE with n, or why it came back and at which record, which is not to be replayed with those before. One
    that is no access at all is left for the replay to refuse.
    """
    who = NOBODY
    vcpu = np.int64(0)
    known = False
    last = NO_SPACE
    m.places[0] = NO_PLACE
    for i in range(start, gvas.shape[0]):
        word = words[2 * i + 1]
        size = word & 0xFFFF
        if word & WHO != who:
            who = word & WHO
            known = record_checks.refusal(m, 0, word | 1, kinds) == record_checks.DONE
            if known:
                status = refuses(m, word, kinds)
                if status != record_checks.DONE:
                    return status, i
                vcpu = np.int64(m.vcpu_of_id[(word >> 32) & 0xFFFF])
        if not known or size == 0:
            words[2 * i] = 0
            continue
        space = spaces[i] if spaces.shape[0] else NO_SPACE
        if space != last:
            if space != NO_SPACE and not fits_space(m, space):
                return BAD_SPACE, i
            last = space
        gva = gvas[i]
        if (gva & 0xFFF) + size <= access_over_pages.PAGE:
            words[2 * i] = frame_of(m, cache, vcpu, space, gva, trail, steps) | gva & 0xFFF
        else:
            gpa, neighbours = place_pages(m, cache, vcpu, space, gva, size, trail, steps)
            words[2 * i] = gpa
            if not neighbours:
                return SPLIT, i
    return record_checks.DONE, gvas.shape[0]
