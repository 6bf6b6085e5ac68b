"""The ioctls of ``engine.nested``: nested state, CPUID, MSRs, registers and events of a vCPU; their capabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine import nested
from engine.abi import SYSTEM, VCPU, VM, Call, Reply, failed
from engine.ioctls.registry import EnableCap, Ioctl, Target
from engine.machine import VirtualMachine
from engine.machine.nested_states import nested_host
from engine.nested.ioctls import (
    CAP_HYPERV_CPUID,
    CAP_HYPERV_ENLIGHTENED_VMCS,
    CAP_NESTED_STATE,
    CAP_SYS_HYPERV_CPUID,
    HANDLERS,
    READING,
)
from engine.state.config import VmConfig

CAP_IRQCHIP = 0
CAP_EXT_CPUID = 7
CAP_MP_STATE = 14
CAP_VCPU_EVENTS = 41
CAP_GET_MSR_FEATURES = 153


def _host(target: Target) -> nested.NestedHost:
    if target.machine is not None:
        return target.machine.nested.host()
    return nested_host(VmConfig(profile=target.profile, host=target.host), spp_active=False)


def _perform(target: Target, call: Call) -> Reply:
    own = nested.Call(call.name, call.level, call.user, call.arg, call.memory)
    if call.level == VCPU:
        return target.vm.nested.ioctl(own, target.vcpu)
    own.host, own.profile = _host(target), target.profile
    return nested.ioctl(own)


def _checked(capability: int) -> Callable[[Target], int]:
    return lambda target: nested.check_extension(_host(target), target.profile, capability) or 0


def _enable_evmcs(target: Target, wanted: EnableCap) -> Reply:
    assert target.vcpu is not None, "a call at this level has a vCPU"
    with target.vm.nested.change(target.vcpu) as (vcpu, _):
        return nested.enable_cap(vcpu, wanted.raw, wanted.memory) or failed("EINVAL")


def create_irqchip(target: Target, _: Call) -> Reply:
    """KVM_CREATE_IRQCHIP: vCPUs will have local APICs in the kernel. EEXIST for a second, EINVAL after a vCPU."""
    if target.vm.nested.lapic_in_kernel:
        return failed("EEXIST")
    if target.vm.config.vcpus:
        return failed("EINVAL")
    target.vm.nested.set_lapic_in_kernel(True)
    return Reply(0)


def as_created(machine: VirtualMachine) -> None:
    """Make a fresh machine what KVM_CREATE_VM makes: without interrupt controller."""
    machine.nested.set_lapic_in_kernel(False)


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType(
    {
        **{
            capability: _checked(capability)
            for capability in (CAP_NESTED_STATE, CAP_HYPERV_ENLIGHTENED_VMCS, CAP_HYPERV_CPUID, CAP_SYS_HYPERV_CPUID)
        },
        **{
            capability: lambda _: 1
            for capability in (CAP_IRQCHIP, CAP_EXT_CPUID, CAP_MP_STATE, CAP_VCPU_EVENTS, CAP_GET_MSR_FEATURES)
        },
    }
)
ENABLED: Mapping[tuple[str, int], Callable[[Target, EnableCap], Reply]] = MappingProxyType(
    {(VCPU, CAP_HYPERV_ENLIGHTENED_VMCS): _enable_evmcs}
)

# KVM_CHECK_EXTENSION and KVM_ENABLE_CAP belong to everybody: ``ioctls.capabilities`` asks the tables above.
ROWS = (
    Ioctl("KVM_CREATE_IRQCHIP", VM, create_irqchip),
    *(
        Ioctl(name, level, _perform, changes=level == VCPU and name not in READING)
        for name, level in HANDLERS
        if name not in ("KVM_CHECK_EXTENSION", "KVM_ENABLE_CAP")
    ),
)
assert all(row.level != SYSTEM or not row.changes for row in ROWS)
