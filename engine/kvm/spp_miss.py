"""What KVM does about an SPP miss: which vectors it fills, in which tree (kvm-spp 4)."""

from engine.arch import sppt as sp
from engine.cpu.memory_slots import find_slot
from engine.jit import kernel
from engine.kvm import choice_bits, dirty_marking, sppt_roots, sppt_tables
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.choice_bits import KVM_FILL_REGION, KVM_MISS_NEEDS_SLOT


@kernel
def handle_miss(m, vcpu, gpa, tally):
    """SPP miss: fill one page (2019) or its whole region (later) from the bitmaps, in the tree of the vCPU.

    A page without a slot fails KVM_RUN with EFAULT in the first series; later ones leave it out and go on.
    """
    gfn = gpa >> 12
    slot = find_slot(m, gfn)
    has_slot = slot >= 0
    if not has_slot and choice_bits.chooses(m, KVM_MISS_NEEDS_SLOT):
        return res.RUN_FAILED
    if sppt_roots.trees(m) == 0:
        return res.INTERNAL_ERROR  # a client's SPPT, on a machine where KVM has none
    tree = sppt_roots.tree_of(m, vcpu)
    if choice_bits.chooses(m, KVM_FILL_REGION):
        fill_region(m, tree, gfn)
    if has_slot:
        sppt_tables.fill_vector(m, tree, gfn, dirty_marking.permitted(m, gfn, slot))
    tally[reg.SPPT_FILLS] += 1
    return res.FILLED


@kernel
def fill_region(m, tree, gfn):
    """Fill the SPPL1 table of a 2-MByte region: every protected page that has a slot.

    The region becomes valid even when nothing in it is protected, or the guest would miss for ever.
    """
    sppt_tables.vector_table(m, tree, gfn << 12)
    first = gfn & ~(sp.REGION_PAGES - 1)
    for page in range(first, first + sp.REGION_PAGES):
        slot = find_slot(m, page)
        mask = dirty_marking.permitted(m, page, slot) if slot >= 0 else sp.FULL_ACCESS
        if mask != sp.FULL_ACCESS:
            sppt_tables.fill_vector(m, tree, page, mask)
