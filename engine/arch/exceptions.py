"""Exceptions that a memory access can end in: vectors, and a page fault's error code (SDM vol. 3A, 6.15)."""

INVALID_OPCODE = 6
GENERAL_PROTECTION = 13
PAGE_FAULT = 14
VIRTUALIZATION = 20

NAMES = {INVALID_OPCODE: "#UD", GENERAL_PROTECTION: "#GP", PAGE_FAULT: "#PF", VIRTUALIZATION: "#VE"}

# Error code of a page fault
PF_PRESENT = 1 << 0  # not for want of a present entry
PF_WRITE = 1 << 1
PF_USER = 1 << 2
PF_RESERVED = 1 << 3
PF_FETCH = 1 << 4
PF_SHADOW_STACK = 1 << 6
