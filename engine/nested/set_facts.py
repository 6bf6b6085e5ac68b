"""What each step of KVM_SET_NESTED_STATE on Intel looks at, and what it takes: the words of an explanation.

Nothing is decided here; ``set_state`` has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.arch import kvm_nested_state as abi
from engine.arch.vmcs12 import VMCS12, VMCS12_REVISION, get
from engine.nested.set_context import SetContext
from engine.nested.verdict import Facts

Look = Callable[[SetContext], str]
# Name of the field, what is found, and what is required.
Row = tuple[str | Look, Look, str | Look]


def _hex(value: Callable[[SetContext], int]) -> Look:
    return lambda c: f"{value(c):#x}"


def _page(c: SetContext) -> str:
    return f"a multiple of 4096 below {1 << c.vcpu.maxphyaddr:#x}"


def _host(c: SetContext) -> str:
    return f"nested={'true' if c.vcpu.host.nested else 'false'} on {c.vcpu.host.vendor}"


def _needs_host(c: SetContext) -> str:
    return "any host" if c.vcpu.kvm.nested.hooks_always else "nested=true on intel"


def _bytes(c: SetContext) -> str:
    return "NULL" if c.user.data is None else f"{len(c.user.data) - c.user.base} bytes"


def _in_smm(c: SetContext) -> str:
    return "neither GUEST_MODE nor RUN_PENDING while the vCPU is in SMM" if c.vcpu.smm else "0 outside SMM"


def _cr3(c: SetContext) -> str:
    return f"below {1 << c.vcpu.maxphyaddr:#x}; with PAE paging and no EPT, PDPTEs in guest memory that are valid"


_FLAGS = _hex(lambda c: c.flags)
_SIZE = _hex(lambda c: c.size)
_SMM = _hex(lambda c: c.smm_flags)
_VMXON = _hex(lambda c: c.vmxon_pa)
_VMCS12 = _hex(lambda c: c.vmcs12_pa)
_REVISION = f"revision {VMCS12_REVISION:#x} in bits 30:0"

FACTS: Mapping[str, Row] = {
    "G0": ("host", _host, _needs_host),
    "G1": ("data", _bytes, f"{abi.HEADER_SIZE} bytes of header that can be read"),
    "G2": ("size", _SIZE, f"at least {abi.HEADER_SIZE:#x}"),
    "G3": ("flags", _FLAGS, lambda c: f"no bit outside {c.vcpu.kvm.nested.flags_mask:#x}"),
    "G4": ("flags", _FLAGS, f"GUEST_MODE ({abi.GUEST_MODE:#x}) beside RUN_PENDING ({abi.RUN_PENDING:#x})"),
    "V1": ("format", _hex(lambda c: c.format), f"{abi.FORMAT_VMX:#x} (VMX)"),
    "V2a": ("vmx.smm_flags", _SMM, "0 while vmxon_pa is -1"),
    "V2b": ("vmx.vmcs12_pa", _VMCS12, "-1 while vmxon_pa is -1"),
    "V2c": ("flags", _FLAGS, f"no bit but EVMCS ({abi.EVMCS:#x}) while vmxon_pa is -1"),
    "V3a": (
        "vmx.vmxon_pa",
        _VMXON,
        "-1 unless the guest has VMX: CPUID leaf 1, ECX bit 5, set with PUT …/cpuid",
    ),
    "V3b": ("vmx.vmxon_pa", _VMXON, _page),
    "V4": ("vmx.smm_flags", _SMM, f"no GUEST_MODE ({abi.SMM_GUEST_MODE:#x}) beside GUEST_MODE in flags"),
    "V5": ("vmx.smm_flags", _SMM, f"no bit outside {abi.SMM_GUEST_MODE | abi.SMM_VMXON:#x}"),
    "V5n": ("vmx.flags", _hex(lambda c: c.vmx("flags")), f"no bit outside {abi.TIMER_DEADLINE:#x}"),
    "V6": (
        lambda c: "flags" if c.vcpu.smm else "vmx.smm_flags",
        lambda c: f"{c.flags if c.vcpu.smm else c.smm_flags:#x}",
        _in_smm,
    ),
    "V7": ("vmx.smm_flags", _SMM, f"VMXON ({abi.SMM_VMXON:#x}) beside GUEST_MODE ({abi.SMM_GUEST_MODE:#x})"),
    "V8": (
        "flags",
        _FLAGS,
        f"no EVMCS ({abi.EVMCS:#x}) unless the guest has VMX and capability 163 is enabled on the vCPU",
    ),
    "V10": ("vmx.vmxon_pa", _VMXON, "an address, to go on"),
    "V11": ("host.fail_allocation", lambda c: "an allocation", "an allocation that succeeds"),
    "V12": ("size", _SIZE, f"at least {abi.MIN_SIZE_VMCS12:#x}, to go on"),
    "V12n": (
        "size",
        _SIZE,
        f"at least {abi.MIN_SIZE_VMCS12:#x}, or a header without GUEST_MODE, EVMCS and vmcs12_pa, which ends here",
    ),
    "V13": ("vmx.vmcs12_pa", _VMCS12, lambda c: f"-1, or {_page(c)} other than vmxon_pa"),
    "V14": ("flags", _FLAGS, f"EVMCS ({abi.EVMCS:#x}) where vmcs12_pa is -1"),
    "V16": ("data", _bytes, f"{VMCS12.size} bytes at offset {abi.DATA_OFFSET} that can be read"),
    "V17": ("vmcs12.revision", _hex(lambda c: get(c.vcpu.vmx.vmcs12, "revision")), _REVISION),
    "V18": ("flags", _FLAGS, f"GUEST_MODE ({abi.GUEST_MODE:#x}), to go on"),
    "V20a": ("size", _SIZE, f"at least {abi.MIN_SIZE_SHADOW:#x} where vmcs12 has VMCS shadowing and a link pointer"),
    "V20b": ("data", _bytes, f"{VMCS12.size} bytes at offset {abi.SHADOW_OFFSET} that can be read"),
    "V20c": (
        "shadow_vmcs12.revision",
        _hex(lambda c: get(c.vcpu.vmx.shadow, "revision")),
        f"{_REVISION}, and bit 31, where vmcs12 has VMCS shadowing and a link pointer",
    ),
    "V22": ("vmcs12.guest_cr3", _hex(lambda c: get(c.vcpu.vmx.vmcs12, "guest_cr3")), _cr3),
}


def facts_of(c: SetContext, check: str, *, reached: bool) -> Facts:
    """What a step looks at, what it found unless it was not ``reached``, and what it takes; empty for an effect."""
    row = FACTS.get(check)
    if row is None:
        return Facts()
    field, found, required = row
    return Facts(
        field if isinstance(field, str) else field(c),
        found(c) if reached else None,
        required if isinstance(required, str) else required(c),
    )
