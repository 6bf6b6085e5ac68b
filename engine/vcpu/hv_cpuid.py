"""The Hyper-V CPUID leaves that a vCPU, or the system device, supports."""

from __future__ import annotations

from engine.arch.hyperv_cpuid import EVMCS_VERSIONS, CpuidEntry
from engine.state.profiles import kvm_version
from engine.vcpu.vcpu import Vcpu, VcpuHost


def evmcs_version(vcpu: Vcpu) -> int:
    """The version range that this vCPU reports, 0 when it does not have the enlightened VMCS."""
    return EVMCS_VERSIONS if vcpu.evmcs_enabled and vcpu.host.intel and vcpu.host.nested else 0


def supported_hv_cpuid(vcpu: Vcpu) -> list[CpuidEntry]:
    """KVM_GET_SUPPORTED_HV_CPUID on a vCPU: 6 or 7 leaves in 2019, 10 today."""
    return vcpu.kvm.hyperv.leaves(
        evmcs_version(vcpu),
        apic=vcpu.lapic_in_kernel,
        smt_possible=vcpu.host.smt_possible,
        max_vcpus=vcpu.host.max_vcpus,
    )


def system_hv_cpuid(profile: str, host: VcpuHost) -> list[CpuidEntry] | None:
    """The same on the system device, without a vCPU; None in 2019, which has no such ioctl."""
    rows = kvm_version(profile).hyperv
    if not rows.leaves_without_vcpu:
        return None
    version = EVMCS_VERSIONS if host.intel and host.nested else 0
    return rows.leaves(version, apic=True, smt_possible=host.smt_possible, max_vcpus=host.max_vcpus)
