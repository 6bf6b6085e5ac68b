"""KVM_CREATE_VCPU (virt/kvm/kvm_main.c).

A machine made by KVM_CREATE_VM begins without vCPUs and has room for some; one made over REST has all it will have.
"""

from __future__ import annotations

from engine.abi import VM, Call, Reply
from engine.ioctls.registry import Ioctl, Target

FIRST_DESCRIPTOR = 4


def create_vcpu(target: Target, call: Call) -> Reply:
    """The id is the argument. Answers with a descriptor; EINVAL for an id too high or no room, EEXIST for one taken."""
    vcpu = call.arg & 0xFFFF_FFFF
    target.vm.create_vcpu(vcpu)
    target.vm.nested.reset(vcpu)
    return Reply(FIRST_DESCRIPTOR + len(target.vm.config.vcpus) - 1)


ROWS = (Ioctl("KVM_CREATE_VCPU", VM, create_vcpu),)
