"""The shape of a binary KVM call: what the caller's memory is, what an ioctl is given and what it answers.

Nothing here knows a machine. Rooms that answer ioctls share it, so that bytes are copied in and out in one place.
"""

from engine.abi.call import LEVELS, SYSTEM, VCPU, VM, Call, Reply, failed, wrong_level
from engine.abi.user_memory import UserBuffer, UserMemory

__all__ = ["LEVELS", "SYSTEM", "VCPU", "VM", "Call", "Reply", "UserBuffer", "UserMemory", "failed", "wrong_level"]
