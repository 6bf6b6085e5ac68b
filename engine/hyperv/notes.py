"""What KVM keeps about a vCPU for Hyper-V, in the vCPU's record: flags and two statistics, all durable."""

from __future__ import annotations

import numpy as np

from engine.arch import controls as ctl
from engine.arch.words import unsigned
from engine.cpu import frames
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine

# KVM_CAP_HYPERV_ENFORCE_CPUID; a holder of a TLB lock; KVM_CAP_HYPERV_DIRECT_TLBFLUSH; it does not run its guest
ENFORCE_CPUID = 1 << 0
TLB_LOCKED = 1 << 1
DIRECT_FLUSH = 1 << 2
HALTED = 1 << 3


def flag(m: Machine, vcpu: int, bit: int) -> bool:
    """Whether a flag is set; ``vcpu`` is a position."""
    return bool(int(_word(m, vcpu, ctl.V_HV_FLAGS)) & bit)


def set_flag(m: Machine, vcpu: int, bit: int, on: bool) -> None:
    """Set or clear a flag."""
    old = int(_word(m, vcpu, ctl.V_HV_FLAGS))
    frames.write_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_HV_FLAGS, old | bit if on else old & ~bit)


def count(m: Machine, vcpu: int, statistic: np.int64, more: int = 1) -> None:
    """Add to a statistic: V_HV_FLUSHES is KVM's tlb_flush, V_HV_HYPERCALLS its hypercalls."""
    if more:
        frames.write_word(m, FIRST_VCPU_FRAME + vcpu, statistic, int(_word(m, vcpu, statistic)) + more)


def statistic(m: Machine, vcpu: int, which: np.int64) -> int:
    """A statistic."""
    return unsigned(_word(m, vcpu, which))


def nested_ids(m: Machine, vcpu: int) -> tuple[int, int] | None:
    """(VM id, VP id) of the nested guest that runs, None while none does."""
    word = unsigned(_word(m, vcpu, ctl.V_NESTED))
    if not word & ctl.NESTED_RUNS:
        return None
    return unsigned(_word(m, vcpu, ctl.V_NESTED_VM)), word >> ctl.NESTED_VP_SHIFT


def _word(m: Machine, vcpu: int, position: np.int64) -> int:
    return int(frames.read_word(m, FIRST_VCPU_FRAME + vcpu, position))
