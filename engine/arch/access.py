"""What a memory access is: the numbers a trace uses, and the one word the kernels pass about.

how     bits 1:0   access: read, write, execute
        bits 6:4   kind
        bits 11:8  linear address: valid, user-mode, writable, execute-disable
        bits 16:12 circumstances, all 0 for an ordinary instruction
"""

from engine.arch.words import signed

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

# What an access of each kind can do, what it does unless said, and the same as one number: bit 4 * kind + access.
KIND_ACCESSES = ((READ, WRITE, EXECUTE), (WRITE,), (READ,), (WRITE,), (READ, WRITE))
DEFAULT_ACCESS = (WRITE, WRITE, READ, WRITE, WRITE)
POSSIBLE = sum(1 << 4 * kind + access for kind, some in enumerate(KIND_ACCESSES) for access in some)
KIND_RULE = "a read-modify-write or a paging-update writes, a paging-read reads, and only a data access executes"
LINEAR_RULE = (
    "an access without a valid linear address is a data access or a paging-read, and its page is not said to be "
    "user, writable or execute-disable"
)

# Kinds that can be without a linear address: output of Intel PT, and loads of PDPTEs by MOV to CR (28.2.1).
UNTRANSLATED_KINDS = 1 << DATA | 1 << PAGING_READ

# Whose access it is: an instruction's of the guest, one that KVM emulates for it, or the host's own. The latter two are
# no accesses of the processor: they read or write data, and the emulator fetches instructions.
GUEST = 0
EMULATED = 1
HOST = 2
SOURCE_NAMES = ("guest", "emulated", "host")
SOURCE_RULE = "an emulated or host access is a read or a write of data, or a fetch that is emulated"

MAX_INSTRUCTION = 15  # bytes of an instruction; 0 stands for a length that is not known

LINEAR_VALID = 1
LINEAR_USER = 2
LINEAR_WRITABLE = 4
LINEAR_EXECUTE_DISABLE = 8
LINEAR_BITS = 15
LINEAR_NAMES = ("valid", "user", "writable", "execute-disable")  # from bit 0

# Circumstances
NMI_UNBLOCKING = 1 << 12  # by an IRET that began with NMIs blocked, where the exit reports that (SDM vol. 3C, 28.2.3)
SPP_EXEMPT = 1 << 13  # in a transactional region, or to an enclave: sub-page permissions never apply (29.3.4.1)
DELIVERY = 1 << 14  # part of the delivery of an event
ASYNCHRONOUS = 1 << 15  # not by the instruction: Intel PT output, EPT-friendly PEBS, user-interrupt delivery
UNVERIFIED_PAGING = 1 << 16  # a page with a guest paging structure of the translation has paging-write access off

CIRCUMSTANCE_NAMES = ("nmi-unblocking", "spp-exempt", "delivery", "asynchronous")  # from bit 12
CIRCUMSTANCE_SHIFT = 12
CIRCUMSTANCES = NMI_UNBLOCKING | SPP_EXEMPT | DELIVERY | ASYNCHRONOUS

ACCESS_MASK = 3
KIND_SHIFT = 4
KIND_MASK = 7 << 4
LINEAR_SHIFT = 8

# Word 1 of a trace record holds them too: the kind in 26:24, the linear bits, of which valid is turned over, in 30:27.
# An ordinary access therefore has zeros there. The source is in 49:48, the length of the instruction in 57:50; bits 31
# and 63:58 mean nothing yet.
RECORD_KIND_SHIFT = 24
RECORD_LINEAR_SHIFT = 27
RECORD_BITS = 0x7F << RECORD_KIND_SHIFT
RECORD_SOURCE_SHIFT = 48
RECORD_SOURCE_MASK = 3
RECORD_LENGTH_SHIFT = 50
RECORD_LENGTH_MASK = 0xFF
RECORD_FREE = signed(0xFC00_0000_8000_0000)

DEFAULT_LINEAR = LINEAR_VALID << LINEAR_SHIFT
PLAIN_WRITE = WRITE | DEFAULT_LINEAR


def default_access(kind: int) -> int:
    """What an access of a kind does unless said; of a kind that is none, a write."""
    return DEFAULT_ACCESS[kind] if 0 <= kind < len(DEFAULT_ACCESS) else WRITE


def describe(access: int, kind: int = DATA, linear: int = LINEAR_VALID, circumstances: int = 0) -> int:
    """The ``how`` word of an access; ``circumstances`` are the bits above, already in their places."""
    return access | kind << KIND_SHIFT | linear << LINEAR_SHIFT | circumstances


def record_bits(kind: int, linear: int, source: int = GUEST, insn_len: int = 0) -> int:
    """Kind, linear bits, source and instruction length as word 1 of a trace record holds them."""
    what = kind << RECORD_KIND_SHIFT | (linear ^ LINEAR_VALID) << RECORD_LINEAR_SHIFT
    return what | source << RECORD_SOURCE_SHIFT | insn_len << RECORD_LENGTH_SHIFT
