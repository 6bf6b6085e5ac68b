"""The binary KVM ABI of a machine: an ioctl's bytes in, one operation of the machine, bytes and errno out.

A module that answers ioctls has ``ROWS`` and is named in ``_MODULES`` here; its capabilities go
to the tables in ``ioctls.capabilities``.
"""

from engine.abi import VM, Call
from engine.ioctls import (
    capabilities,
    cpuid,
    dirty_log,
    mmu_pages,
    mp_state,
    msrs,
    nested_state,
    registers,
    run,
    spp_enabling,
    subpages,
    system,
    user_memory_region,
    vcpu_areas,
    vcpus,
    vm_settings,
)
from engine.ioctls.registers import registers_of
from engine.ioctls.registry import Ioctl, Registry, Target
from engine.ioctls.spp_enabling import CAP_X86_SPP
from engine.ioctls.system import NewMachine
from engine.ioctls.vcpus import as_created
from engine.machine import VirtualMachine

_MODULES = (
    system,
    capabilities,
    user_memory_region,
    mmu_pages,
    dirty_log,
    spp_enabling,
    subpages,
    vcpus,
    registers,
    mp_state,
    vcpu_areas,
    run,
    cpuid,
    msrs,
    nested_state,
    vm_settings,
)
IOCTLS = Registry(row for module in _MODULES for row in module.ROWS)


def check_vm_extension(machine: VirtualMachine, capability: int) -> int:
    """What KVM_CHECK_EXTENSION says of a capability of a VM."""
    target = Target(machine.config.profile, machine.config.host, machine)
    return IOCTLS.perform(target, Call("KVM_CHECK_EXTENSION", VM, arg=capability)).returns


__all__ = [
    "CAP_X86_SPP",
    "IOCTLS",
    "Ioctl",
    "NewMachine",
    "Registry",
    "Target",
    "as_created",
    "check_vm_extension",
    "registers_of",
]
