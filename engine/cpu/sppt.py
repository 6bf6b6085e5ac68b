"""The SPPT walk (SDM vol. 3C, 29.3.4.2): four levels, stopped by the first invalid or reserved entry from the top."""

from engine.arch import ept, sppt
from engine.cpu.ept import TRAIL_COUNTS, TRAIL_SPPT, index_of
from engine.cpu.frames import CAP_RESERVED_ADDRESS
from engine.cpu.host_physical_memory import read_entry
from engine.jit import kernel

# Outcomes
FOUND = 0
MISS = 1
MISCONFIGURED = 2

# 63:52 are reserved in the upper SPPT entries, whatever MAXPHYADDR is.
HIGH = -(1 << 52)


@kernel
def walk(m, spptp, gpa, trail):
    """Walk the SPPT for a GPA; returns (outcome, vector)."""
    table = spptp & ept.ADDRESS
    reserved = sppt.RESERVED_LOW | m.caps[CAP_RESERVED_ADDRESS] | HIGH
    level = 4
    while True:
        index = index_of(gpa, level)
        entry = read_entry(m, table, index)
        row = TRAIL_SPPT + 4 - level
        trail[row, 0] = level
        trail[row, 1] = table
        trail[row, 2] = index
        trail[row, 3] = entry
        trail[TRAIL_COUNTS, 1] = 5 - level
        if level == 1:
            return (MISCONFIGURED if entry & sppt.VECTOR_RESERVED else FOUND), entry
        if not entry & sppt.VALID:
            return MISS, 0
        if entry & reserved:
            return MISCONFIGURED, 0
        table = entry & ept.ADDRESS
        level -= 1


@kernel
def touched(gpa, size):
    """32-bit mask of the sub-pages that ``size`` bytes from ``gpa`` touch; all bytes lie in one page."""
    first = (gpa >> sppt.SUBPAGE_SHIFT) & 31
    last = ((gpa & 0xFFF) + size - 1) >> sppt.SUBPAGE_SHIFT
    return (2 << last) - (1 << first)


@kernel
def spread(mask):
    """SPPL1E whose bit 2s is bit s of a 32-bit mask."""
    word = mask & sppt.FULL_ACCESS
    word = (word | (word << 16)) & 0x0000_FFFF_0000_FFFF
    word = (word | (word << 8)) & 0x00FF_00FF_00FF_00FF
    word = (word | (word << 4)) & 0x0F0F_0F0F_0F0F_0F0F
    word = (word | (word << 2)) & 0x3333_3333_3333_3333
    return (word | (word << 1)) & sppt.VECTOR_ALL


@kernel
def gather(vector):
    """32-bit mask of the even bits of an SPPL1E."""
    word = vector & sppt.VECTOR_ALL
    word = (word | (word >> 1)) & 0x3333_3333_3333_3333
    word = (word | (word >> 2)) & 0x0F0F_0F0F_0F0F_0F0F
    word = (word | (word >> 4)) & 0x00FF_00FF_00FF_00FF
    word = (word | (word >> 8)) & 0x0000_FFFF_0000_FFFF
    return (word | (word >> 16)) & sppt.FULL_ACCESS
