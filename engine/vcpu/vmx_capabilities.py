"""The VMX capability values of one vCPU: what RDMSR shows and what the VM-entry checks use.

Each vCPU has its own copy. User space may lower it through the MSRs; enabling the enlightened VMCS lowers it in 2019
and filters what the guest reads in today's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.arch import vmx_msrs as vmx
from engine.arch.vmx_msrs import MSR_BY_NAME, ControlValue
from engine.errors import InvalidValue
from engine.state.profiles import kvm_version

# MSR number of the "true" register of each control; the secondary controls have only one.
_CONTROL_MSR = {
    MSR_BY_NAME["IA32_VMX_TRUE_PINBASED_CTLS"]: "pin",
    MSR_BY_NAME["IA32_VMX_TRUE_PROCBASED_CTLS"]: "proc",
    MSR_BY_NAME["IA32_VMX_TRUE_EXIT_CTLS"]: "exit",
    MSR_BY_NAME["IA32_VMX_TRUE_ENTRY_CTLS"]: "entry",
    MSR_BY_NAME["IA32_VMX_PROCBASED_CTLS2"]: "secondary",
}
# The older registers are derived from the true ones and cannot be written.
_CLASSIC_MSR = {
    MSR_BY_NAME["IA32_VMX_PINBASED_CTLS"]: "pin",
    MSR_BY_NAME["IA32_VMX_PROCBASED_CTLS"]: "proc",
    MSR_BY_NAME["IA32_VMX_EXIT_CTLS"]: "exit",
    MSR_BY_NAME["IA32_VMX_ENTRY_CTLS"]: "entry",
}
_VALUE_MSR = {
    MSR_BY_NAME["IA32_VMX_BASIC"]: "basic",
    MSR_BY_NAME["IA32_VMX_MISC"]: "misc",
    MSR_BY_NAME["IA32_VMX_CR0_FIXED0"]: "cr0_fixed0",
    MSR_BY_NAME["IA32_VMX_CR0_FIXED1"]: "cr0_fixed1",
    MSR_BY_NAME["IA32_VMX_CR4_FIXED0"]: "cr4_fixed0",
    MSR_BY_NAME["IA32_VMX_VMCS_ENUM"]: "vmcs_enum",
    MSR_BY_NAME["IA32_VMX_EPT_VPID_CAP"]: "ept_vpid",
    MSR_BY_NAME["IA32_VMX_VMFUNC"]: "vmfunc",
}
_NEEDS_EPT = vmx.SEC_EPT | vmx.SEC_PML | vmx.SEC_UNRESTRICTED_GUEST | vmx.SEC_MODE_BASED_EXECUTE
_DERIVED = frozenset({"cr0_fixed1"})
CR4_FIXED1 = MSR_BY_NAME["IA32_VMX_CR4_FIXED1"]

# IA32_VMX_BASIC: features and reserved bits that must not be added; bits 55 and 54 and 49 are features.
_BASIC_SUBSET = 1 << 31 | 0xFF << 56 | 0b111 << 45 | 1 << 49 | 1 << 54 | 1 << 55
_BASIC_32BIT_ADDRESSES = 1 << 48
# IA32_VMX_MISC: likewise.
_MISC_SUBSET = 1 << 5 | 0b111 << 6 | 0x1F << 9 | 0b11 << 14 | 0b1111 << 28


@dataclass
class VmxCapabilities:
    """``controls``: pin, proc, secondary, exit, entry. ``values``: the other MSRs by the names of VALUES_2019."""

    controls: dict[str, ControlValue] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_host(cls, profile: str, overrides: Mapping[str, int]) -> VmxCapabilities:
        """The host's values: the defaults of ``profile``, some replaced by 64-bit MSR values by MSR name.

        Raises InvalidValue for unknown names and for MSRs that are derived from others.
        """
        rows = kvm_version(profile).vcpu
        capabilities = cls(dict(rows.vmx_controls), dict(rows.vmx_values))
        for name, value in overrides.items():
            where = f"host.vmx_capabilities.{name}"
            if not 0 <= value < 1 << 64:
                raise InvalidValue("must be an unsigned 64-bit integer", field=where, value=value)
            number = MSR_BY_NAME.get(name, -1)
            if number in _CONTROL_MSR:
                capabilities.controls[_CONTROL_MSR[number]] = ControlValue(value & 0xFFFF_FFFF, value >> 32)
            elif number in _VALUE_MSR:
                capabilities.values[_VALUE_MSR[number]] = value
            else:
                known = [msr for msr, at in MSR_BY_NAME.items() if at in _CONTROL_MSR or at in _VALUE_MSR]
                raise InvalidValue(f"must be one of {', '.join(known)}", field=where, value=value)
        return capabilities

    def copy(self) -> VmxCapabilities:
        """An independent copy."""
        return replace(self, controls=dict(self.controls), values=dict(self.values))

    def allows(self, control: str, value: int) -> bool:
        """Every must-be-1 bit of ``control`` is set in ``value`` and none outside may-be-1."""
        must1, may1 = self.controls[control]
        return (value & may1 | must1) == value

    def read(self, number: int) -> int | None:
        """The MSR ``number``; None for one that is not here (CR4_FIXED1 follows the guest CPUID)."""
        if number in _CONTROL_MSR:
            must1, may1 = self.controls[_CONTROL_MSR[number]]
            return must1 | may1 << 32
        if number in _CLASSIC_MSR:
            name = _CLASSIC_MSR[number]
            must1, may1 = self.controls[name]
            return must1 | vmx.CLASSIC_MUST1[name] | may1 << 32
        if number in _VALUE_MSR:
            return self.values[_VALUE_MSR[number]]
        return None

    def write(self, number: int, value: int, limit: VmxCapabilities) -> bool:
        """A host write of the MSR ``number``; False when it is refused. ``limit`` bounds what may be claimed."""
        if number in _CONTROL_MSR:
            return self._write_control(_CONTROL_MSR[number], value, limit)
        name = _VALUE_MSR.get(number)
        if name is None or name in _DERIVED or not _WRITABLE[name](limit, value):
            return False
        self.values[name] = value
        return True

    def filtered_for_evmcs(self, number: int, value: int, perf_global: bool) -> int:
        """What a guest that sees the enlightened VMCS reads from the MSR ``number`` in today's kernel."""
        name = _CONTROL_MSR.get(number) or _CLASSIC_MSR.get(number)
        if name is not None:
            supported = vmx.EVMCS_SUPPORTED[name]
            if not perf_global:
                supported &= ~{"exit": vmx.EXIT_LOAD_PERF_GLOBAL, "entry": vmx.ENTRY_LOAD_PERF_GLOBAL}.get(name, 0)
            return value & (supported << 32 | 0xFFFF_FFFF)
        if number == MSR_BY_NAME["IA32_VMX_VMFUNC"]:
            return value & ~0xFFFF_FFFF | value & vmx.EVMCS_SUPPORTED_VMFUNC
        return value

    def drop_ept(self) -> None:
        """Take away EPT and what needs it, as KVM does on a host without EPT."""
        must1, may1 = self.controls["secondary"]
        self.controls["secondary"] = ControlValue(must1, may1 & ~_NEEDS_EPT)
        self.values["ept_vpid"] &= ~0xFFFF_FFFF
        self.values["vmfunc"] &= ~vmx.VMFUNC_EPTP_SWITCHING

    def clear_for_evmcs(self) -> None:
        """Take away what the enlightened VMCS has no fields for, as the kernels of 2019 do."""
        for name, cleared in vmx.EVMCS_CLEARED.items():
            must1, may1 = self.controls[name]
            self.controls[name] = ControlValue(must1, may1 & ~cleared)
        self.values["vmfunc"] &= ~vmx.EVMCS_CLEARED_VMFUNC

    def to_head(self) -> dict[str, Any]:
        """JSON form."""
        return {"controls": {name: list(pair) for name, pair in self.controls.items()}, "values": dict(self.values)}

    @classmethod
    def from_head(cls, head: Mapping[str, Any]) -> VmxCapabilities:
        """The inverse of ``to_head``."""
        controls = {name: ControlValue(*pair) for name, pair in head["controls"].items()}
        return cls(controls, dict(head["values"]))

    def _write_control(self, name: str, value: int, limit: VmxCapabilities) -> bool:
        must1, may1 = value & 0xFFFF_FFFF, value >> 32
        least, most = limit.controls[name]
        if least & ~must1 or may1 & ~most:
            return False
        self.controls[name] = ControlValue(must1, may1)
        return True


