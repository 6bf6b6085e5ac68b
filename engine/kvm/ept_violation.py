"""What KVM does about an EPT violation: map and arm, or report; ``fast_page_fault`` comes first (kvm-spp 3.3, 3.4).

Before both comes page tracking, for a leaf that is there (page_fault_handle_page_track in the kernel).

Lazy set-up lives here: a page is mapped when it is first touched, by any kind of access, and a page whose map is not
full is armed in the same step: write permission off, bit 61 on.
"""

from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import ept
from engine.cpu.memory_slots import find_slot
from engine.jit import kernel
from engine.kvm import access_tracking, bitmaps, dirty_marking, kvmi_rights, mapping, page_tracking
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.fast_page_fault import fast_fault
from engine.kvm.slots import SLOT_FLAGS, SLOT_READ_ONLY


@kernel
def map_and_arm(m, gfn, slot, write, trail, tally):
    """First touch of a page, or a leaf that lost a right it should have."""
    if write and dirty_marking.mode(m):
        dirty_marking.note_fault(m, gfn, slot, bitmaps.effective(m, gfn))
    made = mapping.map_page(m, gfn, slot, write, trail)
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
def handle_violation(m, gpa, qualification, denied, trail, tally):
    """EPT violation at a place: map, arm, give back what KVM itself took, or report."""
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
    if present and write and page_tracking.tracks(m, gfn):
        return res.VIOLATION
    if access_tracking.tracked(m, entry) or (present and write):
        answer = fast_fault(m, gfn, slot, write, denied, trail, tally)
        if answer != res.INTERNAL_ERROR:
            tally[reg.RESTORED] += answer == res.RESTORED
            return answer
    return map_and_arm(m, gfn, slot, write, trail, tally)
