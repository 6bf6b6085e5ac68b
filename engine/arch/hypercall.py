"""Hypercalls of the TLFS: the input and result words, registers, status codes, and the blocks of the flush calls.

Source: Microsoft TLFS, hypercall interface and virtual MMU; the layout of large-page ranges is in its headers only.
Offsets are in bytes, words little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

# The input value
CODE_MASK = 0xFFFF
FAST = 1 << 16
VARIABLE_SHIFT = 17
VARIABLE_MASK = 0x3FF
NESTED = 1 << 31
REPS_SHIFT = 32
START_SHIFT = 48
REPS_MASK = 0xFFF
# Reserved in the specification; KVM reserves bit 31 too.
RESERVED = 0xF << 27 & ~NESTED | 0xF << 44 | 0xF << 60
RESERVED_WITH_NESTED = RESERVED | NESTED

# The result value: status in 15:0, repetitions done in 43:32
RESULT_REPS_SHIFT = 32

# VMCALL and VMMCALL are three bytes long
INSTRUCTION_LENGTH = 3

# Registers: the bytes of a fast call are those of two general registers, then of XMM0 to XMM5.
FAST_GENERAL = 2
XMM_REGISTERS = 6
FAST_WORDS = FAST_GENERAL + 2 * XMM_REGISTERS
WORD_BYTES = 8
PAGE = 0x1000


class Status(IntEnum):
    """HV_STATUS, as far as these calls return it."""

    SUCCESS = 0x0000
    INVALID_HYPERCALL_CODE = 0x0002
    INVALID_HYPERCALL_INPUT = 0x0003
    INVALID_ALIGNMENT = 0x0004
    INVALID_PARAMETER = 0x0005
    ACCESS_DENIED = 0x0006
    OPERATION_DENIED = 0x0008
    INVALID_VP_INDEX = 0x000E
    INVALID_VP_STATE = 0x0015
    TIME_OUT = 0x0078


class Control(NamedTuple):
    """The input value, taken apart. ``variable`` is the size of the variable header in words of 8 bytes."""

    value: int
    code: int
    fast: bool
    variable: int
    nested: bool
    reps: int
    start: int

    @classmethod
    def of(cls, value: int) -> Control:
        """The fields of an input value."""
        return cls(
            value,
            value & CODE_MASK,
            bool(value & FAST),
            value >> VARIABLE_SHIFT & VARIABLE_MASK,
            bool(value & NESTED),
            value >> REPS_SHIFT & REPS_MASK,
            value >> START_SHIFT & REPS_MASK,
        )


def result_value(status: int, reps: int = 0) -> int:
    """The result value."""
    return status | reps << RESULT_REPS_SHIFT


def status_of(result: int) -> Status:
    """The status in a result value."""
    return Status(result & 0xFFFF)


def reps_of(result: int) -> int:
    """The repetitions done, in a result value."""
    return result >> RESULT_REPS_SHIFT & REPS_MASK


class Call(NamedTuple):
    """A flush call. ``header`` is the size of its fixed header in words; ``sparse`` a set of processors, not a mask."""

    code: int
    name: str
    header: int
    rep: bool
    sparse: bool
    second_level: bool = False


SPACE, LIST, SPACE_EX, LIST_EX = 0x0002, 0x0003, 0x0013, 0x0014
GUEST_PHYSICAL_SPACE, GUEST_PHYSICAL_LIST = 0x00AF, 0x00B0

CALLS: Mapping[int, Call] = MappingProxyType(
    {
        call.code: call
        for call in (
            Call(SPACE, "HvCallFlushVirtualAddressSpace", 3, rep=False, sparse=False),
            Call(LIST, "HvCallFlushVirtualAddressList", 3, rep=True, sparse=False),
            Call(SPACE_EX, "HvCallFlushVirtualAddressSpaceEx", 4, rep=False, sparse=True),
            Call(LIST_EX, "HvCallFlushVirtualAddressListEx", 4, rep=True, sparse=True),
            Call(GUEST_PHYSICAL_SPACE, "HvCallFlushGuestPhysicalAddressSpace", 2, False, False, second_level=True),
            Call(GUEST_PHYSICAL_LIST, "HvCallFlushGuestPhysicalAddressList", 2, True, False, second_level=True),
        )
    }
)
VIRTUAL_CALLS = frozenset(code for code, call in CALLS.items() if not call.second_level)
# Calls whose block does not fit the two general registers: in their fast form they have input in XMM registers. KVM
# counts one more, which sends interrupts.
SEND_IPI_EX = 0x0015
XMM_CALLS = frozenset(code for code, call in CALLS.items() if call.header + call.rep > FAST_GENERAL)
KVM_XMM_CALLS = VIRTUAL_CALLS | {SEND_IPI_EX}

# Flags of a virtual flush
ALL_PROCESSORS = 1 << 0
ALL_SPACES = 1 << 1
NON_GLOBAL_ONLY = 1 << 2
EXTENDED_RANGES = 1 << 3
FLAG_NAMES: Mapping[str, int] = MappingProxyType(
    {
        "all_processors": ALL_PROCESSORS,
        "all_virtual_address_spaces": ALL_SPACES,
        "non_global_mappings_only": NON_GLOBAL_ONLY,
        "use_extended_range_format": EXTENDED_RANGES,
    }
)

# HV_VP_SET
SET_SPARSE, SET_ALL = 0, 1
BANKS = 64
BANK_VPS = 64

# A range: additional pages in 11:0 (simple) or 10:0, then bit 11 large, and for large ones bit 12 the larger size.
SIMPLE_COUNT = 0xFFF
EXTENDED_COUNT = 0x7FF
RANGE_LARGE = 1 << 11
RANGE_1G = 1 << 12
LARGE_BITS = 21
HUGE_BITS = 30
# What KVM queues for "everything": also the range of 4096 pages from the last one.
EVERYTHING = (1 << 64) - 1
