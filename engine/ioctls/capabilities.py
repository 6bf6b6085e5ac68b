"""KVM_CHECK_EXTENSION and KVM_ENABLE_CAP: which package answers for which capability.

A package that owns capabilities adds its table to ``CHECKED`` or ``ENABLED``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.abi import SYSTEM, VCPU, VM, Call, Reply, failed
from engine.ioctls import (
    cpuid,
    hyperv_capabilities,
    memory_capabilities,
    mmu_pages,
    mp_state,
    msrs,
    nested_state,
    registers,
    spp_enabling,
    vcpu_areas,
    vcpus,
    vm_settings,
)
from engine.ioctls.registry import EnableCap, Ioctl, Target

# Capability number to what KVM_CHECK_EXTENSION says; a number that none of them has is 0.
Checked = Mapping[int, Callable[[Target], int]]
CHECKED: tuple[Checked, ...] = (
    memory_capabilities.CHECKED,
    spp_enabling.CHECKED,
    vcpus.CHECKED,
    registers.CHECKED,
    mp_state.CHECKED,
    vcpu_areas.CHECKED,
    mmu_pages.CHECKED,
    cpuid.CHECKED,
    msrs.CHECKED,
    nested_state.CHECKED,
    hyperv_capabilities.CHECKED,
    vm_settings.CHECKED,
)

# Level and number to what KVM_ENABLE_CAP does.
Enabled = Mapping[tuple[str, int], Callable[[Target, EnableCap], Reply]]
ENABLED: tuple[Enabled, ...] = (
    spp_enabling.ENABLED,
    nested_state.ENABLED,
    hyperv_capabilities.ENABLED,
    vm_settings.ENABLED,
)


def check_extension(target: Target, call: Call) -> Reply:
    """KVM_CHECK_EXTENSION: an unknown capability is 0, never an error."""
    for table in CHECKED:
        answer = table.get(call.arg)
        if answer is not None:
            return Reply(answer(target))
    return Reply(0)


def enable_cap(target: Target, call: Call) -> Reply:
    """KVM_ENABLE_CAP: EFAULT for what cannot be read, EINVAL for any flag and for a capability nobody has."""
    raw = call.user.copy_from(0, EnableCap.SIZE)
    if raw is None:
        return failed("EFAULT")
    wanted = EnableCap.unpack(raw, call)
    if wanted.flags:
        return failed("EINVAL")
    for table in ENABLED:
        enable = table.get((call.level, wanted.number))
        if enable is not None:
            return enable(target, wanted)
    return failed("EINVAL")


ROWS = (
    Ioctl("KVM_CHECK_EXTENSION", SYSTEM, check_extension, changes=False),
    Ioctl("KVM_CHECK_EXTENSION", VM, check_extension, changes=False),
    Ioctl("KVM_ENABLE_CAP", VM, enable_cap),
    Ioctl("KVM_ENABLE_CAP", VCPU, enable_cap),
)
