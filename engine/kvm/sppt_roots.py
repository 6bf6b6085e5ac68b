"""The roots of KVM's SPPTs: one for the VM, or in 2019 one for each vCPU, made when SPP is enabled (kvm-spp 1.1, 2.1).

They live as long as the machine, and every vCPU has one loaded from then on, those that come later too.
"""

from engine.arch import controls as ctl
from engine.cpu.frames import (
    CAP_SPPT_TREES,
    FIRST_VCPU_FRAME,
    SPPT,
    STATE_FRAME,
    Machine,
    address_of,
    new_frame,
    read_word,
    write_word,
)
from engine.jit import kernel
from engine.kvm import state_frame as reg
from engine.kvm.state_frame import SPPT_TREES


@kernel
def trees(m):
    """How many SPPTs there are."""
    return read_word(m, STATE_FRAME, SPPT_TREES)


@kernel
def tree_of(m, vcpu):
    """The SPPT of a vCPU."""
    return vcpu if trees(m) > 1 else 0


@kernel
def root_frame(m, tree):
    """Frame of the root of a tree: it is in the record of its first vCPU."""
    return read_word(m, FIRST_VCPU_FRAME + tree, ctl.V_SPPT_ROOT)


@kernel
def make_roots(m):
    """Empty roots, one for each vCPU or one for the VM: whoever walks, walks a table from now on."""
    for tree in range(m.caps[CAP_SPPT_TREES]):
        write_word(m, FIRST_VCPU_FRAME + tree, ctl.V_SPPT_ROOT, new_frame(m, SPPT))
    write_word(m, STATE_FRAME, SPPT_TREES, m.caps[CAP_SPPT_TREES])


def load_root(m: Machine, vcpu: int) -> None:
    """Load SPPTP into a vCPU."""
    write_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_SPPTP, address_of(m, root_frame(m, tree_of(m, vcpu))))


@kernel
def is_root(m, frame):
    """Whether a frame is the root of a tree."""
    tree = 0
    while tree < trees(m) and root_frame(m, tree) != frame:
        tree += 1
    return tree < trees(m)


@kernel
def enable(m):
    """KVM_INIT_SPP: every page starts with full access. Returns whether it was off before."""
    if read_word(m, STATE_FRAME, reg.SPP_ACTIVE):
        return False
    make_roots(m)
    write_word(m, STATE_FRAME, reg.SPP_ACTIVE, 1)
    return True
