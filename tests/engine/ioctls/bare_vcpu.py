"""An ioctl on a bare vCPU, or about a host: the rows of ``engine.ioctls`` without a machine around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from engine import abi
from engine.abi import Reply
from engine.ioctls import IOCTLS, Target
from engine.machine.nested import NestedOperations
from engine.state.config import HostConfig
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.ram import Ram


@dataclass
class Call(abi.Call):
    """An ioctl, and the vCPU and the guest memory that it meets; without a vCPU the host and the kernel."""

    vcpu: Vcpu | None = None
    host: VcpuHost = field(default_factory=VcpuHost)
    profile: str = "kvm-2019"
    guest: Any = field(default_factory=lambda: Ram(()))


class InPlace(NestedOperations):
    """Operations that read and change one vCPU in place."""

    def __init__(self, vcpu: Vcpu, memory: Any) -> None:
        self.whole = vcpu, memory

    def host(self) -> VcpuHost:
        return self.whole[0].host

    def read(self, vcpu: int) -> tuple[Vcpu, Any]:
        return self.whole

    @contextmanager
    def change(self, vcpu: int) -> Iterator[tuple[Vcpu, Any]]:
        yield self.whole


def ioctl(call: Call) -> Reply:
    """Make the call."""
    vcpu = call.vcpu or Vcpu(profile=call.profile, host=call.host)
    machine: Any = SimpleNamespace(nested=InPlace(vcpu, call.guest))
    return IOCTLS.perform(Target(vcpu.profile, HostConfig(), machine, vcpu.vcpu_id), call)
