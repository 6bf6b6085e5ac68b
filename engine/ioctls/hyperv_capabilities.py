"""Capabilities of the TLB flush: the calls, direct flush for guests of a KVM on Hyper-V, CPUID checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.abi import VCPU, Reply, failed
from engine.errors import EngineError
from engine.ioctls.registry import EnableCap, Target, offered
from engine.machine.hyperv import CAP_ENFORCE_CPUID
from engine.machine.hyperv_vps import hyperv_host
from engine.state.config import VmConfig
from engine.state.profiles import kvm_version

CAP_HYPERV_TLBFLUSH = 155
CAP_HYPERV_DIRECT_TLBFLUSH = 175


def _direct_flush(target: Target) -> int:
    host = hyperv_host(VmConfig(profile=target.profile, host=target.host))
    return int(host is not None and host.direct_flush)


def _enable_direct_flush(target: Target, _: EnableCap) -> Reply:
    """Its arguments are not looked at."""
    try:
        target.vm.hyperv.enable_direct_flush(target.vcpu_id)
    except EngineError as error:
        return failed(error.errno)
    return Reply(0)


def _enforces(target: Target) -> int:
    return int(kvm_version(target.profile).hyperv.enforces_cpuid)


def _enforce_cpuid(target: Target, wanted: EnableCap) -> Reply:
    target.vm.hyperv.enforce_cpuid(target.vcpu_id, bool(wanted.args[0]))
    return Reply(0)


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType(
    {
        CAP_HYPERV_TLBFLUSH: offered,
        CAP_HYPERV_DIRECT_TLBFLUSH: _direct_flush,
        CAP_ENFORCE_CPUID: _enforces,
    }
)
ENABLED: Mapping[tuple[str, int], Callable[[Target, EnableCap], Reply]] = MappingProxyType(
    {(VCPU, CAP_HYPERV_DIRECT_TLBFLUSH): _enable_direct_flush, (VCPU, CAP_ENFORCE_CPUID): _enforce_cpuid}
)
