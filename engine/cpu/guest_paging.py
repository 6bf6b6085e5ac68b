"""The guest's own paging (SDM vol. 3A, 4.1 to 4.7): from a linear address to a GPA, or to a #PF.

Every guest entry is read through EPT, as an access of its own (29.3.3.2), and so is every update of its accessed and
dirty flags. The order is that of 29.3.3.3: an event on a guest entry's GPA, then what the entry says, level by level;
then the privileges of the whole translation; then the updates, top level first. Sub-page permissions never apply.

All modes are walked alike: paging off, 32-bit, PAE (its first step is a register), four and five levels. Protection
keys are not modelled.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exceptions, exits
from engine.arch import paging as guest
from engine.cpu import access_check, access_over_pages, cached_check, ept, exit_qualification, guest_memory, tlb
from engine.cpu.frames import CAP_RESERVED_ADDRESS, FIRST_VCPU_FRAME
from engine.cpu.memory_slots import space_of
from engine.jit import kernel

# Paging modes: the number of levels whose entries are read from memory.
OFF = 0
BITS_32 = 2
PAE = 3  # two of them in memory, the third in the PDPTE registers
FOUR_LEVELS = 4
FIVE_LEVELS = 5

# What a walk may do: leave flags and log entries behind, or look only; go through the translation cache, or not. BARE
# is no access of a processor: entries are read as memory has them, whatever EPT says, and no privilege is asked for.
LOOK = 0
EXECUTE = 1
FRESH = 2
BARE = 4

# In place of an address space, a value of CR3: that of the vCPU, by its registers.
OWN_SPACE = np.int64(-1)

# Steps of a walk: one row a level from 1, [level, address of the entry, size of the entry, entry]; row 0 holds the
# top and the bottom level that were read.
STEP_ROWS = 6

CARRIED = acc.NMI_UNBLOCKING | acc.SPP_EXEMPT | acc.DELIVERY | acc.ASYNCHRONOUS
READ_ENTRY = acc.READ | acc.PAGING_READ << acc.KIND_SHIFT | acc.DEFAULT_LINEAR
UPDATE_ENTRY = acc.WRITE | acc.PAGING_UPDATE << acc.KIND_SHIFT | acc.DEFAULT_LINEAR
UNPAGED = acc.LINEAR_VALID | acc.LINEAR_USER | acc.LINEAR_WRITABLE
LOW_32 = 0xFFFF_FFFF

canonical = kernel(guest.canonical)


@kernel
def mode_of(m, vcpu):
    """The paging mode of a vCPU."""
    row = m.row_of[FIRST_VCPU_FRAME + vcpu]
    cr4 = m.rows[row, ctl.V_CR4]
    if not m.rows[row, ctl.V_CR0] & guest.CR0_PG:
        return OFF
    if not cr4 & guest.CR4_PAE:
        return BITS_32
    if not m.rows[row, ctl.V_EFER] & guest.EFER_LMA:
        return PAE
    return FIVE_LEVELS if cr4 & guest.CR4_LA57 else FOUR_LEVELS


@kernel
def writes(how):
    """Whether the guest's paging takes an access for a write."""
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    return how & acc.ACCESS_MASK == acc.WRITE or kind == acc.READ_MODIFY_WRITE


@kernel
def error_code(m, vcpu, how, error):
    """A page fault's error code: ``error`` and what the access was."""
    row = m.row_of[FIRST_VCPU_FRAME + vcpu]
    cr4 = m.rows[row, ctl.V_CR4]
    if writes(how):
        error |= exceptions.PF_WRITE
    if m.rows[row, ctl.V_CPL] == 3:
        error |= exceptions.PF_USER
    no_execute = cr4 & guest.CR4_PAE and m.rows[row, ctl.V_EFER] & guest.EFER_NXE
    if how & acc.ACCESS_MASK == acc.EXECUTE and (no_execute or cr4 & guest.CR4_SMEP):
        error |= exceptions.PF_FETCH
    if (how & acc.KIND_MASK) >> acc.KIND_SHIFT == acc.SHADOW_STACK:
        error |= exceptions.PF_SHADOW_STACK
    return error


