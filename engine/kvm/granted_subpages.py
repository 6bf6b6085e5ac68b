"""Granted sub-pages: those that an answer to a violation opens, for as long as their protection lives (kvm-spp 2.3)."""

from engine.arch import ept as bits
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import access_over_pages, sppt
from engine.cpu.memory_slots import find_slot
from engine.jit import kernel
from engine.kvm import bitmaps, kvmi_rights, page_tracking
from engine.kvm.spp_set import refresh


@kernel
def grant(m, gfn, mask, trail):
    """Open sub-pages: lift a protection from them, and set them where SET denied them."""
    before = bitmaps.of_page(m, gfn)
    denied, covered, lifted = before
    bitmaps.store(m, gfn, before, denied & ~mask, covered, lifted | (mask & covered))
    refresh(m, gfn, trail)


@kernel
def grant_touched(m, gpa, size, trail):
    """Open every refused sub-page that an access touches; returns whether there was one.

    Without sub-page protection a page is protected whole, and opened whole.
    """
    opened = False
    done = 0
    while done < size:
        at = access_over_pages.place(m, gpa, done)
        if kvmi_rights.lacking(m, at >> 12) & bits.READ:
            return False  # no sub-page of it is eligible
        done += access_over_pages.page_part(at, at + size - done)
    done = 0
    while done < size:
        at = access_over_pages.place(m, gpa, done)
        part = access_over_pages.page_part(at, at + size - done)
        asked = FULL_ACCESS if page_tracking.active(m) else sppt.touched(at, part)
        refused = asked & ~bitmaps.effective(m, at >> 12)
        if refused and find_slot(m, at >> 12) >= 0:
            grant(m, at >> 12, refused, trail)
            opened = True
        done += part
    return opened
