"""What an access asks for, and what EPT rights and guest-paging verification say to it (SDM vol. 3C, 29.3.3)."""

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.cpu import ept
from engine.jit import kernel


@kernel
def is_paging(how):
    """Whether the access is to a guest paging structure."""
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    return kind == acc.PAGING_READ or kind == acc.PAGING_UPDATE


@kernel
def wants(how, mode):
    """Rights the access asks for, as the read, write and execute bits of an entry.

    With EPT accessed and dirty flags on, every guest paging-structure access counts as a write too (29.3.3.2),
    but for the loads of PDPTEs by MOV to CR, which have no linear address.
    """
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    translated = how >> acc.LINEAR_SHIFT & acc.LINEAR_VALID
    if kind == acc.PAGING_UPDATE or (kind == acc.PAGING_READ and mode & ept.MODE_ACCESSED_DIRTY and translated):
        return bits.READ | bits.WRITE
    if kind == acc.PAGING_READ:
        return bits.READ
    if kind == acc.READ_MODIFY_WRITE:
        return bits.READ | bits.WRITE
    return 1 << (how & acc.ACCESS_MASK)


@kernel
def supervisor_shadow_stack(how, mode):
    """Whether EPTP[7] makes leaf bit 60 decide about the access."""
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    user = how >> acc.LINEAR_SHIFT & acc.LINEAR_USER
    return kind == acc.SHADOW_STACK and mode & ept.MODE_SHADOW_STACK != 0 and user == 0


@kernel
def permitted(how, mode, rights, upper, leaf):
    """Whether the EPT rights alone allow the access; ``leaf`` is the last entry of the walk."""
    if supervisor_shadow_stack(how, mode):
        return rights & bits.READ != 0 and upper != 0 and leaf & bits.SUPERVISOR_SHADOW_STACK != 0
    wanted = wants(how, mode)
    if wanted & bits.EXECUTE:
        user = how >> acc.LINEAR_SHIFT & acc.LINEAR_USER
        right = bits.USER_EXECUTE if mode & ept.MODE_MBEC and user else bits.EXECUTE
        return rights & right != 0
    if wanted & bits.READ and not rights & bits.READ:
        return False
    if not wanted & bits.WRITE or rights & bits.WRITE:
        return True
    paging_write = is_paging(how) and mode & ept.MODE_PAGING_WRITE != 0
    return paging_write and leaf & bits.PAGING_WRITE != 0 and upper != 0


@kernel
def refused_by_verification(how, mode, leaf):
    """Whether guest-paging verification refuses an access that its rights allow.

    Bit 57 of the leaf demands paging-write access to every guest paging structure that led to the page.
    """
    unverified = how & acc.UNVERIFIED_PAGING != 0 and mode & ept.MODE_PAGING_VERIFICATION != 0
    return unverified and leaf & bits.VERIFY_PAGING != 0 and not is_paging(how)
