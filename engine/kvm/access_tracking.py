"""Access tracking: what aging takes from a leaf, and how software bits keep its rights meanwhile (kvm-spp 5).

Where the processor has accessed flags, aging clears the leaf's. Without them an aged leaf has no rights at all.
"""

from engine.arch import ept as bits
from engine.cpu.frames import CAP_EPT_VPID, CAP_SAVED_SHIFT
from engine.jit import kernel
from engine.kvm.write_protection import put_aside


@kernel
def saved_rights(m):
    """Where a leaf keeps read and execute while it has none."""
    return (bits.READ | bits.EXECUTE) << m.caps[CAP_SAVED_SHIFT]


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
def aged(m, entry):
    """A leaf as aging leaves it."""
    if m.caps[CAP_EPT_VPID] & bits.CAP_ACCESSED_DIRTY:
        return entry & ~bits.ACCESSED
    if tracked(m, entry):
        return entry
    kept = (entry & (bits.READ | bits.EXECUTE)) << m.caps[CAP_SAVED_SHIFT]
    return put_aside(m, entry) & ~bits.RIGHTS | kept
