"""KVM_CAP_X86_SPP, the capability of the later series: its number is that of the last one posted (kvm-spp 1.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.abi import VM, Reply, failed
from engine.ioctls.registry import EnableCap, Target
from engine.state.kvm_versions import kvm_version

CAP_X86_SPP = 182


def enable(target: Target) -> Reply:
    """Switch sub-page protection on, as KVM_INIT_SPP and KVM_ENABLE_CAP both do."""
    target.vm.enable_spp()
    return Reply(0)


def _pages(target: Target) -> int:
    """Pages in one call, whether or not the host has the feature."""
    return kvm_version(target.profile).subpages.check_extension


def _enable(target: Target, _: EnableCap) -> Reply:
    return enable(target) if kvm_version(target.profile).subpages.capability == CAP_X86_SPP else failed("EINVAL")


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType({CAP_X86_SPP: _pages})
ENABLED: Mapping[tuple[str, int], Callable[[Target, EnableCap], Reply]] = MappingProxyType({(VM, CAP_X86_SPP): _enable})
