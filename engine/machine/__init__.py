"""VirtualMachine and its groups of operations, one file a group. The rules are in the packages below."""

from engine.machine.subpage_operations import SubpageRange
from engine.machine.virtual_machine import FRAME_BYTES, VirtualMachine

__all__ = ["FRAME_BYTES", "SubpageRange", "VirtualMachine"]
