"""The access decision: what the processor does with one access to one page (SDM vol. 3C, 29.3.3 and 29.3.4).

``check`` changes nothing and says which VM exit the access causes, if any; ``complete`` does what a successful access
leaves behind in the EPT entries. Accessed and dirty flags are set only by accesses that succeed.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import ept, sppt
from engine.cpu.frames import CAP_EPT_VPID, CAP_SPP_EXECUTE_ONLY, FIRST_VCPU_FRAME, read_word, write_entry
from engine.jit import kernel

NO_RIGHTS = np.int64(0)
NO_LEAF = np.int64(0)


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
def eligible(m, how, mode, level, rights, leaf):
    """Whether sub-page permissions decide about a write that EPT refused (29.3.4.1).

    Write must be what is missing, at whatever level; the page must be mapped by a 4-KByte PTE with bit 61. Guest
    paging-structure accesses never are, nor supervisor shadow-stack accesses under EPTP[7].
    """
    wanted = wants(how, mode)
    if not mode & ept.MODE_SPP or not wanted & bits.WRITE or rights & bits.WRITE:
        return False
    if level != 1 or not leaf & bits.SPP or is_paging(how) or supervisor_shadow_stack(how, mode):
        return False
    if wanted & bits.READ and not rights & bits.READ:
        return False
    return rights & bits.READ != 0 or m.caps[CAP_SPP_EXECUTE_ONLY] != 0


@kernel
def violation_qualification(m, how, mode, rights, leaf):
    """Exit qualification of an EPT violation (table 28-7); undefined bits are 0.

    ``leaf`` is 0 where none was reached.
    """
    linear = how >> acc.LINEAR_SHIFT
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    q = wants(how, mode)
    if kind == acc.READ_MODIFY_WRITE:
        q = exits.Q_WRITE
    q |= (rights & bits.RIGHTS) << exits.Q_RIGHTS_SHIFT
    if mode & ept.MODE_MBEC and rights & bits.USER_EXECUTE:
        q |= exits.Q_USER_EXECUTE
    if kind == acc.SHADOW_STACK:
        q |= exits.Q_SHADOW_STACK
    if mode & ept.MODE_SHADOW_STACK and leaf & bits.SUPERVISOR_SHADOW_STACK:
        q |= exits.Q_SUPERVISOR_SHADOW_STACK
    if not linear & acc.LINEAR_VALID:
        return q
    q |= exits.Q_LINEAR_VALID
    if is_paging(how):
        return q
    q |= exits.Q_FINAL
    if m.caps[CAP_EPT_VPID] & bits.CAP_ADVANCED_EXIT:
        if linear & acc.LINEAR_USER:
            q |= exits.Q_LINEAR_USER
        if linear & acc.LINEAR_WRITABLE:
            q |= exits.Q_LINEAR_WRITABLE
        if linear & acc.LINEAR_EXECUTE_DISABLE:
            q |= exits.Q_LINEAR_EXECUTE_DISABLE
    return q


@kernel
def check(m, vcpu, gpa, size, how, trail):
    """Decide about ``size`` bytes at ``gpa``, all in one page.

    Returns (reason, qualification, denied): reason 0 when the access is allowed, and the mask of touched sub-pages
    that the SPPT refuses. The entries read are left in ``trail``.
    """
    mode = ept.mode_of(m, vcpu)
    eptp = read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_EPTP)
    outcome, level, rights, upper = ept.walk(m, eptp, mode, gpa, trail)
    if outcome == ept.MISCONFIGURED:
        return exits.EPT_MISCONFIGURATION, 0, 0
    count = trail[ept.TRAIL_COUNTS, 0]
    leaf = trail[count - 1, 3] if count else 0
    if outcome == ept.NOT_PRESENT:
        return exits.EPT_VIOLATION, violation_qualification(m, how, mode, NO_RIGHTS, NO_LEAF), 0
    if permitted(how, mode, rights, upper, leaf):
        return exits.NONE, 0, 0
    denied = 0
    if eligible(m, how, mode, level, rights, leaf):
        spptp = read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_SPPTP)
        found, vector = sppt.walk(m, spptp, gpa, trail)
        if found == sppt.MISS:
            return exits.SPP_EVENT, exits.Q_SPP_MISS, 0
        if found == sppt.MISCONFIGURED:
            return exits.SPP_EVENT, 0, 0
        denied = sppt.touched(gpa, size) & ~sppt.gather(vector)
        if denied == 0:
            return exits.NONE, 0, 0
    return exits.EPT_VIOLATION, violation_qualification(m, how, mode, rights, leaf), denied


@kernel
def complete(m, vcpu, how, trail):
    """Set accessed and dirty flags along the walk that ``trail`` holds; returns whether the leaf is now dirty.

    Without EPTP[6] there are no flags and a page counts as dirty.
    """
    mode = ept.mode_of(m, vcpu)
    if not mode & ept.MODE_ACCESSED_DIRTY:
        return True
    count = trail[ept.TRAIL_COUNTS, 0]
    last = count - 1
    for row in range(count):
        entry = trail[row, 3]
        flagged = entry | bits.ACCESSED
        if row == last and wants(how, mode) & bits.WRITE:
            flagged |= bits.DIRTY
        if flagged != entry:
            write_entry(m, trail[row, 1], trail[row, 2], flagged)
            trail[row, 3] = flagged
    return trail[last, 3] & bits.DIRTY != 0
