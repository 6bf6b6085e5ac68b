"""What a memory access is: the numbers a trace uses, and the one word the kernels pass about.

how     bits 1:0   access: read, write, execute
        bits 6:4   kind
        bits 11:8  linear address: valid, user-mode, writable, execute-disable
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

ACCESS_MASK = 3
KIND_SHIFT = 4
KIND_MASK = 7 << 4
LINEAR_SHIFT = 8

DEFAULT_LINEAR = LINEAR_VALID << LINEAR_SHIFT


def describe(access: int, kind: int = DATA, linear: int = LINEAR_VALID) -> int:
    """The ``how`` word of an access."""
    return access | kind << KIND_SHIFT | linear << LINEAR_SHIFT
