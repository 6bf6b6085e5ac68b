"""The EPT walk (SDM vol. 3C, 29.3.2 and 29.3.3).

For each level from the root: not present is an EPT violation, misconfigured an EPT misconfiguration, and privileges
are looked at only when the whole walk is done (29.3.3.3). The walk believes nothing but the entries.
"""

from engine.arch import controls as ctl
from engine.arch import ept
from engine.cpu.frames import CAP_EPT_VPID, CAP_RESERVED_ADDRESS, FIRST_VCPU_FRAME
from engine.cpu.host_physical_memory import read_entry
from engine.jit import kernel, position

# Outcomes of a walk, and what an entry can be: COMPLETE is one that maps the page.
COMPLETE = 0
NOT_PRESENT = 1
MISCONFIGURED = 2
TABLE = 3

# The mode word: what the VMCS says about walks, gathered once an access. Pairs are in the order of the fields that they
# come from, so that ``mode_of`` moves them with a shift.
MODE_MBEC = 1 << 0
MODE_SPP = 1 << 1
MODE_ACCESSED_DIRTY = 1 << 2
MODE_SHADOW_STACK = 1 << 3
MODE_PAGING_WRITE = 1 << 4
MODE_PAGING_VERIFICATION = 1 << 5
MODE_PML = 1 << 6
MODE_VE = 1 << 7
MODE_EPT = 1 << 8

# A trail holds what was read: rows 0 to 4 EPT entries, rows 5 to 8 SPPT entries, each [level, table, index, entry];
# row 9 holds how many of each.
TRAIL_ROWS = 10
TRAIL_SPPT = 5
TRAIL_COUNTS = 9


@kernel
def mode_of(m, vcpu):
    """The mode word of a vCPU, from its controls and EPTP.

    Secondary and tertiary controls count as 0 unless the primary controls activate them; without EPT there is nothing
    that its other controls could do.
    """
    row = position(m.row_of[position(FIRST_VCPU_FRAME + vcpu)])
    primary = m.rows[row, ctl.V_PRIMARY]
    secondary = m.rows[row, ctl.V_SECONDARY] if primary & ctl.PRIMARY_SECONDARY else 0
    tertiary = m.rows[row, ctl.V_TERTIARY] if primary & ctl.PRIMARY_TERTIARY else 0  # EPT's paging controls: 2 and 3
    eptp = m.rows[row, ctl.V_EPTP]
    if not secondary & ctl.SECONDARY_EPT:
        return 0
    mode = MODE_EPT | (secondary >> 22 & 3) | (secondary >> 17 & 3) << 6
    return mode | (eptp >> 6 & 3) << 2 | (tertiary >> 2 & 3) << 4


@kernel
def index_of(gpa, level):
    """Position of the entry of a GPA in its table of this level, EPT or SPPT."""
    return (gpa >> ept.LEVEL_SHIFT[level]) & 511


@kernel
def present(entry, mode):
    """Any right makes an entry present; under MBEC user execute is one of them."""
    rights = ept.RIGHTS | (ept.USER_EXECUTE if mode & MODE_MBEC else 0)
    return entry & rights != 0


@kernel
def is_leaf(entry, level):
    """Whether a present entry maps a page."""
    return level == 1 or (level <= 3 and entry & ept.PAGE != 0)


@kernel
def reserved_bits(entry, level, width, capabilities):
    """Bits that must be 0 in a present entry of this level; ``width`` and ``capabilities`` as in ``classify``."""
    if level >= 4:
        return width | ept.RESERVED_PML
    if level == 1:
        return width
    supported = capabilities & (ept.CAP_1G if level == 3 else ept.CAP_2M)
    if entry & ept.PAGE:
        if not supported:
            return width | ept.PAGE
        return width | (ept.RESERVED_1G if level == 3 else ept.RESERVED_2M)
    return width | ept.RESERVED_TABLE


@kernel
def misconfigured(entry, level, mode, width, capabilities):
    """The conditions of 29.3.3.1 for one present entry; ``width`` and ``capabilities`` as in ``classify``."""
    if not entry & ept.READ:
        if entry & ept.WRITE:
            return True
        execute = entry & ept.EXECUTE or (mode & MODE_MBEC and entry & ept.USER_EXECUTE)
        if execute and not capabilities & ept.CAP_EXECUTE_ONLY:
            return True
        if mode & MODE_PAGING_WRITE and is_leaf(entry, level) and entry & ept.PAGING_WRITE:
            return True
    if entry & reserved_bits(entry, level, width, capabilities):
        return True
    if is_leaf(entry, level):
        memory_type = (entry & ept.MEMORY_TYPE_MASK) >> ept.MEMORY_TYPE_SHIFT
        return memory_type == 2 or memory_type == 3 or memory_type == 7
    return False


@kernel
def classify(entry, level, mode, width, capabilities):
    """What an entry is to the processor that walks it: NOT_PRESENT, MISCONFIGURED, a TABLE, or COMPLETE.

    ``width`` has the bits 51:N that its MAXPHYADDR reserves, ``capabilities`` is its IA32_VMX_EPT_VPID_CAP: the
    host's, or for the tables of a guest hypervisor those of its vCPU.
    """
    if not present(entry, mode):
        return NOT_PRESENT
    if misconfigured(entry, level, mode, width, capabilities):
        return MISCONFIGURED
    return COMPLETE if is_leaf(entry, level) else TABLE


@kernel
def walk(m, eptp, mode, gpa, trail):
    """Walk EPT for a GPA and leave the entries read in ``trail``.

    Returns (outcome, level, rights, upper): the level of the last entry read, the AND of read, write, execute and
    user execute over all entries, and the AND of write over the entries above the last.
    """
    level = ((eptp & ept.EPTP_WALK_MASK) >> ept.EPTP_WALK_SHIFT) + 1
    trail[TRAIL_COUNTS, 0] = 0
    trail[TRAIL_COUNTS, 1] = 0
    if gpa >> (ept.LEVEL_SHIFT[level] + 9):
        return NOT_PRESENT, level + 1, 0, 0
    rights = ept.RIGHTS | ept.USER_EXECUTE
    upper = ept.WRITE
    table = eptp & ept.ADDRESS
    width = m.caps[CAP_RESERVED_ADDRESS]
    capabilities = m.caps[CAP_EPT_VPID]
    read = 0
    while True:
        index = index_of(gpa, level)
        entry = read_entry(m, table, index)
        trail[read, 0] = level
        trail[read, 1] = table
        trail[read, 2] = index
        trail[read, 3] = entry
        read += 1
        trail[TRAIL_COUNTS, 0] = read
        kind = classify(entry, level, mode, width, capabilities)
        if kind in (NOT_PRESENT, MISCONFIGURED):
            return kind, level, 0, upper
        rights &= entry
        if kind == COMPLETE:
            return COMPLETE, level, rights, upper
        upper &= entry
        table = entry & ept.ADDRESS
        level -= 1
