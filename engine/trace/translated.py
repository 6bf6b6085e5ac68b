"""Accesses of a trace that go by the translation cache: those of traces with operations or address spaces.

A record says where its linear address led when it was recorded. If the cache still has a translation of the page to
another frame, no flush has removed it, and the processor goes by that one: the translation is stale, and the access
runs at the GPA that it gives. Otherwise the access runs where the record says, and what it needed is remembered.

``uses`` is int64[rows of the cache, USE_WORDS]: which records of the trace used an entry. It says nothing that decides.
"""

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import paging as guest
from engine.arch.words import positions
from engine.cpu import access_over_pages, access_rights, ept, tlb
from engine.cpu.frames import CAP_RESERVED_ADDRESS, FIRST_VCPU_FRAME, ample, read_word, write_word
from engine.cpu.memory_slots import space_of
from engine.jit import kernel
from engine.kvm import state_frame as reg
from engine.kvm import vcpu_run
from engine.kvm.shadow_paging import is_mmio
from engine.trace import record_checks
from engine.trace import replay as plain

# Why the loop came back, beside the reasons of ``trace.replay``
FOUND_FULL = 32
BAD_OFFSET = 33
BAD_SPACE = 34

# In place of an address space: the record does not say.
NO_SPACE = -1

# A row of ``uses``: the record that made the entry (NEVER: none of this trace), and the last record of any vCPU that
# agreed with it.
USE_FIRST, USE_LAST = positions(2)
USE_WORDS = 2
NEVER = -1

# A row of ``found``: a page of an access by a stale translation. The GPAs are those of the part in that page.
F_INDEX, F_RECORD, F_GVA, F_SPACE, F_GPA, F_CACHED, F_MADE, F_AFTER, F_VCPU = positions(9)
FOUND_WORDS = 9

# Words of ``count``: rows of ``found`` in use, accesses by stale translations, and whether they are noted at all.
COUNT_USED, COUNT_STALE, COUNT_NOTED = positions(3)

# One access touches at most 17 pages.
MOST_PAGES = 18


@kernel
def goes_by_linear_address(word):
    """Whether the processor translates the access of a record: one of the guest's, not to a paging structure."""
    how = record_checks.describe(word)
    mine = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK == acc.GUEST
    return mine and how & acc.LINEAR_VALID << acc.LINEAR_SHIFT != 0 and not access_rights.is_paging(how)


@kernel
def fits_space(m, space):
    """Whether CR3 can hold a value."""
    return space & (guest.CR3_RESERVED_HIGH | m.caps[CAP_RESERVED_ADDRESS]) == 0


@kernel
def find(m, vcpu, kind, page):
    """Row of the entry for a page under the vCPU's page tables, MISSING if there is none.

    Beside what a processor looks up by, an entry is for its own address space here, unless it is global: those of a
    trace may come one after the other without a load of CR3 that would have told them apart.
    """
    space = tlb.address_space_of(m, vcpu)
    first = tlb.first_way(vcpu, page)
    for row in range(first, first + tlb.WAYS):
        own = m.tlb[row, tlb.E_ADDRESS_SPACE] == space or m.tlb[row, tlb.E_FACTS] & tlb.GUEST_GLOBAL != 0
        if own and tlb.translates(m, row, vcpu, kind, page):
            return row
    return tlb.MISSING


@kernel
def kind_of(m, vcpu):
    """The kind of entries that a vCPU's linear addresses have."""
    return tlb.COMBINED if ept.mode_of(m, vcpu) & ept.MODE_EPT else tlb.LINEAR


@kernel
def agree(m, vcpu, kind, page, frame, index, uses):
    """Note that record ``index`` has a page in a frame, with the entries of all vCPUs that say the same of it.

    They are those under the same page tables as the vCPU's.
    """
    space = tlb.address_space_of(m, vcpu)
    for other in range(m.queues.shape[0]):
        first = tlb.first_way(other, page)
        for row in range(first, first + tlb.WAYS):
            if m.tlb[row, tlb.E_PAGE] != page or m.tlb[row, tlb.E_FRAME] != frame or not tlb.live(m, row):
                continue
            if m.tlb[row, tlb.E_KIND] == kind | other << tlb.VCPU_SHIFT and m.tlb[row, tlb.E_ADDRESS_SPACE] == space:
                uses[row, USE_LAST] = index


@kernel
def note(m, row, vcpu, index, word, linear, gpa, uses, found, count):
    """Note a page of an access whose record has ``gpa`` where the entry in ``row`` leads elsewhere."""
    if not count[COUNT_NOTED]:
        return
    at = count[COUNT_USED]
    found[at, F_INDEX] = index
    found[at, F_RECORD] = word
    found[at, F_GVA] = linear
    found[at, F_SPACE] = tlb.address_space_of(m, vcpu)
    found[at, F_GPA] = gpa
    found[at, F_CACHED] = m.tlb[row, tlb.E_FRAME] << 12 | gpa & 0xFFF
    found[at, F_MADE] = uses[row, USE_FIRST]
    found[at, F_AFTER] = uses[row, USE_LAST]
    found[at, F_VCPU] = vcpu
    count[COUNT_USED] = at + 1


