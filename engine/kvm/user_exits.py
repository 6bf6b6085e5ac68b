"""What KVM_RUN tells user space about an access that it did not finish (kvm-spp 1.2, 3.6)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.kvm import resolutions as res

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_MMIO = 6

# KVM_EXIT_SPP by profile, and whether the guest's RIP is past the store when user space sees it.
KVM_EXIT_SPP = {"kvm-2019": 28, "kvm-latest": 29}
RIP_ADVANCED = {"kvm-2019": True, "kvm-latest": False}


@dataclass(frozen=True, slots=True)
class UserExit:
    """``spp_addr`` is the faulting GPA of KVM_EXIT_SPP, ``hw_exit_reason`` that of KVM_EXIT_UNKNOWN."""

    exit_reason: int
    name: str
    rip_advanced: bool
    spp_addr: int | None = None
    hw_exit_reason: int | None = None


def user_exit(resolution: int, reason: int, gpa: int, profile: str) -> UserExit | None:
    """What user space sees of an exit, None when KVM handles it by itself."""
    if resolution == res.VIOLATION:
        return UserExit(KVM_EXIT_SPP[profile], "KVM_EXIT_SPP", RIP_ADVANCED[profile], spp_addr=gpa)
    if resolution == res.MMIO:
        return UserExit(KVM_EXIT_MMIO, "KVM_EXIT_MMIO", True)
    if resolution == res.INTERNAL_ERROR:
        return UserExit(KVM_EXIT_UNKNOWN, "KVM_EXIT_UNKNOWN", False, hw_exit_reason=reason)
    return None
