"""What KVM does about an EPT misconfiguration: user space emulates the access, or KVM_RUN fails (handle_ept_misconfig).

KVM makes one kind of entry on purpose that a processor takes for one, to mark memory that it does not have: write and
execute without read, and a mark that differs between kernels. A client that stores such an entry has MMIO. Its
generation is not compared. For any other misconfigured entry KVM_RUN fails with EINVAL.
"""

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.cpu import ept
from engine.jit import kernel
from engine.kvm import choice_bits
from engine.kvm import resolutions as res
from engine.kvm.choice_bits import KVM_MARKS_SPECIAL, KVM_REFUSES_DELIVERY

SPECIAL = 1 << 62  # SPTE_SPECIAL_MASK of Linux 5.3
MMU_PRESENT = 1 << 11  # SPTE_MMU_PRESENT_MASK of Linux 7.1: what it made itself to map something


@kernel
def marks_mmio(m, entry):
    """Whether KVM takes an entry for its own mark of MMIO (is_mmio_spte)."""
    if entry & bits.RIGHTS != bits.WRITE | bits.EXECUTE:
        return False
    if choice_bits.chooses(m, KVM_MARKS_SPECIAL):
        return entry & SPECIAL != 0
    return entry & (bits.SUPPRESS_VE | MMU_PRESENT) == 0


@kernel
def handle_misconfiguration(m, how, trail):
    """EPT misconfiguration by the last entry of ``trail``.

    While an event is delivered Linux 5.3 gives up before it looks (KVM_INTERNAL_ERROR_DELIVERY_EV); 7.1 would try for
    ever, and does here what it does otherwise.
    """
    if how & acc.DELIVERY and choice_bits.chooses(m, KVM_REFUSES_DELIVERY):
        return res.INTERNAL_ERROR
    entry = trail[trail[ept.TRAIL_COUNTS, 0] - 1, 3]
    return res.MMIO if marks_mmio(m, entry) else res.RUN_FAILED