@kernel
def large(m, vcpu, entry, level, paging):
    """Whether a present entry maps a page larger than 4 KBytes."""
    if level == 1 or not entry & guest.LARGE:
        return False
    if paging == BITS_32:
        return m.rows[m.row_of[FIRST_VCPU_FRAME + vcpu], ctl.V_CR4] & guest.CR4_PSE != 0
    return level <= 3


@kernel
def reserved_at(entry, level):
    """Bits that must be 0 in an 8-byte entry for its level and the size of its page, whatever the registers say."""
    if level >= 4:
        return guest.LARGE
    if level > 1 and entry & guest.LARGE:
        return guest.RESERVED_1G if level == 3 else guest.RESERVED_2M
    return 0


@kernel
def reserved(m, vcpu, entry, level, paging):
    """Whether a present entry has a reserved bit set."""
    width = m.caps[CAP_RESERVED_ADDRESS]
    if paging == BITS_32:
        high = (entry >> guest.LARGE_32_HIGH_SHIFT & 0xFF) << 32
        maps_large = large(m, vcpu, entry, level, paging)
        return maps_large and (entry & guest.LARGE_32_RESERVED != 0 or high & width != 0)
    mask = width | reserved_at(entry, level)
    if not m.rows[m.row_of[FIRST_VCPU_FRAME + vcpu], ctl.V_EFER] & guest.EFER_NXE:
        mask |= guest.EXECUTE_DISABLE
    if paging == PAE:
        mask |= guest.RESERVED_ABOVE_52
    return entry & mask != 0


@kernel
def frame_of(entry, level, paging, linear):
    """GPA that a leaf gives a linear address."""
    if paging == BITS_32:
        if level == 1:
            return entry & guest.ADDRESS_32 | linear & 0xFFF
        high = (entry >> guest.LARGE_32_HIGH_SHIFT & 0xFF) << 32
        return high | entry & guest.LARGE_32_LOW | linear & 0x3F_FFFF
    offset = (1 << bits.LEVEL_SHIFT[level]) - 1
    return entry & guest.ADDRESS & ~offset | linear & offset


@kernel
def refused(m, vcpu, how, facts):
    """Whether the privileges of a whole translation refuse an access; ``facts`` as the translation cache keeps them."""
    row = m.row_of[FIRST_VCPU_FRAME + vcpu]
    cr4 = m.rows[row, ctl.V_CR4]
    user_mode = m.rows[row, ctl.V_CPL] == 3
    user_page = facts & acc.LINEAR_USER != 0
    if not m.rows[row, ctl.V_CR0] & guest.CR0_PG:
        return False
    if user_mode and not user_page:
        return True
    if (how & acc.KIND_MASK) >> acc.KIND_SHIFT == acc.SHADOW_STACK:
        stack_page = facts & (tlb.GUEST_UPPER_WRITABLE | tlb.GUEST_DIRTY) == tlb.GUEST_UPPER_WRITABLE | tlb.GUEST_DIRTY
        return user_mode != user_page or not stack_page or facts & tlb.GUEST_LEAF_WRITABLE != 0
    if how & acc.ACCESS_MASK == acc.EXECUTE:
        forbidden = not user_mode and user_page and cr4 & guest.CR4_SMEP != 0
        return forbidden or facts & acc.LINEAR_EXECUTE_DISABLE != 0
    if not user_mode and user_page and cr4 & guest.CR4_SMAP and not m.rows[row, ctl.V_RFLAGS] & guest.RFLAGS_AC:
        return True
    if not writes(how) or facts & acc.LINEAR_WRITABLE:
        return False
    return user_mode or m.rows[row, ctl.V_CR0] & guest.CR0_WP != 0


