"""One ioctl and its answer.

There are three levels: the system device, a VM and a vCPU. An ioctl that is known but made at another level gets what
the kernel's dispatch gives there: EINVAL from the system device and from a vCPU, ENOTTY from a VM.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.abi.user_memory import UserBuffer, UserMemory

SYSTEM, VM, VCPU = "system", "vm", "vcpu"
LEVELS = (SYSTEM, VM, VCPU)

_WRONG_LEVEL = {SYSTEM: "EINVAL", VM: "ENOTTY", VCPU: "EINVAL"}


@dataclass
class Call:
    """One ioctl. ``user`` is what the argument points to, ``arg`` a scalar argument, ``memory`` what pointers reach.

    A handler leaves ``user`` and ``memory`` as the kernel would leave them.
    """

    name: str
    level: str
    user: UserBuffer = field(default_factory=lambda: UserBuffer(None))
    arg: int = 0
    memory: UserMemory = field(default_factory=UserMemory)


@dataclass(frozen=True)
class Reply:
    """What ioctl(2) returns, and errno by name. ``decided_by`` names the deciding check where there is one."""

    returns: int
    errno: str | None = None
    decided_by: str | None = None


def failed(errno: str) -> Reply:
    """The answer of a call that fails."""
    return Reply(-1, errno)


def wrong_level(level: str) -> Reply:
    """The answer of a level's dispatch to an ioctl that it does not have."""
    return failed(_WRONG_LEVEL[level])
