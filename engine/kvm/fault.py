"""Exit handling: what KVM does about an EPT violation or an SPP-related event (kvm-spp 3.3, 3.4, 4).

Lazy set-up lives here: a page is mapped when it is first touched, by any kind of access, and a page whose map is not
full is armed in the same step: write permission off, bit 61 on.
"""

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import ept
from engine.cpu.frames import CAP_RESERVE, FIRST_VCPU_FRAME, read_word, write_word
from engine.cpu.physical_memory import find_slot, write_entry
from engine.jit import kernel
from engine.kvm import choices, dirty_log, layers, mapping, page_rights, sppt_tables, tracking, write_protection
from engine.kvm import registers as reg
from engine.kvm import resolutions as res
from engine.kvm.choices import KVM_FILL_REGION, KVM_MISS_NEEDS_SLOT
from engine.kvm.slots import SLOT_FLAGS, SLOT_READ_ONLY
from engine.kvm.write_protection import LOCKLESS_WRITABLE


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
def block_nmis(m, vcpu, how, qualification):
    """An IRET that had unblocked NMIs is to run again: NMIs are blocked until then, as before it.

    Not where the exit came while an event was delivered, when the bit means nothing (kvm-spp 4).
    """
    if qualification & exits.Q_NMI_UNBLOCKING and not how & acc.DELIVERY:
        frame = FIRST_VCPU_FRAME + vcpu
        write_word(m, frame, ctl.V_INTERRUPTIBILITY, read_word(m, frame, ctl.V_INTERRUPTIBILITY) | ctl.BLOCKING_BY_NMI)


@kernel
def map_and_arm(m, gfn, slot, write, tally):
    """First touch of a page, or a leaf that lost a right it should have."""
    if write:
        tracking.note_fault(m, gfn, slot, layers.effective(m, gfn))
    made = mapping.map_page(m, gfn, slot, write)
    if made == mapping.MAP_FAILED:
        return res.INTERNAL_ERROR
    if made & mapping.MAP_SPLIT:
        tally[reg.SPLIT] += 1
    if made & mapping.MAP_ARMED:
        tally[reg.ARMED] += 1
        return res.ARMED
    tally[reg.MAPPED] += 1
    return res.MAPPED


@kernel
def fast_fault(m, gfn, slot, write, denied, trail, tally):
    """What KVM does about a leaf without building anything: VIOLATION, RESTORED, or INTERNAL_ERROR for "no answer".

    Bit 61 of the leaf alone tells a sub-page violation from a plain one, as in the patch series: the bitmap is not
    looked at again. In the first series that is so for a page without rights, too, because it was aged.
    """
    last = trail[ept.TRAIL_COUNTS, 0] - 1
    level = trail[last, 0]
    entry = trail[last, 3]
    mask = layers.effective(m, gfn)
    lockless = entry & LOCKLESS_WRITABLE == LOCKLESS_WRITABLE
    if write and level == 1 and entry & bits.SPP and lockless:
        if not tracking.note_refused(m, gfn, slot, mask, denied):
            return res.VIOLATION
        mapping.watch_page(m, gfn, slot, trail)
        tally[reg.DIRTY_FAULTS] += 1
        return res.DIRTY_LOGGED
    fresh = write_protection.restored(m, entry, level, write)
    if fresh == entry:
        return res.INTERNAL_ERROR
    if write:
        tracking.note_fault(m, gfn, slot, mask)
    write_entry(m, trail[last, 1], trail[last, 2], fresh)
    return res.RESTORED


@kernel
def handle_violation(m, gpa, qualification, denied, trail, tally):
    """EPT violation: map, arm, give back what KVM itself took, or report."""
    gfn = gpa >> 12
    slot = find_slot(m, gfn)
    if slot < 0:
        return res.MMIO
    read_only = m.slots[slot, SLOT_FLAGS] & SLOT_READ_ONLY != 0
    write = qualification & exits.Q_WRITE != 0
    if write and read_only:
        return res.MMIO
    if page_rights.refuses(m, gfn, qualification):
        return res.VIOLATION
    if trail[ept.TRAIL_COUNTS, 0] == 0:
        return res.INTERNAL_ERROR  # wider than the walk translates: no leaf can be made for it
    entry = trail[trail[ept.TRAIL_COUNTS, 0] - 1, 3]
    present = qualification >> exits.Q_RIGHTS_SHIFT & bits.RIGHTS != 0
    if write_protection.tracked(m, entry) or (present and write):
        answer = fast_fault(m, gfn, slot, write, denied, trail, tally)
        if answer != res.INTERNAL_ERROR:
            tally[reg.RESTORED] += answer == res.RESTORED
            return answer
    return map_and_arm(m, gfn, slot, write, tally)


@kernel
def handle_miss(m, vcpu, gpa, tally):
    """SPP miss: fill one page (2019) or its whole region (later) from the bitmaps, in the tree of the vCPU.

    A page without a slot fails KVM_RUN with EFAULT in the first series; later ones leave it out and go on.
    """
    gfn = gpa >> 12
    slot = find_slot(m, gfn)
    has_slot = slot >= 0
    if not has_slot and choices.chooses(m, KVM_MISS_NEEDS_SLOT):
        return res.RUN_FAILED
    if sppt_tables.trees(m) == 0:
        return res.INTERNAL_ERROR  # a client's SPPT, on a machine where KVM has none
    tree = sppt_tables.tree_of(m, vcpu)
    if choices.chooses(m, KVM_FILL_REGION):
        sppt_tables.fill_region(m, tree, gfn)
    if has_slot:
        sppt_tables.fill_vector(m, tree, gfn, tracking.permitted(m, gfn, slot))
    tally[reg.SPPT_FILLS] += 1
    return res.FILLED


@kernel
def empty_log(m, vcpu):
    """Full page-modification log: its pages are taken note of, and it begins anew (vmx_flush_pml_buffer)."""
    dirty_log.empty_buffer(m, vcpu, m.caps[CAP_RESERVE] * 3 // 4)
    return res.LOG_EMPTIED


@kernel
def handle_exit(m, vcpu, gpa, reason, qualification, denied, trail, tally):
    """Handle one VM exit; returns a resolution. ``denied`` is what the SPPT refused of the sub-pages touched."""
    if reason == exits.EPT_VIOLATION:
        return handle_violation(m, gpa, qualification, denied, trail, tally)
    if reason == exits.SPP_EVENT and qualification & exits.Q_SPP_MISS:
        return handle_miss(m, vcpu, gpa, tally)
    if reason == exits.PML_FULL:
        return empty_log(m, vcpu)
    return res.INTERNAL_ERROR
