"""Page-modification logging (SDM vol. 3C, 29.3.6): what an allowed access leaves behind, in order.

Before an access that must set an accessed or dirty flag, the log must have room, or there is a VM exit with reason 62
and nothing happens; a dirty flag that goes from 0 to 1 then logs the page. Permission comes first: an access that EPT
or SPP refuses never finds the log full (the manual does not order an SPP-related event against a full log).

An access over several pages sets no flag and logs nothing unless there is room for all of its pages.
"""

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.cpu import access_check, access_rights, ept, host_physical_memory
from engine.cpu.frames import FIRST_VCPU_FRAME, read_word, write_word
from engine.jit import kernel

PAGE_OFFSET = 4095
LOG_ENTRIES = 512
INDEX_MASK = 0xFFFF
LOGGING = ept.MODE_PML | ept.MODE_ACCESSED_DIRTY


@kernel
def on(mode):
    """Whether pages are logged."""
    return mode & LOGGING == LOGGING


@kernel
def demand(how, mode, trail):
    """What an allowed access must set along the walk in ``trail``: (any flag, the dirty flag)."""
    count = trail[ept.TRAIL_COUNTS, 0]
    dirty = access_rights.wants(how, mode) & bits.WRITE != 0 and not trail[count - 1, 3] & bits.DIRTY
    flags = dirty
    for row in range(count):
        flags = flags or not trail[row, 3] & bits.ACCESSED
    return flags, dirty


@kernel
def index_of(m, vcpu):
    """Where the next entry goes: below 512, or the log is full."""
    return read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_PML_INDEX)


@kernel
def take(how, mode, index, trail):
    """Whether the log has room at ``index`` for what an allowed access to one page must set, and the index after it."""
    if not on(mode):
        return True, index
    flags, dirty = demand(how, mode, trail)
    if flags and not 0 <= index < LOG_ENTRIES:
        return False, index
    return True, (index - 1) & INDEX_MASK if dirty else index


@kernel
def commit(m, vcpu, mode, gpa, how, trail):
    """Log and flag the page whose walk ``trail`` holds; returns whether its leaf is now dirty.

    ``mode`` is the vCPU's mode word. An entry of a log that is not there is lost (see ``cpu.host_physical_memory``).
    """
    if on(mode):
        _, dirty = demand(how, mode, trail)
        if dirty:
            frame = FIRST_VCPU_FRAME + vcpu
            index = index_of(m, vcpu)
            log = read_word(m, frame, ctl.V_PML_ADDRESS) & bits.ADDRESS
            host_physical_memory.write(m, log, index, gpa & ~PAGE_OFFSET)
            write_word(m, frame, ctl.V_PML_INDEX, (index - 1) & INDEX_MASK)
    return access_check.set_flags(m, mode, how, trail)
