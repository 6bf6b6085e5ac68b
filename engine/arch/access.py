"""What a memory access is: the numbers a trace uses, and the one word the kernels pass about.

how     bits 1:0   access: read, write, execute
        bits 6:4   kind
        bits 11:8  linear address: valid, user-mode, writable, execute-disable
        bits 16:12 circumstances, all 0 for an ordinary instruction
"""

READ = 0
WRITE = 1
EXECUTE = 2
ACCESS_NAMES = ("read", "write", "execute")

DATA = 0
READ_MODIFY_WRITE = 1
PAGING_READ = 2
PAGING_UPDATE = 3  # the processor sets accessed or dirty in a guest paging-structure entry
SHADOW_STACK = 4
KIND_NAMES = ("data", "read-modify-write", "paging-read", "paging-update", "shadow-stack")

LINEAR_VALID = 1
LINEAR_USER = 2
LINEAR_WRITABLE = 4
LINEAR_EXECUTE_DISABLE = 8
LINEAR_NAMES = ("valid", "user", "writable", "execute-disable")  # from bit 0

# Circumstances
NMI_UNBLOCKING = 1 << 12  # by an IRET that began with NMIs blocked, where the exit reports that (SDM vol. 3C, 28.2.3)
SPP_EXEMPT = 1 << 13  # in a transactional region, or to an enclave: sub-page permissions never apply (29.3.4.1)
DELIVERY = 1 << 14  # part of the delivery of an event
ASYNCHRONOUS = 1 << 15  # not by the instruction: Intel PT output, EPT-friendly PEBS, user-interrupt delivery
UNVERIFIED_PAGING = 1 << 16  # a page with a guest paging structure of the translation has paging-write access off

ACCESS_MASK = 3
KIND_SHIFT = 4
KIND_MASK = 7 << 4
LINEAR_SHIFT = 8

DEFAULT_LINEAR = LINEAR_VALID << LINEAR_SHIFT


def describe(access: int, kind: int = DATA, linear: int = LINEAR_VALID, circumstances: int = 0) -> int:
    """The ``how`` word of an access; ``circumstances`` are the bits above, already in their places."""
    return access | kind << KIND_SHIFT | linear << LINEAR_SHIFT | circumstances
