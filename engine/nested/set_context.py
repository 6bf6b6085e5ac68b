"""What the steps of KVM_SET_NESTED_STATE look at."""

from __future__ import annotations

from engine.abi import UserBuffer
from engine.arch import kvm_nested_state as abi
from engine.arch import vmx_msrs as vmx
from engine.arch.vmcs12 import get
from engine.kvm.memory_views import GuestMemory
from engine.nested.verdict import CheckReport
from engine.vcpu.registers import active_secondary
from engine.vcpu.vcpu import Vcpu


class SetContext:
    """One call: the vCPU, guest memory, the caller's buffer and, after G1, the header.

    ``blamed`` is the part of V21 or SVM that decided, if parts were asked for.
    """

    def __init__(self, vcpu: Vcpu, memory: GuestMemory, user: UserBuffer, explain: bool) -> None:
        self.parts: list[CheckReport] | None = [] if explain else None
        self.blamed: CheckReport | None = None
        self.vcpu = vcpu
        self.memory = memory
        self.user = user
        self.header = bytes(abi.HEADER_SIZE)

    @property
    def flags(self) -> int:
        """kvm_nested_state.flags."""
        return abi.COMMON.get(self.header, "flags")

    @property
    def format(self) -> int:
        """kvm_nested_state.format."""
        return abi.COMMON.get(self.header, "format")

    @property
    def size(self) -> int:
        """kvm_nested_state.size: what the caller claims."""
        return abi.COMMON.get(self.header, "size")

    def vmx(self, name: str) -> int:
        """A field of hdr.vmx."""
        return abi.VMX_HEADER.get(self.header[abi.COMMON.size :], name)

    @property
    def vmxon_pa(self) -> int:
        """hdr.vmx.vmxon_pa."""
        return self.vmx("vmxon_pa")

    @property
    def vmcs12_pa(self) -> int:
        """hdr.vmx.vmcs12_pa."""
        return self.vmx("vmcs12_pa")

    @property
    def smm_flags(self) -> int:
        """hdr.vmx.smm.flags."""
        return self.vmx("smm_flags")

    @property
    def shadow_in_use(self) -> bool:
        """vmcs12 has VMCS shadowing active and a link pointer."""
        page = self.vcpu.vmx.vmcs12
        shadowing = active_secondary(page) & vmx.SEC_SHADOW_VMCS
        return bool(shadowing) and get(page, "vmcs_link_pointer") != abi.NO_ADDRESS