def _basic_ok(limit: VmxCapabilities, value: int) -> bool:
    own = limit.values["basic"]
    same_revision = value & 0x7FFF_FFFF == own & 0x7FFF_FFFF
    size_ok = (value >> 32 & 0x1FFF) >= (own >> 32 & 0x1FFF)
    return not value & _BASIC_SUBSET & ~own and not value & _BASIC_32BIT_ADDRESSES and same_revision and size_ok


def _misc_ok(limit: VmxCapabilities, value: int) -> bool:
    own = limit.values["misc"]
    same_rate = not limit.controls["pin"].may1 & vmx.PIN_PREEMPTION_TIMER or value & 0x1F == own & 0x1F
    targets_ok = (value >> 16 & 0x1FF) <= (own >> 16 & 0x1FF)
    lists_ok = (value >> 25 & 0x7) <= (own >> 25 & 0x7)
    return not value & _MISC_SUBSET & ~own and same_rate and targets_ok and lists_ok and value >> 32 == own >> 32


_WRITABLE: dict[str, Callable[[VmxCapabilities, int], bool]] = {
    "basic": _basic_ok,
    "misc": _misc_ok,
    "cr0_fixed0": lambda limit, value: not limit.values["cr0_fixed0"] & ~value,
    "cr4_fixed0": lambda limit, value: not limit.values["cr4_fixed0"] & ~value,
    "vmcs_enum": lambda limit, value: True,
    "ept_vpid": lambda limit, value: not value & ~limit.values["ept_vpid"],
    "vmfunc": lambda limit, value: not value & ~limit.values["vmfunc"],
}
