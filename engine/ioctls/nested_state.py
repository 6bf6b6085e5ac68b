"""KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE, and the capabilities of nesting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.abi import VCPU, Call, Reply, failed
from engine.ioctls.registry import EnableCap, Target
from engine.ioctls.vcpu_rows import changing, host_of
from engine.kvm.memory_views import GuestMemory
from engine.nested.enlightened import CAP_HYPERV_ENLIGHTENED_VMCS, offers_evmcs
from engine.nested.get_state import get_nested_state, max_state_size
from engine.nested.set_state import set_nested_state
from engine.vcpu.vcpu import Vcpu

CAP_NESTED_STATE = 157


def set_state(vcpu: Vcpu, memory: GuestMemory, call: Call) -> Reply:
    """KVM_SET_NESTED_STATE; the answer names the deciding check."""
    result = set_nested_state(vcpu, memory, call.user)
    return Reply(result.returns, result.errno, result.label)


def get_state(vcpu: Vcpu, memory: GuestMemory, call: Call) -> Reply:
    """KVM_GET_NESTED_STATE; it refreshes the cached vmcs12, and so changes the vCPU."""
    result = get_nested_state(vcpu, memory, call.user)
    return Reply(result.returns, result.errno)


def _enable_evmcs(target: Target, wanted: EnableCap) -> Reply:
    """It is enabled before its version is copied out: EFAULT does not take that back."""
    version = target.vm.nested.enable_evmcs(target.vcpu_id)
    return Reply(0) if wanted.memory.write(wanted.args[0], version.to_bytes(2, "little")) else failed("EFAULT")


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType(
    {
        CAP_NESTED_STATE: lambda target: max_state_size(Vcpu(profile=target.profile, host=host_of(target))),
        CAP_HYPERV_ENLIGHTENED_VMCS: lambda target: int(offers_evmcs(host_of(target), target.profile)),
    }
)
ENABLED: Mapping[tuple[str, int], Callable[[Target, EnableCap], Reply]] = MappingProxyType(
    {(VCPU, CAP_HYPERV_ENLIGHTENED_VMCS): _enable_evmcs}
)

ROWS = (changing("KVM_SET_NESTED_STATE", set_state), changing("KVM_GET_NESTED_STATE", get_state))
