"""What KVM does about an EPT violation: map and arm, give back what it took itself, or report (kvm-spp 3.3, 3.4).

Lazy set-up lives here: a page is mapped when it is first touched, by any kind of access, and a page whose map is not
full is armed in the same step: write permission off, bit 61 on.
"""

from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import ept
from engine.cpu.host_physical_memory import find_slot, write_entry
from engine.jit import kernel
from engine.kvm import bitmaps, dirty_marking, kvmi_rights, mapping, write_protection
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.slots import SLOT_FLAGS, SLOT_READ_ONLY
from engine.kvm.write_protection import LOCKLESS_WRITABLE


@kernel
def map_and_arm(m, gfn, slot, write, tally):
    """First touch of a page, or a leaf that lost a right it should have."""
    if write:
        dirty_marking.note_fault(m, gfn, slot, bitmaps.effective(m, gfn))
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
    mask = bitmaps.effective(m, gfn)
    lockless = entry & LOCKLESS_WRITABLE == LOCKLESS_WRITABLE
    if write and level == 1 and entry & bits.SPP and lockless:
        if not dirty_marking.note_refused(m, gfn, slot, mask, denied):
            return res.VIOLATION
        mapping.watch_page(m, gfn, slot, trail)
        tally[reg.DIRTY_FAULTS] += 1
        return res.DIRTY_LOGGED
    fresh = write_protection.restored(m, entry, level, write)
    if fresh == entry:
        return res.INTERNAL_ERROR
    if write:
        dirty_marking.note_fault(m, gfn, slot, mask)
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
    if kvmi_rights.refuses(m, gfn, qualification):
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
