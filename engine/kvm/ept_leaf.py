"""What the leaf of a page in KVM's EPT says: its rights, and whether it is armed with bit 61 (kvm-spp 3.1)."""

import numpy as np

from engine.arch import ept as bits
from engine.arch import sppt as sp
from engine.jit import kernel
from engine.kvm import dirty_marking, host_frames, kvmi_rights, page_tracking, write_protection
from engine.kvm.slots import SLOT_FLAGS, SLOT_READ_ONLY
from engine.kvm.write_protection import HOST_WRITEABLE, LOCKLESS_WRITABLE

NOTHING = np.int64(0)
PAGE_BASE = bits.READ | bits.EXECUTE | bits.ACCESSED | bits.IGNORE_PAT | bits.WRITE_BACK << bits.MEMORY_TYPE_SHIFT


@kernel
def leaf_for(m, gfn, slot, mask, level):
    """The leaf entry KVM makes for a page with an effective map; a writable one is born dirty.

    Bit 61 is only for a page that its slot and the host let be written: sub-page permissions override neither. A page
    is armed, too, for the log of its sub-pages alone; one that is watched whole is write-protected. Without sub-page
    protection a page is protected whole, and not even KVM itself may give write permission back.
    """
    gone = kvmi_rights.lacking(m, gfn) if level == 1 else NOTHING
    entry = PAGE_BASE & ~gone
    if level == 1:
        entry |= host_frames.address_of_page(m, gfn)
    else:
        entry |= gfn << 12 & -(1 << bits.LEVEL_SHIFT[level]) | bits.PAGE
    if m.slots[slot, SLOT_FLAGS] & SLOT_READ_ONLY or (level == 1 and host_frames.read_only(m, gfn)):
        return entry
    if mask != sp.FULL_ACCESS and page_tracking.active(m):
        return entry | HOST_WRITEABLE
    entry |= LOCKLESS_WRITABLE
    if gone & bits.READ:
        return entry
    if mask != sp.FULL_ACCESS and level == 1:
        return entry | (write_protection.saved_bit(m) if dirty_marking.saved(m, gfn, slot, mask) else bits.SPP)
    if dirty_marking.unseen(m, gfn, slot, mask):
        return entry | bits.SPP if dirty_marking.mode_for(m, gfn) & dirty_marking.TRACK_SUBPAGES else entry
    return entry | bits.WRITE | (NOTHING if dirty_marking.flag_waits(m, gfn, slot) else bits.DIRTY)
