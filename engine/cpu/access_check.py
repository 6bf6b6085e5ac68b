"""The access decision: what the processor does with one access to one page (SDM vol. 3C, 29.3.3 and 29.3.4).

``check`` changes nothing and says which VM exit the access causes, if any; ``complete`` does what a successful access
leaves behind in the EPT entries (``page_log.commit`` also logs it).

Where the manual leaves a choice, or says too little, this is what happens:

* undefined bits of a qualification are 0;
* accessed and dirty flags are set only by accesses that succeed, accessed flags included;
* a page that cannot be read is not eligible for sub-page permissions (``CAP_SPP_EXECUTE_ONLY`` makes it so);
* a violation by a read-modify-write sets bit 1 of the qualification, not bit 0 (``CAP_RMW_READS`` sets both);
* an access is reported at its first byte in the page, whichever of its sub-pages refuses it;
* sub-page permissions apply to each page of an access over two pages, low page first;
* user shadow-stack writes are eligible, supervisor ones under EPTP[7] are not;
* SPPTs have four levels also where EPT has five: GPA[56:48] do not matter to them.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import ept, sppt
from engine.cpu.frames import (
    CAP_EPT_VPID,
    CAP_RMW_READS,
    CAP_SPP_EXECUTE_ONLY,
    FIRST_VCPU_FRAME,
    read_word,
    write_entry,
)
from engine.jit import kernel

PAGE = 4096

NO_RIGHTS = np.int64(0)
NO_LEAF = np.int64(0)
NO_VECTOR = np.int64(0)

# How ``judge`` comes by the sub-page permission vector: it walks the SPPT, or the caller remembers it.
WALK_SPPT = np.int64(0)
VECTOR_KNOWN = np.int64(1)


@kernel
def possible_kind(how):
    """Whether an access does what its kind does."""
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    return acc.POSSIBLE >> (4 * kind + (how & acc.ACCESS_MASK)) & 1 != 0


@kernel
def possible_linear(how):
    """Whether what an access says of its linear address goes together, and its kind can be without one."""
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    linear = (how >> acc.LINEAR_SHIFT) & acc.LINEAR_BITS
    return linear & acc.LINEAR_VALID != 0 or (linear == 0 and acc.UNTRANSLATED_KINDS >> kind & 1 != 0)


@kernel
def fits_source(source, how):
    """Whether an access can come from a source: what is not the guest's is a read or a write of data."""
    return source == acc.GUEST or (source <= acc.HOST and how & ~1 == acc.DEFAULT_LINEAR)


@kernel
def page_part(at, end):
    """Bytes of [at, end) that lie in the page of ``at``."""
    return min(end - at, PAGE - (at & (PAGE - 1)))


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
    paging-structure accesses never are, nor supervisor shadow-stack accesses under EPTP[7], nor writes in a
    transactional region or to an enclave.
    """
    wanted = wants(how, mode)
    if not mode & ept.MODE_SPP or not wanted & bits.WRITE or rights & bits.WRITE or how & acc.SPP_EXEMPT:
        return False
    if level != 1 or not leaf & bits.SPP or is_paging(how) or supervisor_shadow_stack(how, mode):
        return False
    if wanted & bits.READ and not rights & bits.READ:
        return False
    return rights & bits.READ != 0 or m.caps[CAP_SPP_EXECUTE_ONLY] != 0


@kernel
def refused_by_verification(how, mode, leaf):
    """Whether guest-paging verification refuses an access that its rights allow.

    Bit 57 of the leaf demands paging-write access to every guest paging structure that led to the page.
    """
    unverified = how & acc.UNVERIFIED_PAGING != 0 and mode & ept.MODE_PAGING_VERIFICATION != 0
    return unverified and leaf & bits.VERIFY_PAGING != 0 and not is_paging(how)


@kernel
def nmi_unblocking(how):
    """The bit that EPT violations, SPP-related events and a full page-modification log share."""
    return exits.Q_NMI_UNBLOCKING if how & acc.NMI_UNBLOCKING else 0


@kernel
def circumstances(how):
    """The bits that EPT violations and SPP-related events share."""
    q = nmi_unblocking(how)
    if how & acc.ASYNCHRONOUS:
        q |= exits.Q_ASYNCHRONOUS
    return q


@kernel
def violation_qualification(m, how, mode, rights, leaf):
    """Exit qualification of an EPT violation (table 28-7); undefined bits are 0.

    ``leaf`` is 0 where none was reached.
    """
    linear = how >> acc.LINEAR_SHIFT
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    q = wants(how, mode)
    if kind == acc.READ_MODIFY_WRITE and not m.caps[CAP_RMW_READS]:
        q = exits.Q_WRITE
    q |= circumstances(how)
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
    if not mode & ept.MODE_EPT:
        trail[ept.TRAIL_COUNTS, 0] = 0
        trail[ept.TRAIL_COUNTS, 1] = 0
        return exits.NONE, 0, 0
    eptp = read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_EPTP)
    outcome, level, rights, upper = ept.walk(m, eptp, mode, gpa, trail)
    if outcome == ept.MISCONFIGURED:
        return exits.EPT_MISCONFIGURATION, 0, 0
    if outcome == ept.NOT_PRESENT:
        return exits.EPT_VIOLATION, violation_qualification(m, how, mode, NO_RIGHTS, NO_LEAF), 0
    leaf = trail[trail[ept.TRAIL_COUNTS, 0] - 1, 3]
    if not mode & ept.MODE_PAGING_VERIFICATION and permitted(how, mode, rights, upper, leaf):
        return exits.NONE, 0, 0
    return judge(m, vcpu, gpa, size, how, mode, level, rights, upper, leaf, WALK_SPPT, NO_VECTOR, trail)


@kernel
def judge(m, vcpu, gpa, size, how, mode, level, rights, upper, leaf, source, vector, trail):
    """Decide by what a complete walk found, or a cached mapping holds; returns as ``check`` does.

    ``source`` says whether ``vector`` is the page's vector or the SPPT is to be walked for it.
    """
    denied = 0
    allowed = permitted(how, mode, rights, upper, leaf)
    if not allowed and eligible(m, how, mode, level, rights, leaf):
        if source == WALK_SPPT:
            spptp = read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_SPPTP)
            found, vector = sppt.walk(m, spptp, gpa, trail)
            if found == sppt.MISS:
                return exits.SPP_EVENT, exits.Q_SPP_MISS | circumstances(how), 0
            if found == sppt.MISCONFIGURED:
                return exits.SPP_EVENT, circumstances(how), 0
        denied = sppt.touched(gpa, size) & ~sppt.gather(vector)
        allowed = denied == 0
    if allowed and not refused_by_verification(how, mode, leaf):
        return exits.NONE, 0, 0
    q = violation_qualification(m, how, mode, rights, leaf)
    if allowed:
        q |= exits.Q_PAGING_VERIFICATION
    return exits.EPT_VIOLATION, q, denied


@kernel
def complete(m, vcpu, how, trail):
    """Set accessed and dirty flags along the walk that ``trail`` holds; returns whether the leaf is now dirty.

    Without EPTP[6] there are no flags and a page counts as dirty.
    """
    return set_flags(m, ept.mode_of(m, vcpu), how, trail)


@kernel
def set_flags(m, mode, how, trail):
    """``complete`` for a known mode."""
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
