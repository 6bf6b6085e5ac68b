"""VM-entry checks on the controls that decide about guest-physical accesses (SDM vol. 3C, 27.2.1.1).

Only the controls that a vCPU record holds are checked; the others are taken to be in order.
"""

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.cpu.frames import (
    CAP_EPT_VPID,
    CAP_RESERVED_ADDRESS,
    CAP_SECONDARY_ALLOWED,
    CAP_TERTIARY_ALLOWED,
    FIRST_VCPU_FRAME,
)
from engine.jit import kernel

# VM-instruction error: entry with invalid control fields
INVALID_CONTROL = 7

# Bits of an address field that no width allows, beside 51:N.
HIGH = -(1 << 52)

SECONDARY_NEEDS_EPT = (
    ctl.SECONDARY_PML
    | ctl.SECONDARY_UNRESTRICTED
    | ctl.SECONDARY_MBEC
    | ctl.SECONDARY_SPP
    | ctl.SECONDARY_TRACE_GUEST_PHYSICAL
)
TERTIARY_NEEDS_EPT = ctl.TERTIARY_HLAT | ctl.TERTIARY_PAGING_WRITE | ctl.TERTIARY_PAGING_VERIFICATION


@kernel
def eptp_valid(m, eptp):
    """Whether VM entry, INVEPT and EPTP switching take an EPT pointer."""
    capabilities = m.caps[CAP_EPT_VPID]
    memory_type = eptp & bits.EPTP_MEMORY_TYPE
    if memory_type != bits.WRITE_BACK and memory_type != bits.UNCACHEABLE:
        return False
    if not capabilities & (bits.CAP_WB if memory_type == bits.WRITE_BACK else bits.CAP_UC):
        return False
    levels = ((eptp & bits.EPTP_WALK_MASK) >> bits.EPTP_WALK_SHIFT) + 1
    if levels != 4 and levels != 5:
        return False
    if not capabilities & (bits.CAP_WALK_4 if levels == 4 else bits.CAP_WALK_5):
        return False
    if eptp & bits.EPTP_ACCESSED_DIRTY and not capabilities & bits.CAP_ACCESSED_DIRTY:
        return False
    if eptp & bits.EPTP_SHADOW_STACK and not capabilities & bits.CAP_SHADOW_STACK:
        return False
    return eptp & (bits.EPTP_RESERVED | m.caps[CAP_RESERVED_ADDRESS] | HIGH) == 0


@kernel
def page_address_valid(m, address):
    """Whether a field holds the address of a 4-KByte page within the physical-address width."""
    return address & (0xFFF | m.caps[CAP_RESERVED_ADDRESS] | HIGH) == 0


@kernel
def vm_entry(m, vcpu):
    """The VM-instruction error with which VM entry refuses the controls of a vCPU, 0 if it takes them."""
    row = m.row_of[FIRST_VCPU_FRAME + vcpu]
    primary = m.rows[row, ctl.V_PRIMARY]
    secondary = 0
    tertiary = 0
    if primary & ctl.PRIMARY_SECONDARY:
        secondary = m.rows[row, ctl.V_SECONDARY]
    if primary & ctl.PRIMARY_TERTIARY:
        if not m.caps[CAP_TERTIARY_ALLOWED]:
            return INVALID_CONTROL
        tertiary = m.rows[row, ctl.V_TERTIARY]
    if secondary & ~m.caps[CAP_SECONDARY_ALLOWED] or tertiary & ~m.caps[CAP_TERTIARY_ALLOWED]:
        return INVALID_CONTROL
    if secondary & ctl.SECONDARY_EPT:
        if not eptp_valid(m, m.rows[row, ctl.V_EPTP]):
            return INVALID_CONTROL
    elif secondary & SECONDARY_NEEDS_EPT or tertiary & TERTIARY_NEEDS_EPT:
        return INVALID_CONTROL
    if secondary & ctl.SECONDARY_VPID and not m.rows[row, ctl.V_VPID] & ctl.VPID_MASK:
        return INVALID_CONTROL
    if secondary & ctl.SECONDARY_SPP and not page_address_valid(m, m.rows[row, ctl.V_SPPTP]):
        return INVALID_CONTROL
    if secondary & ctl.SECONDARY_PML and not page_address_valid(m, m.rows[row, ctl.V_PML_ADDRESS]):
        return INVALID_CONTROL
    if secondary & ctl.SECONDARY_VE and not page_address_valid(m, m.rows[row, ctl.V_VE_ADDRESS]):
        return INVALID_CONTROL
    return 0
