"""The binary KVM ABI of a machine: an ioctl's bytes in, one operation of the machine, bytes and errno out.

A package that answers ioctls writes a module with ``ROWS`` and names it in ``IOCTLS`` here; its capabilities go to
the tables in ``ioctls.capabilities``.
"""

from engine.abi import VM, Call
from engine.ioctls import capabilities, memory_slots, nested_state, subpages, system
from engine.ioctls.nested_state import as_created
from engine.ioctls.registry import Ioctl, Registry, Target
from engine.ioctls.spp_capability import CAP_X86_SPP
from engine.ioctls.system import NewMachine
from engine.machine import VirtualMachine

IOCTLS = Registry((*system.ROWS, *capabilities.ROWS, *memory_slots.ROWS, *subpages.ROWS, *nested_state.ROWS))


def check_vm_extension(machine: VirtualMachine, capability: int) -> int:
    """What KVM_CHECK_EXTENSION says of a capability of a VM."""
    target = Target(machine.config.profile, machine.config.host, machine)
    return IOCTLS.perform(target, Call("KVM_CHECK_EXTENSION", VM, arg=capability)).returns


__all__ = ["CAP_X86_SPP", "IOCTLS", "Ioctl", "NewMachine", "Registry", "Target", "as_created", "check_vm_extension"]