@kernel
def translate(m, vcpu, gva, gpa, size, index, word, uses, found, count):
    """The GPA at which an access takes place, and whether a stale translation had a say in it.

    Pages that the cache has not are where the record has them. An access whose pages would not lie side by side is
    told, but runs where it was recorded: a record has one GPA.
    """
    kind = kind_of(m, vcpu)
    at = gpa
    stale = False
    apart = False
    done = 0
    while done < size:
        part = access_over_pages.page_part(gpa + done, gpa + size)
        frame = (gpa + done) >> 12
        page = (gva + done) >> 12
        agree(m, vcpu, kind, page, frame, index, uses)
        row = find(m, vcpu, kind, page)
        if row != tlb.MISSING and m.tlb[row, tlb.E_FRAME] != frame:
            stale = True
            note(m, row, vcpu, index, word, gva + done, gpa + done, uses, found, count)
            frame = m.tlb[row, tlb.E_FRAME]
        if done == 0:
            at = frame << 12 | gpa & 0xFFF
        apart = apart or frame != (at + done) >> 12
        done += part
    return gpa if apart else at, stale


@kernel
def facts_of(m, vcpu, word):
    """What a record tells of its page, as in ``tlb.E_FACTS``: a small one that is writable, dirty and not global."""
    told = record_checks.describe(word) >> acc.LINEAR_SHIFT & acc.LINEAR_BITS | acc.LINEAR_WRITABLE
    if read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_CPL) == 3:
        told |= acc.LINEAR_USER
    rights = tlb.GUEST_DIRTY | tlb.GUEST_UPPER_WRITABLE | tlb.GUEST_LEAF_WRITABLE
    return told | rights | 12 << tlb.GUEST_SIZE_AT


@kernel
def keep(m, vcpu, linear, gpa, index, word, trail, uses):
    """Remember the translation of a page after an access to it.

    With EPT an access that completed has left an entry for the GPA, which this is made from; one that violated has
    removed it, and what there was for the linear address goes as well.
    """
    kind = kind_of(m, vcpu)
    page = linear >> 12
    row = find(m, vcpu, kind, page)
    source = tlb.find(m, vcpu, tlb.PHYSICAL, gpa >> 12) if kind == tlb.COMBINED else tlb.MISSING
    if kind == tlb.COMBINED and source == tlb.MISSING:
        if row != tlb.MISSING:
            tlb.drop(m, row)
        return
    if row != tlb.MISSING:
        return
    row = tlb.room(m, vcpu, page)
    if kind == tlb.COMBINED:
        tlb.merge(m, row, source, vcpu, page, facts_of(m, vcpu, word))
    else:
        trail[ept.TRAIL_COUNTS, 0] = 0
        trail[ept.TRAIL_COUNTS, 1] = 0
        tlb.fill(m, row, vcpu, kind, page, gpa >> 12, facts_of(m, vcpu, word), trail)
    uses[row, USE_FIRST] = index
    uses[row, USE_LAST] = index


@kernel
def run_translated(m, vcpu, gva, gpa, word, index, options, trail, log, used, tally, uses, found, count):
    """Run an access by its linear address; returns as ``trace.replay.run_record`` does."""
    size = word & 0xFFFF
    at, stale = translate(m, vcpu, gva, gpa, size, index, word, uses, found, count)
    known = tally[reg.STALE_ACCESSES]
    status = plain.run_record(m, at, word, index, gva, options, trail, log, used, tally)
    if stale:
        count[COUNT_STALE] += 1
        tally[reg.STALE_ACCESSES] = known + 1
    if kind_of(m, vcpu) == tlb.LINEAR and is_mmio(
        m, at | space_of(m, vcpu), size, (word >> 16) & acc.ACCESS_MASK == acc.WRITE
    ):
        return status
    done = 0
    while done < size:
        keep(m, vcpu, gva + done, at + done, index, word, trail, uses)
        done += access_over_pages.page_part(at + done, at + size)
    return status


@kernel
def run_record(m, gpa, word, index, gva, has_gva, space, options, trail, log, used, tally, uses, found, count):
    """Run one record; the frames at hand suffice. Returns as ``trace.replay.run_record`` does."""
    bad = record_checks.refusal(m, gpa, word, options[plain.OPTION_KINDS])
    if bad != record_checks.DONE:
        return bad
    if space != NO_SPACE and not fits_space(m, space):
        return BAD_SPACE
    vcpu = m.vcpu_of_id[(word >> 32) & 0xFFFF]
    if space != NO_SPACE:
        write_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_CR3, space)
        if not ample(m):
            return plain.NEED_FRAMES
    if not has_gva or not goes_by_linear_address(word):
        return plain.run_record(m, gpa, word, index, gva, options, trail, log, used, tally)
    if (gva ^ gpa) & 0xFFF:
        return BAD_OFFSET
    return run_translated(m, vcpu, gva, gpa, word, index, options, trail, log, used, tally, uses, found, count)


@kernel
def replay(m, words, gvas, spaces, start, stop, base, options, trail, log, used, tally, uses, found, count):
    """Replay the accesses from ``start`` to ``stop``, between which there is no operation.

    As ``trace.replay.replay``; ``spaces`` is int64[n] or empty. FOUND_FULL asks the caller to take what was found.
    """
    status = record_checks.DONE
    i = start
    while i < stop:
        if not ample(m):
            status = plain.NEED_FRAMES
            break
        if used[0] + 2 * vcpu_run.MAX_EXITS + 2 > log.shape[0]:
            status = plain.LOG_FULL
            break
        if count[COUNT_USED] + MOST_PAGES > found.shape[0]:
            status = FOUND_FULL
            break
        has_gva = gvas.shape[0] != 0
        gva = gvas[i] if has_gva else plain.NO_GVA
        space = spaces[i] if spaces.shape[0] else NO_SPACE
        gpa, word = words[2 * i], words[2 * i + 1]
        status = run_record(
            m, gpa, word, base + i, gva, has_gva, space, options, trail, log, used, tally, uses, found, count
        )
        if status != record_checks.DONE:
            break
        i += 1
    tally[reg.RECORDS] += i - start
    return status, i
