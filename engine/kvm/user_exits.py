"""What KVM_RUN tells user space about an access that it did not finish (kvm-spp 1.2, 3.6)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch import exits
from engine.kvm import resolutions as res
from engine.state.profiles import kvm_version

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_MMIO = 6
KVM_EXIT_INTERNAL_ERROR = 17


@dataclass(frozen=True, slots=True)
class UserExit:
    """What KVM_RUN returns with.

    ``spp_addr`` is the faulting GPA of KVM_EXIT_SPP and ``insn_len`` the length of the store's instruction, None where
    the profile has no such member; ``hw_exit_reason`` is that of KVM_EXIT_UNKNOWN. The suberror of
    KVM_EXIT_INTERNAL_ERROR is 3, KVM_INTERNAL_ERROR_DELIVERY_EV. With ``errno`` KVM_RUN itself fails, and the rest of
    struct kvm_run is what it was.
    """

    exit_reason: int
    name: str
    rip_advanced: bool
    spp_addr: int | None = None
    insn_len: int | None = None
    hw_exit_reason: int | None = None
    errno: str | None = None


def user_exit(
    resolution: int,
    reason: int,
    gpa: int,
    profile: str,
    insn_len: int = 0,
    qualification: int = exits.Q_WRITE,
    *,
    spp: bool = True,
) -> UserExit | None:
    """What user space sees of an exit, None when KVM handles it by itself; an ``insn_len`` of 0 is not known.

    Of a violation by a read or a fetch, which only page access asks for, KVM_RUN tells nothing; nor of any where
    sub-page protection is not on (``spp``): who tracks pages is told another way.
    """
    if resolution == res.VIOLATION and not spp:
        return None
    if resolution == res.VIOLATION and reason == exits.EPT_VIOLATION and not qualification & exits.Q_WRITE:
        return None
    if resolution == res.VIOLATION:
        row = kvm_version(profile).subpages
        length = insn_len if row.reports_length else None
        return UserExit(row.exit_spp, "KVM_EXIT_SPP", row.skips_instruction, spp_addr=gpa, insn_len=length)
    if resolution == res.MMIO:
        return UserExit(KVM_EXIT_MMIO, "KVM_EXIT_MMIO", True)
    if resolution == res.INTERNAL_ERROR and reason == exits.EPT_MISCONFIGURATION:
        return UserExit(KVM_EXIT_INTERNAL_ERROR, "KVM_EXIT_INTERNAL_ERROR", False)
    if resolution == res.INTERNAL_ERROR:
        return UserExit(KVM_EXIT_UNKNOWN, "KVM_EXIT_UNKNOWN", False, hw_exit_reason=reason)
    if resolution == res.RUN_FAILED:
        return UserExit(KVM_EXIT_UNKNOWN, "KVM_EXIT_UNKNOWN", False, errno=run_errno(reason))
    return None


def run_errno(reason: int) -> str:
    """Why KVM_RUN fails: an EPT entry that KVM did not make, or an SPPT miss of a page without a slot."""
    return "EINVAL" if reason == exits.EPT_MISCONFIGURATION else "EFAULT"
