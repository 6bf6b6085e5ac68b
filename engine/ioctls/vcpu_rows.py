"""Rows of the ioctls that are answered from the state of one vCPU, and the host that calls at other levels ask about.

A handler takes the whole vCPU, guest memory and the call, and leaves the vCPU and the memory as the kernel would.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.abi import VCPU, Call, Reply, failed
from engine.ioctls.registry import Ioctl, Target
from engine.kvm.memory_views import GuestMemory
from engine.machine.nested_states import vcpu_host
from engine.state.config import VmConfig
from engine.vcpu.vcpu import Vcpu, VcpuHost

Handler = Callable[[Vcpu, GuestMemory, Call], Reply]


def reading(name: str, handler: Handler) -> Ioctl:
    """An ioctl that leaves the vCPU as it is."""

    def perform(target: Target, call: Call) -> Reply:
        return handler(*target.vm.nested.read(target.vcpu_id), call)

    return Ioctl(name, VCPU, perform, changes=False)


def changing(name: str, handler: Handler) -> Ioctl:
    """An ioctl that may change the vCPU; what it has done stays done, also where its answer is an errno."""

    def perform(target: Target, call: Call) -> Reply:
        with target.vm.nested.change(target.vcpu_id) as (vcpu, memory):
            return handler(vcpu, memory, call)

    return Ioctl(name, VCPU, perform)


Get = Callable[[Vcpu], bytes]
Put = Callable[[Vcpu, GuestMemory, bytes], str | None]
Refusal = Callable[[Vcpu], str | None]


def _never(_: Vcpu) -> None:
    return None


def getting(name: str, get: Get, refusal: Refusal = _never) -> Ioctl:
    """KVM_GET of a structure; ``refusal`` is the errno of a vCPU that has none."""

    def copy_out(vcpu: Vcpu, _: GuestMemory, call: Call) -> Reply:
        errno = refusal(vcpu)
        if errno is not None:
            return failed(errno)
        return Reply(0) if call.user.copy_to(0, get(vcpu)) else failed("EFAULT")

    return reading(f"KVM_GET_{name}", copy_out)


def setting(name: str, size: int, put: Put, refusal: Refusal = _never) -> Ioctl:
    """KVM_SET of a structure of ``size`` bytes."""

    def copy_in(vcpu: Vcpu, memory: GuestMemory, call: Call) -> Reply:
        errno = refusal(vcpu)
        if errno is not None:
            return failed(errno)
        raw = call.user.copy_from(0, size)
        return done("EFAULT" if raw is None else put(vcpu, memory, raw))

    return changing(f"KVM_SET_{name}", copy_in)


def host_of(target: Target) -> VcpuHost:
    """The host that a call at the system or VM level asks about."""
    if target.machine is not None:
        return target.machine.nested.host()
    return vcpu_host(VmConfig(profile=target.profile, host=target.host), spp_active=False)


def done(errno: str | None) -> Reply:
    """0, or the errno."""
    return Reply(0) if errno is None else failed(errno)
