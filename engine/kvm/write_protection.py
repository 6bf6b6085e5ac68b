"""What a leaf loses while KVM forbids writes for its own ends, and where it keeps it (kvm-spp 5).

An armed page stays armed in the first series. Later ones put bit 61 aside, where the processor does not look, and the
next write brings it back (``fast_page_fault``).
"""

from engine.arch import ept as bits
from engine.cpu.frames import CAP_SAVED_SHIFT
from engine.jit import kernel
from engine.kvm import choice_bits

# Software bits of KVM's leaf entries: the host page may be written; KVM has no reason of its own to forbid it.
HOST_WRITEABLE = 1 << 10
MMU_WRITEABLE = 1 << 11
LOCKLESS_WRITABLE = HOST_WRITEABLE | MMU_WRITEABLE


@kernel
def saved_bit(m):
    """Where a leaf keeps bit 61 while KVM forbids writes."""
    return 1 << (m.caps[CAP_SAVED_SHIFT] + 1)


@kernel
def put_aside(m, entry):
    """A leaf that KVM itself forbids to write: bit 61 goes where the processor does not look."""
    if entry & bits.SPP and choice_bits.chooses(m, choice_bits.KVM_SAVED_BIT):
        entry = entry & ~bits.SPP | saved_bit(m)
    return entry & ~bits.WRITE
