"""By how large a leaf KVM maps a page: what the host page, its slot and the processor allow, and protection leaves."""

from engine.arch import ept as bits
from engine.cpu.frames import CAP_EPT_VPID
from engine.cpu.memory_slots import SLOT_GFN, SLOT_PAGES, SMM_PAGE
from engine.jit import kernel
from engine.kvm import choice_bits, dirty_marking, kvmi_rights, page_tracking, regions
from engine.kvm.choice_bits import KVM_FORCE_SMALL
from engine.kvm.slots import SLOT_LEVEL


@kernel
def level_of(m, gfn, slot):
    """Level of the largest leaf that the host page, its slot and the processor allow for a page.

    Pages of address space 1 are mapped one by one: what they are the same memory as need not lie alike.
    """
    if gfn >= SMM_PAGE:
        return 1
    level = m.slots[slot, SLOT_LEVEL]
    if level == 3 and (not fits(m, gfn, slot, 3) or regions.word(m, gfn, 3) & regions.SPLIT):
        level = 2
    small = regions.word(m, gfn, 2)
    if small & regions.SPLIT:
        return 1
    if small & regions.COLLAPSED:
        level = max(level, 2)
    if level == 3 and not m.caps[CAP_EPT_VPID] & bits.CAP_1G:
        level = 2
    if level == 2 and not (fits(m, gfn, slot, 2) and m.caps[CAP_EPT_VPID] & bits.CAP_2M):
        level = 1
    return level


@kernel
def fits(m, gfn, slot, level):
    """Whether the whole region of a page is in its slot."""
    pages = 1 << 9 * (level - 1)
    first = gfn & ~(pages - 1)
    begin = m.slots[slot, SLOT_GFN]
    return begin <= first and first + pages <= begin + m.slots[slot, SLOT_PAGES]


@kernel
def level_for(m, gfn, slot):
    """Level of the leaf KVM maps a page by; later series keep leaves small where a page in them is protected.

    Leaves are small in any series where writes are tracked, where page access is restricted, and where a page is
    protected whole without sub-page protection.
    """
    level = level_of(m, gfn, slot)
    if level > 1 and (dirty_marking.watched(m, slot) or kvmi_rights.restricted(m, gfn, 2)):
        return 1
    if level == 3 and kvmi_rights.restricted(m, gfn, 3):
        level = 2
    if level == 1 or not (choice_bits.chooses(m, KVM_FORCE_SMALL) or page_tracking.active(m)):
        return level
    if regions.protected(m, gfn, 2):
        return 1
    return 2 if level == 3 and regions.protected(m, gfn, 3) else level
