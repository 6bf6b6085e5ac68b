"""What KVM takes from a leaf for its own ends, write protection and access tracking, and how it comes back (kvm-spp 5).

An armed page stays armed in the first series. Later ones put bit 61 aside, where the processor does not look, and the
next write brings it back. Without accessed flags an aged leaf has no rights at all, and software bits keep them.
"""

from engine.arch import ept as bits
from engine.cpu.frames import CAP_EPT_VPID, CAP_SAVED_SHIFT
from engine.jit import kernel
from engine.kvm import choice_bits

# Software bits of KVM's leaf entries: the host page may be written; KVM has no reason of its own to forbid it.
HOST_WRITEABLE = 1 << 10
MMU_WRITEABLE = 1 << 11
LOCKLESS_WRITABLE = HOST_WRITEABLE | MMU_WRITEABLE


@kernel
def saved_rights(m):
    """Where a leaf keeps read and execute while it has none."""
    return (bits.READ | bits.EXECUTE) << m.caps[CAP_SAVED_SHIFT]


@kernel
def saved_bit(m):
    """Where a leaf keeps bit 61 while KVM forbids writes."""
    return 1 << (m.caps[CAP_SAVED_SHIFT] + 1)


@kernel
def tracked(m, entry):
    """Whether a leaf has no rights because it was aged."""
    return entry & bits.RIGHTS == 0 and entry & saved_rights(m) != 0


@kernel
def with_rights(m, entry):
    """A leaf with the rights it had before it was aged; write is for the next write to ask for."""
    if not tracked(m, entry):
        return entry
    return entry & ~saved_rights(m) | (entry & saved_rights(m)) >> m.caps[CAP_SAVED_SHIFT]


@kernel
def put_aside(m, entry):
    """A leaf that KVM itself forbids to write: bit 61 goes where the processor does not look."""
    if entry & bits.SPP and choice_bits.chooses(m, choice_bits.KVM_SAVED_BIT):
        entry = entry & ~bits.SPP | saved_bit(m)
    return entry & ~bits.WRITE


@kernel
def aged(m, entry):
    """A leaf as aging leaves it."""
    if m.caps[CAP_EPT_VPID] & bits.CAP_ACCESSED_DIRTY:
        return entry & ~bits.ACCESSED
    if tracked(m, entry):
        return entry
    kept = (entry & (bits.READ | bits.EXECUTE)) << m.caps[CAP_SAVED_SHIFT]
    return put_aside(m, entry) & ~bits.RIGHTS | kept


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
