"""The binary KVM ABI of a machine: an ioctl's bytes in, one operation of the machine, bytes and errno out.

A package that answers ioctls writes a module with ``ROWS`` and names it in ``IOCTLS`` here; its capabilities go to
the tables in ``ioctls.capabilities``.
"""

from engine.ioctls import capabilities, system
from engine.ioctls.registry import Ioctl, Registry, Target
from engine.ioctls.system import NewMachine

IOCTLS = Registry((*system.ROWS, *capabilities.ROWS))

__all__ = ["IOCTLS", "Ioctl", "NewMachine", "Registry", "Target"]
