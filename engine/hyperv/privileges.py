"""What a partition may do, by the CPUID of the caller's VP and the guest OS id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.arch import hypercall as hv
from engine.arch import hyperv_cpuid as leaves
from engine.arch.hyperv_cpuid import CpuidEntry, find_leaf


@dataclass(frozen=True)
class Privileges:
    """Words of the Hyper-V leaves, 0 where a leaf is absent.

    ``enforced`` is KVM_CAP_HYPERV_ENFORCE_CPUID on this vCPU; without it KVM looks at none of them.
    """

    hyperv: bool = False
    os_id: int = 0
    enforced: bool = False
    features_eax: int = 0
    features_edx: int = 0
    recommendations: int = 0
    nested_eax: int = 0

    @classmethod
    def of(cls, cpuid: Iterable[CpuidEntry], os_id: int, *, enforced: bool = False) -> Privileges:
        """What a CPUID says."""
        entries = tuple(cpuid)
        none = CpuidEntry(0)
        interface = find_leaf(entries, leaves.LEAF_INTERFACE) or none
        features = find_leaf(entries, leaves.LEAF_FEATURES) or none
        return cls(
            hyperv=interface.eax == leaves.INTERFACE_SIGNATURE,
            os_id=os_id,
            enforced=enforced,
            features_eax=features.eax,
            features_edx=features.edx,
            recommendations=(find_leaf(entries, leaves.LEAF_RECOMMENDATIONS) or none).eax,
            nested_eax=(find_leaf(entries, leaves.LEAF_NESTED) or none).eax,
        )

    @property
    def enabled(self) -> bool:
        """Hypercalls are Hyper-V's: the interface is there and the guest has said who it is."""
        return self.hyperv and self.os_id != 0

    @property
    def xmm_input(self) -> bool:
        """XMM registers may carry input."""
        return bool(self.features_edx & leaves.FEATURES_EDX_XMM_INPUT)

    @property
    def extended_ranges(self) -> bool:
        """Lists may hold ranges of large pages."""
        return bool(self.features_edx & leaves.FEATURES_EDX_EXTENDED_RANGES)

    @property
    def nested(self) -> bool:
        """This partition runs on a hypervisor that is itself nested in Hyper-V."""
        return bool(self.recommendations & leaves.RECOMMEND_NESTED)

    def kvm_allows(self, code: int) -> bool:
        """The access check of KVM: remote flush, and for sparse sets their bit as well."""
        if not self.enforced or code not in hv.VIRTUAL_CALLS:
            return True
        needed = leaves.RECOMMEND_REMOTE_FLUSH
        if hv.CALLS[code].sparse:
            needed |= leaves.RECOMMEND_EX_PROCESSOR_MASKS
        return self.recommendations & needed == needed

    def tlfs_allows(self, code: int) -> bool:
        """The same by the specification: a call needs to be one of those that CPUID recommends.

        For the calls with sparse sets the specification names no privilege; their recommendation is taken for one.
        """
        if code not in hv.VIRTUAL_CALLS:
            return True
        flush = self.recommendations & (leaves.RECOMMEND_LOCAL_FLUSH | leaves.RECOMMEND_REMOTE_FLUSH)
        if hv.CALLS[code].sparse:
            return bool(self.recommendations & leaves.RECOMMEND_EX_PROCESSOR_MASKS)
        return bool(flush)
