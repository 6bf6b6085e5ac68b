"""What switches sub-page protection on: KVM_INIT_SPP in 2019, later KVM_ENABLE_CAP of KVM_CAP_X86_SPP (kvm-spp 2.1).

The capability's number is that of the last series posted (kvm-spp 1.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.abi import VM, Call, Reply, failed
from engine.ioctls.registry import EnableCap, Ioctl, Target
from engine.state.profiles import ONLY_2019, kvm_version

CAP_X86_SPP = 182


def init_spp(target: Target, _: Call) -> Reply:
    """KVM_INIT_SPP; the argument is ignored."""
    return _switch_on(target)


def _switch_on(target: Target) -> Reply:
    """As KVM_INIT_SPP and KVM_ENABLE_CAP both do."""
    target.vm.enable_spp()
    return Reply(0)


def _pages(target: Target) -> int:
    """Pages in one call, whether or not the host has the feature."""
    return kvm_version(target.profile).subpages.check_extension


def _enable(target: Target, _: EnableCap) -> Reply:
    return _switch_on(target) if kvm_version(target.profile).subpages.capability == CAP_X86_SPP else failed("EINVAL")


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType({CAP_X86_SPP: _pages})
ENABLED: Mapping[tuple[str, int], Callable[[Target, EnableCap], Reply]] = MappingProxyType({(VM, CAP_X86_SPP): _enable})
ROWS = (Ioctl("KVM_INIT_SPP", VM, init_spp, profiles=ONLY_2019),)
