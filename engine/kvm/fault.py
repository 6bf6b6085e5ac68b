"""Exit handling: what KVM does about an EPT violation or an SPP-related event (kvm-spp 3.3, 3.4, 4).

Lazy set-up lives here: a page is mapped when it is first touched, by any kind of access, and a page whose map is not
full is armed in the same step: write permission off, bit 61 on.
"""

import numpy as np

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exits
from engine.arch.sppt import FULL_ACCESS, REGION_PAGES
from engine.cpu import ept
from engine.cpu.frames import CAP_REGION_FILL, FIRST_VCPU_FRAME, write_entry, write_word
from engine.cpu.page_log import LOG_ENTRIES
from engine.jit import kernel
from engine.kvm import layers, mapping
from engine.kvm import registers as reg
from engine.kvm import resolutions as res
from engine.kvm.slots import SLOT_FLAGS, SLOT_READ_ONLY, find_slot

LAST_LOG_ENTRY = np.int64(LOG_ENTRIES - 1)


@kernel
def count_exit(tally, reason, qualification):
    """Count a VM exit by kind."""
    if reason == exits.EPT_VIOLATION:
        tally[reg.EPT_VIOLATION] += 1
    elif reason == exits.EPT_MISCONFIGURATION:
        tally[reg.EPT_MISCONFIGURATION] += 1
    elif reason == exits.PML_FULL:
        tally[reg.PML_FULL] += 1
    elif qualification & exits.Q_SPP_MISS:
        tally[reg.SPP_MISS] += 1
    else:
        tally[reg.SPP_MISCONFIGURATION] += 1


@kernel
def map_and_arm(m, gfn, slot, tally):
    """First touch of a page, or a leaf that lost a right it should have."""
    made = mapping.map_page(m, gfn, slot)
    if made == 0:
        return res.INTERNAL_ERROR
    if made == 2:
        tally[reg.ARMED] += 1
        return res.ARMED
    tally[reg.MAPPED] += 1
    return res.MAPPED


@kernel
def handle_violation(m, gpa, qualification, trail, tally):
    """EPT violation: map, arm, give write permission back, or report.

    Bit 61 of the leaf alone tells a sub-page violation from a plain one, as in the patch series: the bitmap is not
    looked at again.
    """
    gfn = gpa >> 12
    slot = find_slot(m, gfn)
    if slot < 0:
        return res.MMIO
    read_only = m.slots[slot, SLOT_FLAGS] & SLOT_READ_ONLY != 0
    write = qualification & exits.Q_WRITE != 0
    if write and read_only:
        return res.MMIO
    if trail[ept.TRAIL_COUNTS, 0] == 0:
        return res.INTERNAL_ERROR  # wider than the walk translates: no leaf can be made for it
    entry = trail[trail[ept.TRAIL_COUNTS, 0] - 1, 3]
    mapped = qualification >> exits.Q_RIGHTS_SHIFT & bits.RIGHTS != 0
    if mapped and write and entry & bits.SPP:
        return res.VIOLATION
    if mapped and write and entry & mapping.LOCKLESS_WRITABLE == mapping.LOCKLESS_WRITABLE:
        last = trail[ept.TRAIL_COUNTS, 0] - 1
        write_entry(m, trail[last, 1], trail[last, 2], entry | bits.WRITE | bits.DIRTY)
        tally[reg.RESTORED] += 1
        return res.RESTORED
    return map_and_arm(m, gfn, slot, tally)


@kernel
def fill_region(m, gfn):
    """Fill the SPPL1 table of a 2-MByte region: every protected page that has a slot.

    The region becomes valid even when nothing in it is protected, or the guest would miss for ever.
    """
    mapping.vector_table(m, gfn << 12)
    first = gfn & ~(REGION_PAGES - 1)
    for page in range(first, first + REGION_PAGES):
        mask = layers.effective(m, page)
        if mask != FULL_ACCESS and find_slot(m, page) >= 0:
            mapping.fill_vector(m, page, mask)


@kernel
def handle_miss(m, gpa, tally):
    """SPP miss: fill one page (2019) or its whole region (later) from the bitmaps."""
    gfn = gpa >> 12
    if find_slot(m, gfn) < 0:
        return res.INTERNAL_ERROR
    if m.caps[CAP_REGION_FILL]:
        fill_region(m, gfn)
    mapping.fill_vector(m, gfn, layers.effective(m, gfn))
    tally[reg.SPPT_FILLS] += 1
    return res.FILLED


@kernel
def empty_log(m, vcpu):
    """Full page-modification log: its pages are taken note of, and it begins anew (vmx_flush_pml_buffer)."""
    write_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_PML_INDEX, LAST_LOG_ENTRY)
    return res.LOG_EMPTIED


@kernel
def handle_exit(m, vcpu, gpa, reason, qualification, trail, tally):
    """Handle one VM exit; returns a resolution."""
    if reason == exits.EPT_VIOLATION:
        return handle_violation(m, gpa, qualification, trail, tally)
    if reason == exits.SPP_EVENT and qualification & exits.Q_SPP_MISS:
        return handle_miss(m, gpa, tally)
    if reason == exits.PML_FULL:
        return empty_log(m, vcpu)
    return res.INTERNAL_ERROR
