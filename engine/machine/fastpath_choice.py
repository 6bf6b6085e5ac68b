"""Whether the fast path, which does not know vCPUs apart, gives the right answer on a machine as it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.cpu import frames
from engine.kvm import state_frame as reg
from engine.state.config import VmConfig

# What the fast path, which does not know vCPUs apart, takes to be the same for all of them. Whether pages are logged is
# among it, where they are is not: what the fast path serves has its accessed and dirty flags set, in tables that all
# vCPUs share, and is logged by none (SDM vol. 3C, 29.3.6).
_SHARED = (
    ctl.V_EPTP,
    ctl.V_PRIMARY,
    ctl.V_SECONDARY,
    ctl.V_TERTIARY,
    ctl.V_VE_ADDRESS,
    ctl.V_CR0,
)


def fast_path_serves(config: VmConfig, machine: frames.Machine) -> bool:
    """Whether one answer is right for every vCPU: no translation cache, none in SMM, and records that say the same."""
    if config.translation_cache != "off":
        return False
    if not len(machine.row_of):
        return True
    first = int(frames.FIRST_VCPU_FRAME)
    if len(config.vcpus) < 2:  # the usual case, looked at with each change of a machine
        return not config.vcpus or not machine.rows.item(machine.row_of.item(first), ctl.V_SPACE)
    rows = machine.row_of[first : first + len(config.vcpus)]
    if machine.rows[rows, ctl.V_SPACE].any():
        return False
    words = machine.rows[np.ix_(rows, np.array(_SHARED))]
    return bool((words == words[0]).all()) and _same_sppt(machine, rows)


def _same_sppt(machine: frames.Machine, rows: NDArray[np.int64]) -> bool:
    """Whether all vCPUs walk one SPPT, or each its own of those that KVM keeps alike."""
    pointers = machine.rows[rows, ctl.V_SPPTP]
    state = machine.rows[machine.row_of[frames.STATE_FRAME]]
    own = machine.caps[frames.CAP_ARENA] + (machine.rows[rows, ctl.V_SPPT_ROOT] << 12)
    alike = state[reg.SPPT_TREES] == len(rows) and not state[reg.SPPT_EDITED] and bool((pointers == own).all())
    return alike or bool((pointers == pointers[0]).all())
