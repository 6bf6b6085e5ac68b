"""The control for sub-page write permissions (secondary control 23) of a vCPU: when KVM switches it on.

``kvm-2019`` has it on from the creation of a vCPU where the processor has it; later series switch it on with the
pointer to the table, when sub-page protection is enabled.
"""

from engine.arch import controls as ctl
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine, read_word, write_word
from engine.kvm import sppt_roots
from engine.state.config import VmConfig
from engine.state.profiles import kvm_version


def at_creation(config: VmConfig) -> int:
    """What of the secondary controls a new vCPU has on for its sake."""
    from_birth = kvm_version(config.profile).subpages.control_from_birth
    return int(ctl.SECONDARY_SPP) if config.host.supports_spp and from_birth else 0


def enable(m: Machine, vcpu: int) -> None:
    """Load SPPTP into a vCPU, and switch the control on where it was not."""
    sppt_roots.load_root(m, vcpu)
    frame = FIRST_VCPU_FRAME + vcpu
    write_word(m, frame, ctl.V_SECONDARY, int(read_word(m, frame, ctl.V_SECONDARY)) | ctl.SECONDARY_SPP)
