"""Which ioctls there are, at which level, in which kernels, and who answers them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from engine.abi import LEVELS, Call, Reply, UserMemory, failed, wrong_level
from engine.errors import Busy, EngineError
from engine.machine import VirtualMachine
from engine.state.config import HostConfig
from engine.state.profiles import PROFILES, ProfileName


@dataclass(frozen=True)
class Target:
    """Whom a call is made to: a kernel on a host, and at the other levels a machine, and a vCPU by its KVM id."""

    profile: str
    host: HostConfig
    machine: VirtualMachine | None = None
    vcpu: int | None = None

    @property
    def vm(self) -> VirtualMachine:
        """The machine of a call at the VM or vCPU level."""
        assert self.machine is not None, "a call at this level has a machine"
        return self.machine

    @property
    def vcpu_id(self) -> int:
        """The vCPU of a call at the vCPU level."""
        assert self.vcpu is not None, "a call at this level has a vCPU"
        return self.vcpu


@dataclass(frozen=True)
class EnableCap:
    """struct kvm_enable_cap, 104 bytes: cap u32 at 0, flags u32 at 4, args u64[4] at 8.

    ``memory`` is what pointers in ``args`` reach.
    """

    SIZE: ClassVar[int] = 104

    number: int
    flags: int
    args: tuple[int, ...]
    memory: UserMemory

    @classmethod
    def unpack(cls, raw: bytes, call: Call) -> EnableCap:
        """The structure that a call's argument points to."""
        number, flags, *args = struct.unpack_from("<2I4Q", raw)
        return cls(number, flags, tuple(args), call.memory)


Handler = Callable[[Target, Call], Reply]


def offered(_: Target) -> int:
    """What KVM_CHECK_EXTENSION says of a capability that is there in every profile."""
    return 1


@dataclass(frozen=True)
class Ioctl:
    """One ioctl at one level.

    ``changes`` says whether it may change the machine, and so needs its writer; ``allocates`` that it makes a counted
    allocation (``machine.fault_injection``) without changing anything else. A kernel that is not of ``profiles`` does
    not know the ioctl, and answers as for one of another level.
    """

    name: str
    level: str
    handler: Handler
    changes: bool = True
    allocates: bool = False
    profiles: tuple[ProfileName, ...] = PROFILES


class Registry:
    """All ioctls, by level and name. Raises ValueError when two rows claim the same place."""

    def __init__(self, rows: Iterable[Ioctl]) -> None:
        table: dict[tuple[str, str], Ioctl] = {}
        for row in rows:
            if row.level not in LEVELS or (row.level, row.name) in table:
                raise ValueError(f"{row.name} at level {row.level}: no such level, or answered twice")
            table[row.level, row.name] = row
        self.table: Mapping[tuple[str, str], Ioctl] = MappingProxyType(table)
        self.names = frozenset(name for _, name in table)

    def changes(self, machine: VirtualMachine, level: str, name: str) -> bool:
        """Whether a call may change the machine."""
        row = self.table.get((level, name))
        return row is not None and (row.changes or (row.allocates and machine.allocations.failing is not None))

    def perform(self, target: Target, call: Call) -> Reply:
        """Make a call that ``names`` knows; ``call`` and the machine are left as the kernel would leave them.

        What the machine refuses becomes errno, save Busy, which is not about the call.
        """
        row = self.table.get((call.level, call.name))
        if row is None or target.profile not in row.profiles:
            return wrong_level(call.level)
        try:
            return row.handler(target, call)
        except Busy:
            raise
        except EngineError as error:
            return failed(error.errno)
