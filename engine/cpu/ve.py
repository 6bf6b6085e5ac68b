"""Virtualization exceptions: EPT violations that the guest itself handles (SDM vol. 3C, 26.5.7).

An EPT violation becomes a #VE, vector 20 without an error code, if one entry says so (bit 63 clear in the entry that
was not present, else in the leaf), the guest is in protected mode and not in the midst of delivering an event, and the
information area is not busy. Anything else stays a VM exit; SPP-related events and misconfigurations always do.

A GPA too wide for the EPT walk meets no entry at all; the manual does not name it, and it stays a VM exit.
"""

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exceptions, exits, ve_area
from engine.arch import paging as guest
from engine.cpu import ept, host_physical_memory
from engine.cpu.frames import FIRST_VCPU_FRAME, read_word
from engine.jit import kernel


@kernel
def area_of(m, vcpu):
    """Host-physical address of the information area."""
    return read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_VE_ADDRESS) & bits.ADDRESS


@kernel
def convertible(m, vcpu, how, trail):
    """Whether the EPT violation whose walk ``trail`` holds becomes an exception.

    An area in absent memory reads as all ones, hence busy.
    """
    if not ept.mode_of(m, vcpu) & ept.MODE_VE or how & (acc.DELIVERY | acc.ASYNCHRONOUS):
        return False
    count = trail[ept.TRAIL_COUNTS, 0]
    if count == 0 or trail[count - 1, 3] & bits.SUPPRESS_VE:
        return False
    if not read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_CR0) & guest.CR0_PE:
        return False
    return host_physical_memory.read(m, area_of(m, vcpu), ve_area.WORD_REASON) & ve_area.BUSY == 0


@kernel
def record(m, vcpu, qualification, gla, gpa):
    """Fill the information area."""
    area = area_of(m, vcpu)
    index = read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_EPTP_INDEX) & ve_area.EPTP_INDEX
    rest = host_physical_memory.read(m, area, ve_area.WORD_EPTP_INDEX) & ~ve_area.EPTP_INDEX
    host_physical_memory.write(m, area, ve_area.WORD_REASON, exits.EPT_VIOLATION | ve_area.BUSY)
    host_physical_memory.write(m, area, ve_area.WORD_QUALIFICATION, qualification)
    host_physical_memory.write(m, area, ve_area.WORD_LINEAR, gla)
    host_physical_memory.write(m, area, ve_area.WORD_PHYSICAL, gpa)
    host_physical_memory.write(m, area, ve_area.WORD_EPTP_INDEX, rest | index)


@kernel
def convert(m, vcpu, how, qualification, gla, gpa, trail):
    """Turn an EPT violation into a #VE where it can be; returns the vector, or 0 where a VM exit remains."""
    if not convertible(m, vcpu, how, trail):
        return 0
    record(m, vcpu, qualification, gla, gpa)
    return exceptions.VIRTUALIZATION