@kernel
def touch(m, vcpu, slot, size, how, doing, trail):
    """One access to a guest entry; returns (reason, qualification, source). Executed, it leaves EPT flags behind."""
    if doing & BARE:
        return exits.NONE, 0, cached_check.WALKED
    if doing & FRESH:
        reason, q, _ = access_check.check(m, vcpu, slot, size, how, trail)
        source = cached_check.WALKED
    else:
        reason, q, _, source = cached_check.check(m, vcpu, slot, size, how, trail)
    if reason != exits.NONE or not doing & EXECUTE:
        return reason, q, source
    mode = ept.mode_of(m, vcpu)
    if not access_over_pages.log_fits(m, vcpu, mode, slot, size, how, source, trail):
        return exits.PML_FULL, exit_qualification.nmi_unblocking(how), source
    cached_check.finish(m, vcpu, mode, slot, how, source, trail)
    return exits.NONE, 0, source


@kernel
def read_entry(m, slot, size):
    """A guest entry of 8 or 4 bytes; ``slot`` is a place (see ``cpu.memory_slots``)."""
    word = guest_memory.read_word(m, slot & ~7)
    if size == 8:
        return word
    return word >> 32 & LOW_32 if slot & 4 else word & LOW_32


@kernel
def write_entry(m, slot, size, entry):
    """Store a guest entry of 8 or 4 bytes."""
    if size == 4:
        word = guest_memory.read_word(m, slot & ~7)
        entry = word & LOW_32 | entry << 32 if slot & 4 else word & ~LOW_32 | entry
    guest_memory.write_word(m, slot & ~7, entry)


@kernel
def update(m, vcpu, how, doing, trail, steps):
    """Set the accessed flags of a translation, and the dirty flag of its leaf for a write.

    Returns (reason, qualification, GPA, source); with LOOK it says what would happen.
    """
    top, bottom = steps[0, 0], steps[0, 1]
    found = cached_check.WALKED
    for level in range(top, bottom - 1, -1):
        slot = steps[level, 1]
        size = steps[level, 2]
        entry = steps[level, 3]
        flagged = entry | guest.ACCESSED
        if level == bottom and writes(how):
            flagged |= guest.DIRTY
        if flagged == entry:
            continue
        reason, q, source = touch(m, vcpu, slot, size, UPDATE_ENTRY | how & CARRIED, doing, trail)
        found = max(found, source)
        if reason != exits.NONE:
            return reason, q, slot, found
        if doing & EXECUTE:
            write_entry(m, slot | space_of(m, vcpu), size, flagged)
            steps[level, 3] = flagged
    return exits.NONE, 0, 0, found


@kernel
def pdpte(m, vcpu, space, linear, steps):
    """The page-directory-pointer entry of PAE paging: a register, or what a load of CR3 would read; 0 if it cannot be.

    It is noted as a step of level 3, with no address where it is a register.
    """
    slot = OWN_SPACE
    entry = m.rows[m.row_of[FIRST_VCPU_FRAME + vcpu], ctl.V_PDPTE0 + (linear >> 30 & 3)]
    if space != OWN_SPACE:
        slot = (space & guest.CR3_PAE_TABLE) + (linear >> 30 & 3) * 8
        entry = read_entry(m, slot | space_of(m, vcpu), 8)
    steps[PAE, 0] = PAE
    steps[PAE, 1] = slot
    steps[PAE, 2] = 8
    steps[PAE, 3] = entry
    steps[0, 1] = PAE
    high = guest.EXECUTE_DISABLE | guest.RESERVED_ABOVE_52 | m.caps[CAP_RESERVED_ADDRESS]
    if not entry & guest.PRESENT or (space != OWN_SPACE and entry & (guest.RESERVED_PDPTE | high)):
        return 0
    return entry


