"""What KVM does about a fault without building anything: the leaf is there, and gets back what KVM itself took
(kvm-spp 3.3; fast_page_fault in the kernel). The fault is done then, and the guest tries again.
"""

from engine.arch import ept as bits
from engine.cpu import ept
from engine.cpu.host_physical_memory import write_entry
from engine.jit import kernel
from engine.kvm import bitmaps, choice_bits, dirty_marking, mapping
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.access_tracking import with_rights
from engine.kvm.write_protection import LOCKLESS_WRITABLE, saved_bit


@kernel
def restored(m, entry, level, write):
    """The leaf with which KVM answers a fault that only its own doing caused; the same entry where it was not.

    Write permission, or bit 61 in its place, comes back to a page that slot and host let be written. A larger leaf
    gets no write permission back this way.
    """
    fresh = with_rights(m, entry)
    if not write or level > 1 or entry & LOCKLESS_WRITABLE != LOCKLESS_WRITABLE:
        return fresh
    if choice_bits.chooses(m, choice_bits.KVM_SAVED_BIT) and fresh & saved_bit(m):
        return fresh & ~saved_bit(m) | bits.SPP
    return fresh | bits.WRITE


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
    fresh = restored(m, entry, level, write)
    if fresh == entry:
        return res.INTERNAL_ERROR
    if write:
        dirty_marking.note_fault(m, gfn, slot, mask)
    write_entry(m, trail[last, 1], trail[last, 2], fresh)
    return res.RESTORED
