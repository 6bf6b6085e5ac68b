"""INVEPT and INVVPID: what their operands must be, and what they remove (SDM vol. 3C, 29.4.3 and 31.3)."""

from engine.arch import ept as bits
from engine.arch import exceptions
from engine.cpu import tlb
from engine.cpu.control_checks import eptp_valid
from engine.cpu.frames import CAP_EPT_VPID
from engine.cpu.guest_paging import canonical
from engine.jit import kernel

# Outcomes; with each comes a number: a VM-instruction error, an exception vector, an exit reason.
SUCCEEDED = 0
FAILED = 1
EXCEPTION = 2
EXIT = 3
OUTCOME_NAMES = ("VMsucceed", "VMfail", "exception", "vm-exit")

INVALID_OPERAND = 28
EXIT_INVEPT = 50
EXIT_INVVPID = 53

# Types
INVEPT_SINGLE, INVEPT_ALL = 1, 2
INVVPID_ADDRESS, INVVPID_SINGLE, INVVPID_ALL, INVVPID_RETAIN_GLOBALS = range(4)

# Where the instruction is executed: in VMX root operation, outside it, in non-root operation; in a mode that has the
# instruction (protected mode but virtual-8086, 64-bit mode but compatibility) or not.
ROOT = 0
OUTSIDE = 1
NON_ROOT = 2
WRONG_MODE = 3

VPID_MASK = 0xFFFF


@kernel
def refusal(place, cpl, supported, exit_reason):
    """What happens whatever the operands are: (outcome, number), SUCCEEDED if they decide."""
    if not supported or place in (OUTSIDE, WRONG_MODE):
        return EXCEPTION, exceptions.INVALID_OPCODE
    if place == NON_ROOT:
        return EXIT, exit_reason
    if cpl != 0:
        return EXCEPTION, exceptions.GENERAL_PROTECTION
    return SUCCEEDED, 0


@kernel
def invept(m, vcpu, place, cpl, kind, eptp):
    """INVEPT by a vCPU's processor; returns (outcome, number).

    ``eptp`` is the first half of the descriptor, which only the single-context type looks at.
    """
    capabilities = m.caps[CAP_EPT_VPID]
    outcome, number = refusal(place, cpl, capabilities & bits.CAP_INVEPT != 0, EXIT_INVEPT)
    if outcome != SUCCEEDED:
        return outcome, number
    if kind == INVEPT_SINGLE and capabilities & bits.CAP_INVEPT_SINGLE:
        if not eptp_valid(m, eptp):
            return FAILED, INVALID_OPERAND
        tlb.remove_ept(m, vcpu, eptp & bits.ADDRESS)
        return SUCCEEDED, 0
    if kind == INVEPT_ALL and capabilities & bits.CAP_INVEPT_ALL:
        tlb.remove_ept(m, vcpu, tlb.EVERY)
        return SUCCEEDED, 0
    return FAILED, INVALID_OPERAND


@kernel
def invvpid_supported(capabilities, kind):
    """Whether INVVPID has a type."""
    if kind == INVVPID_ADDRESS:
        return capabilities & bits.CAP_INVVPID_ADDRESS != 0
    if kind == INVVPID_SINGLE:
        return capabilities & bits.CAP_INVVPID_SINGLE != 0
    if kind == INVVPID_ALL:
        return capabilities & bits.CAP_INVVPID_ALL != 0
    return kind == INVVPID_RETAIN_GLOBALS and capabilities & bits.CAP_INVVPID_RETAIN_GLOBALS != 0


@kernel
def invvpid(m, vcpu, place, cpl, kind, context, linear, width):
    """INVVPID by a vCPU's processor; returns (outcome, number).

    ``context`` and ``linear`` are the two halves of the descriptor: the VPID with 48 bits that must be 0, and the
    linear address, which only the individual-address type looks at: it must be canonical in ``width`` bits.
    """
    capabilities = m.caps[CAP_EPT_VPID]
    outcome, number = refusal(place, cpl, capabilities & bits.CAP_INVVPID != 0, EXIT_INVVPID)
    if outcome != SUCCEEDED:
        return outcome, number
    if not invvpid_supported(capabilities, kind) or context & ~VPID_MASK:
        return FAILED, INVALID_OPERAND
    if kind == INVVPID_ALL:
        tlb.remove_vpid(m, vcpu, tlb.EVERY, tlb.GLOBALS_TOO)
        return SUCCEEDED, 0
    if context == 0 or (kind == INVVPID_ADDRESS and not canonical(linear, width)):
        return FAILED, INVALID_OPERAND
    if kind == INVVPID_ADDRESS:
        tlb.remove_address(m, vcpu, context, tlb.EVERY, linear)
    elif kind == INVVPID_SINGLE:
        tlb.remove_vpid(m, vcpu, context, tlb.GLOBALS_TOO)
    else:
        tlb.remove_vpid(m, vcpu, context, tlb.GLOBALS_STAY)
    return SUCCEEDED, 0