@kernel
def walk(m, vcpu, space, linear, how, doing, trail, steps):
    """Translate a linear address for an access to one page, by the vCPU's paging mode and an address space.

    Returns (reason, value, gpa, facts, source): reason 0 with the GPA and what the guest's paging says of the page, as
    the translation cache keeps it; or a VM exit with its qualification and the GPA of the guest entry; or minus the
    vector of an exception with its error code. ``source`` is STALE if a cached translation misled the walk.
    ``steps[0, 1]`` is the level of the last entry that was read.
    """
    row = m.row_of[FIRST_VCPU_FRAME + vcpu]
    paging = mode_of(m, vcpu)
    mode = ept.mode_of(m, vcpu)
    smm = space_of(m, vcpu)
    if paging == OFF:
        return exits.NONE, 0, linear & LOW_32, UNPAGED | 12 << tlb.GUEST_SIZE_AT, cached_check.WALKED
    size = 4 if paging == BITS_32 else 8
    index_bits = 10 if paging == BITS_32 else 9
    cr3 = m.rows[row, ctl.V_CR3]
    if space != OWN_SPACE:
        cr3 = space if paging >= FOUR_LEVELS else space & LOW_32
    table = cr3 & guest.ADDRESS
    level = paging
    if paging == PAE:
        entry = pdpte(m, vcpu, space, linear, steps)
        if not entry:
            return -exceptions.PAGE_FAULT, error_code(m, vcpu, how, 0), 0, 0, cached_check.WALKED
        table = entry & guest.ADDRESS
        level = 2
    facts = UNPAGED | tlb.GUEST_UPPER_WRITABLE
    found = cached_check.WALKED
    steps[0, 0] = level
    while True:
        index = linear >> (12 + index_bits * (level - 1)) & ((1 << index_bits) - 1)
        slot = table + index * size
        reason, q, source = touch(m, vcpu, slot, size, READ_ENTRY | how & CARRIED, doing, trail)
        found = max(found, source)
        if reason != exits.NONE:
            return reason, q, slot, 0, found
        verified = mode & ept.MODE_PAGING_VERIFICATION and not doing & BARE
        if verified and not trail[trail[ept.TRAIL_COUNTS, 0] - 1, 3] & bits.PAGING_WRITE:
            facts |= tlb.GUEST_UNVERIFIED
        entry = read_entry(m, slot | smm, size)
        steps[0, 1] = level
        steps[level, 0] = level
        steps[level, 1] = slot
        steps[level, 2] = size
        steps[level, 3] = entry
        if not entry & guest.PRESENT:
            return -exceptions.PAGE_FAULT, error_code(m, vcpu, how, 0), 0, 0, found
        if reserved(m, vcpu, entry, level, paging):
            error = exceptions.PF_PRESENT | exceptions.PF_RESERVED
            return -exceptions.PAGE_FAULT, error_code(m, vcpu, how, error), 0, 0, found
        if not entry & guest.USER:
            facts &= ~acc.LINEAR_USER
        if not entry & guest.WRITABLE:
            facts &= ~acc.LINEAR_WRITABLE
        if paging != BITS_32 and entry & guest.EXECUTE_DISABLE:
            facts |= acc.LINEAR_EXECUTE_DISABLE
        if level == 1 or large(m, vcpu, entry, level, paging):
            break
        if not entry & guest.WRITABLE:
            facts &= ~tlb.GUEST_UPPER_WRITABLE
        table = entry & (guest.ADDRESS_32 if paging == BITS_32 else guest.ADDRESS)
        level -= 1
    facts |= (12 + index_bits * (level - 1)) << tlb.GUEST_SIZE_AT
    if entry & guest.WRITABLE:
        facts |= tlb.GUEST_LEAF_WRITABLE
    if entry & guest.DIRTY:
        facts |= tlb.GUEST_DIRTY
    if entry & guest.GLOBAL and m.rows[row, ctl.V_CR4] & guest.CR4_PGE:
        facts |= tlb.GUEST_GLOBAL
    if doing & BARE:
        return exits.NONE, 0, frame_of(entry, level, paging, linear), facts, found
    if refused(m, vcpu, how, facts):
        return -exceptions.PAGE_FAULT, error_code(m, vcpu, how, exceptions.PF_PRESENT), 0, 0, found
    reason, q, slot, source = update(m, vcpu, how, doing, trail, steps)
    found = max(found, source)
    if reason != exits.NONE:
        return reason, q, slot, 0, found
    if writes(how):
        facts |= tlb.GUEST_DIRTY
    return exits.NONE, 0, frame_of(entry, level, paging, linear), facts, found
