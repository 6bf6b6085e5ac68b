"""The access decision: what the processor does with one access to one page (SDM vol. 3C, 29.3.3 and 29.3.4).

``check`` changes nothing and says which VM exit the access causes, if any; ``complete`` does what a successful access
leaves behind in the EPT entries (``page_log.commit`` also logs it).

Where the manual leaves a choice, or says too little, this is what happens; ``spp_eligibility``, ``exit_qualification``
and ``access_over_pages`` say their own:

* accessed and dirty flags are set only by accesses that succeed, accessed flags included;
* an access is reported at its first byte in the page, whichever of its sub-pages refuses it;
* SPPTs have four levels also where EPT has five: GPA[56:48] do not matter to them.
"""

import numpy as np

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import ept, sppt
from engine.cpu.access_rights import permitted, refused_by_verification, wants
from engine.cpu.exit_qualification import circumstances, violation_qualification
from engine.cpu.frames import FIRST_VCPU_FRAME, read_word
from engine.cpu.host_physical_memory import write_entry
from engine.cpu.spp_eligibility import eligible
from engine.jit import kernel

NO_RIGHTS = np.int64(0)
NO_LEAF = np.int64(0)
NO_VECTOR = np.int64(0)

# How ``judge`` comes by the sub-page permission vector: it walks the SPPT, or the caller remembers it.
WALK_SPPT = np.int64(0)
VECTOR_KNOWN = np.int64(1)


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
