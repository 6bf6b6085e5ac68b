"""Which accesses are none: records that say what no processor does, and members of theirs that do not go together."""

from engine.arch import access as acc
from engine.cpu.frames import CAP_VCPUS
from engine.jit import kernel

# What is wrong with a record, beside the other answers of the loop in ``trace.replay``
DONE = 0
BAD_SIZE = 4
BAD_ACCESS = 5
BAD_VCPU = 6
BAD_ADDRESS = 7
BAD_RESERVED = 8
BAD_KIND = 9
BAD_LINEAR = 10
BAD_SOURCE = 11
GPA_LIMIT = 1 << 52


@kernel
def describe(word):
    """The access of a record as the kernels name it."""
    kind = (word >> acc.RECORD_KIND_SHIFT) & 7
    linear = (word >> acc.RECORD_LINEAR_SHIFT) & acc.LINEAR_BITS
    return (word >> 16) & acc.ACCESS_MASK | kind << acc.KIND_SHIFT | (linear ^ acc.LINEAR_VALID) << acc.LINEAR_SHIFT


@kernel
def refusal(m, gpa, word, kinds):
    """Why a record is no access at all, DONE if it is one."""
    size = word & 0xFFFF
    if size == 0:
        return BAD_SIZE
    if (word >> 16) & 0xFF > acc.EXECUTE:
        return BAD_ACCESS
    if (word >> 24) & 0xFF or (word >> 48) & 0xFFFF:
        if not kinds or word & acc.RECORD_FREE:
            return BAD_RESERVED
        if not possible_kind(describe(word)):
            return BAD_KIND
        if not possible_linear(describe(word)):
            return BAD_LINEAR
        if not fits_source(word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK, describe(word)):
            return BAD_SOURCE
    vcpu = (word >> 32) & 0xFFFF
    if vcpu >= m.caps[CAP_VCPUS] or m.vcpu_of_id[vcpu] < 0:
        return BAD_VCPU
    if gpa < 0 or gpa > GPA_LIMIT - size:
        return BAD_ADDRESS
    return DONE


@kernel
def possible_kind(how):
    """Whether an access does what its kind does."""
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    return acc.POSSIBLE >> (4 * kind + (how & acc.ACCESS_MASK)) & 1 != 0


@kernel
def possible_linear(how):
    """Whether what an access says of its linear address goes together, and its kind can be without one."""
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    linear = (how >> acc.LINEAR_SHIFT) & acc.LINEAR_BITS
    return linear & acc.LINEAR_VALID != 0 or (linear == 0 and acc.UNTRANSLATED_KINDS >> kind & 1 != 0)


@kernel
def fits_source(source, how):
    """Whether an access can come from a source: what is not the guest's is plain, and the host fetches nothing."""
    if source == acc.GUEST:
        return True
    fetches = how & acc.ACCESS_MASK == acc.EXECUTE
    return (
        source <= acc.HOST and how & ~acc.ACCESS_MASK == acc.DEFAULT_LINEAR and (source == acc.EMULATED or not fetches)
    )
