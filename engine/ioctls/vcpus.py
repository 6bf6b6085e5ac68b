"""KVM_CREATE_VCPU (virt/kvm/kvm_main.c) and KVM_CREATE_IRQCHIP, which comes before it.

A machine made by KVM_CREATE_VM begins without vCPUs and has room for some; one made over REST has all it will have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.abi import SYSTEM, VM, Call, Reply, failed
from engine.arch.kvm_vcpu_structs import VCPU_MMAP_SIZE
from engine.ioctls.registry import Ioctl, Target, offered
from engine.machine import VirtualMachine

CAP_IRQCHIP = 0
FIRST_DESCRIPTOR = 4


def get_mmap_size(_: Target, call: Call) -> Reply:
    """KVM_GET_VCPU_MMAP_SIZE: bytes that a vCPU shares with user space."""
    return failed("EINVAL") if call.arg else Reply(VCPU_MMAP_SIZE)


def create_irqchip(target: Target, _: Call) -> Reply:
    """KVM_CREATE_IRQCHIP: vCPUs will have local APICs in the kernel. EEXIST for a second, EINVAL after a vCPU."""
    if target.vm.nested.lapic_in_kernel:
        return failed("EEXIST")
    if target.vm.config.vcpus:
        return failed("EINVAL")
    target.vm.nested.set_lapic_in_kernel(True)
    return Reply(0)


def create_vcpu(target: Target, call: Call) -> Reply:
    """The id is the argument. Answers with a descriptor; EINVAL for an id too high or no room, EEXIST for one taken."""
    vcpu, chosen = call.arg & 0xFFFF_FFFF, target.vm.nested.settings.vcpu_ids
    if chosen and vcpu >= chosen:
        return failed("EINVAL")
    target.vm.create_vcpu(vcpu)
    return Reply(FIRST_DESCRIPTOR + len(target.vm.config.vcpus) - 1)


def as_created(machine: VirtualMachine) -> None:
    """Make a fresh machine what KVM_CREATE_VM makes: without interrupt controller."""
    machine.nested.set_lapic_in_kernel(False)


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType({CAP_IRQCHIP: offered})

ROWS = (
    Ioctl("KVM_GET_VCPU_MMAP_SIZE", SYSTEM, get_mmap_size, changes=False),
    Ioctl("KVM_CREATE_IRQCHIP", VM, create_irqchip),
    Ioctl("KVM_CREATE_VCPU", VM, create_vcpu),
)
