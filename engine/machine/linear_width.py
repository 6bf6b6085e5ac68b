"""How wide linear addresses are: for a machine's host, and for INVVPID by one of its vCPUs.

KVM lets a guest have of LA57 what its processor has, and nothing else in a machine's description says whether that one
has it: a host has LA57 where a vCPU does, by the CPUID that it was made with or has now, or by CR4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch.paging import CR4_LA57, LINEAR_48, LINEAR_57
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine
from engine.machine.nested_states import NestedStates, first_identity
from engine.state.config import VmConfig
from engine.state.profiles import kvm_version
from engine.vcpu.cpuid import has_la57


def host_width(config: VmConfig, m: Machine, states: NestedStates) -> int:
    """Bits of a linear address of the host: what KVM holds the addresses of a flush list to."""
    return LINEAR_57 if _host_has_la57(config, m, states) else LINEAR_48


def invvpid_width(config: VmConfig, m: Machine, states: NestedStates, position: int) -> int:
    """Bits of the linear address that INVVPID takes from the vCPU at ``position``."""
    if kvm_version(config.profile).vcpu.invvpid_by_host:
        return host_width(config, m, states)
    return LINEAR_57 if _wide(config, m)[position] else LINEAR_48


def _host_has_la57(config: VmConfig, m: Machine, states: NestedStates) -> bool:
    if _wide(config, m).any() or any(has_la57(vcpu.cpuid) for vcpu in states.vcpus.values()):
        return True
    return any(has_la57(first_identity(own)[1]) for own in config.vcpus)


def _wide(config: VmConfig, m: Machine) -> NDArray[np.bool_]:
    """CR4.LA57 of each vCPU, by position."""
    rows = m.row_of[FIRST_VCPU_FRAME : FIRST_VCPU_FRAME + len(config.vcpus)]
    found: NDArray[np.bool_] = m.rows[rows, ctl.V_CR4] & CR4_LA57 != 0
    return found
