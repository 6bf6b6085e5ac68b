"""Exit qualifications of EPT violations and SPP-related events (SDM vol. 3C, table 28-7).

Undefined bits are 0. A violation by a read-modify-write sets bit 1, not bit 0 (``CAP_RMW_READS`` sets both).
"""

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import ept
from engine.cpu.access_rights import is_paging, wants
from engine.cpu.frames import CAP_EPT_VPID, CAP_RMW_READS
from engine.jit import kernel


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
