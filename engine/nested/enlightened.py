"""The enlightened VMCS: enabling it, the VP assist page that names it, attaching it, copying it.

Where a kernel would loop for ever or follow a NULL pointer this module does something defined instead. A kernel of
2019 that cannot map the page retries VMLAUNCH silently: here ``attach`` says so and the caller reports it. Its first
enlightened VMCS at GPA 0 looked attached already: here nothing is attached until it is mapped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from engine.arch.evmcs import CLEAN_ALL, CLEAN_BITS, EVMCS, EVMCS_SIZE, NESTED_FLUSH_HYPERCALL
from engine.arch.hyperv_pages import VP_ASSIST
from engine.arch.kvm_nested_state import NO_ADDRESS
from engine.arch.vmcs12 import EVMCS_VERSION, VMCS12, VMCS12_PAGE, VMCS12_REVISION, put
from engine.kvm.memory_views import GuestMemory
from engine.state.profiles import kvm_version
from engine.vcpu.hv_cpuid import evmcs_version
from engine.vcpu.msr_numbers import HV_VP_ASSIST_PAGE
from engine.vcpu.vcpu import EVMPTR_NONE, EVMPTR_PENDING, Vcpu, VcpuHost

CAP_HYPERV_ENLIGHTENED_VMCS = 163

_ASSIST_ENABLE = 0x1
_ASSIST_ENLIGHTEN = VP_ASSIST.by_name["enlighten_vmentry"].offset
_ASSIST_CURRENT = VP_ASSIST.by_name["current_nested_vmcs"].offset
_ASSIST_READ = 56

AttachResult = Literal["unused", "attached", "unmapped", "bad-revision"]


def offers_evmcs(host: VcpuHost, profile: str) -> bool:
    """What KVM_CHECK_EXTENSION says: in 2019 yes even on AMD; a kernel described without it says no."""
    return host.evmcs and (host.intel or not kvm_version(profile).nested.hooks_always)


def evmcs_refusal(vcpu: Vcpu) -> str | None:
    """Why this kernel cannot enable the enlightened VMCS on the vCPU, as errno; None if it can."""
    host = vcpu.host
    if vcpu.kvm.nested.hooks_always:
        if not host.evmcs:
            return "EINVAL"
        return None if host.intel else "ENOTTY"
    if not host.intel:
        return "ENODEV"
    return None if host.nested and host.evmcs else "ENOTTY"


def enable_evmcs(vcpu: Vcpu) -> int:
    """Mark the enlightened VMCS enabled on this vCPU, for good, and return the version range it supports.

    The range is 0x0101: versions 1 to 1. Today's kernel says 0 when it offers no VMX itself. In 2019 the first call
    also takes controls away from the vCPU's capabilities.
    """
    first = not vcpu.evmcs_enabled
    vcpu.evmcs_enabled = True
    if first and vcpu.kvm.nested.evmcs_clears_controls:
        vcpu.capabilities.clear_for_evmcs()
    return evmcs_version(vcpu)


def current_evmcs(vcpu: Vcpu, memory: GuestMemory) -> int | None:
    """GPA of the enlightened VMCS that the assist page asks for, None when it asks for none.

    Read from guest memory each time. Today's kernel takes -1 and -2 for none.
    """
    where = vcpu.msrs.get(HV_VP_ASSIST_PAGE, 0)
    if not where & _ASSIST_ENABLE:
        return None
    rows = vcpu.kvm.nested
    page = memory.read(where & ~0xFFF, rows.assist_size)
    if page is None or not any(page[_ASSIST_ENLIGHTEN : _ASSIST_ENLIGHTEN + rows.enlighten_size]):
        return None
    gpa = int.from_bytes(page[_ASSIST_CURRENT : _ASSIST_CURRENT + 8], "little")
    return None if rows.map_pending and gpa in (EVMPTR_NONE, EVMPTR_PENDING) else gpa


def attach(vcpu: Vcpu, memory: GuestMemory, launch: bool) -> AttachResult:
    """What VMLAUNCH, VMRESUME and the first run after a restore do before anything else.

    ``unused``: go on with the ordinary VMCS. ``unmapped`` and ``bad-revision``: give up; the caller knows how its
    kernel says so. ``launch`` empties the cached vmcs12, because the enlightened one does not fill all of it.
    """
    vmx = vcpu.vmx
    if not vcpu.evmcs_visible:
        return "unused"
    gpa = current_evmcs(vcpu, memory)
    if gpa is None:
        if vcpu.kvm.nested.map_pending:
            vmx.release_evmcs()
        return "unused"
    changed = not vmx.evmcs_mapped or gpa != vmx.evmptr
    if changed:
        if vcpu.kvm.nested.map_pending or not vmx.evmcs_mapped:
            vmx.current_pa = NO_ADDRESS
        vmx.release_evmcs()
        raw = memory.read(_page_of(gpa), 4)
        if raw is None:
            return "unmapped"
        if int.from_bytes(raw, "little") not in (EVMCS_VERSION, VMCS12_REVISION):
            return "bad-revision"
        vmx.evmptr = gpa
        if launch:
            vmx.vmcs12[:] = bytes(VMCS12_PAGE)
            put(vmx.vmcs12, "revision", VMCS12_REVISION)
    if launch or changed:
        _store(vcpu, memory, "hv_clean_fields", clean_fields(vcpu, memory) & ~CLEAN_ALL)
    _remember_guest(vcpu, memory)
    return "attached"


def copy_in(vcpu: Vcpu, memory: GuestMemory, clean: int) -> None:
    """Enlightened VMCS to cached vmcs12. ``clean`` bits that are set skip their groups; 0 copies everything."""
    rows, vmcs12 = vcpu.kvm.nested, vcpu.vmx.vmcs12
    page = memory.read(_page_of(vcpu.vmx.evmptr), rows.evmcs.size)
    if page is None:
        return
    for field in rows.evmcs_fields:
        bit = CLEAN_BITS.get(field.group)
        skipped = bit is not None and clean >> bit & 1
        if rows.copies_in.isdisjoint(field.copies) or skipped:
            continue
        twin = VMCS12.by_name[field.name]
        vmcs12[twin.offset : twin.end] = page[field.offset : field.offset + field.size]


def copy_out(vcpu: Vcpu, memory: GuestMemory) -> None:
    """Cached vmcs12 to enlightened VMCS: guest state and exit information. In 2019 every field is clean then."""
    for field in vcpu.kvm.nested.evmcs_fields:
        if "O" in field.copies:
            twin = VMCS12.by_name[field.name]
            memory.write(_page_of(vcpu.vmx.evmptr) + field.offset, bytes(vcpu.vmx.vmcs12[twin.offset : twin.end]))
    if not vcpu.kvm.nested.map_pending:
        mark_clean(vcpu, memory)


def asks_for_direct_flush(vcpu: Vcpu, memory: GuestMemory) -> bool:
    """Whether the attached enlightened VMCS says, as it is now, that the lower hypervisor serves flush hypercalls."""
    raw = memory.read(_page_of(vcpu.vmx.evmptr) + EVMCS.by_name["hv_enlightenments_control"].offset, 4)
    return raw is not None and bool(int.from_bytes(raw, "little") & NESTED_FLUSH_HYPERCALL)


def _remember_guest(vcpu: Vcpu, memory: GuestMemory) -> None:
    """Copy from the assist page, and from the enlightened VMCS unless it says that nothing of it has changed.

    These fields are where the TLFS has them, whatever a kernel of 2019 believed: it served no flush of L2.
    """
    assist = memory.read(vcpu.msrs.get(HV_VP_ASSIST_PAGE, 0) & ~0xFFF, _ASSIST_READ)
    features = 0 if assist is None else VP_ASSIST.get(assist, "nested_features")
    lower = replace(vcpu.vmx.lower, features=features)
    page = memory.read(_page_of(vcpu.vmx.evmptr), EVMCS_SIZE)
    if page is not None and not EVMCS.get(page, "hv_clean_fields") >> CLEAN_BITS["ENLIGHTENMENTSCONTROL"] & 1:
        vm_id, vp_id = EVMCS.get(page, "hv_vm_id"), EVMCS.get(page, "hv_vp_id")
        lower = replace(lower, vm_id=vm_id, vp_id=vp_id, partition_page=EVMCS.get(page, "partition_assist_page"))
    vcpu.vmx.lower = lower


def clean_fields(vcpu: Vcpu, memory: GuestMemory) -> int:
    """hv_clean_fields of the attached enlightened VMCS."""
    field = vcpu.kvm.nested.evmcs.by_name["hv_clean_fields"]
    raw = memory.read(_page_of(vcpu.vmx.evmptr) + field.offset, field.size)
    return 0 if raw is None else int.from_bytes(raw, "little")


def evmcs_page(vcpu: Vcpu, memory: GuestMemory) -> bytes | None:
    """The attached enlightened VMCS as this kernel reads it; None without memory behind it."""
    return memory.read(_page_of(vcpu.vmx.evmptr), vcpu.kvm.nested.evmcs.size)


def mark_clean(vcpu: Vcpu, memory: GuestMemory) -> None:
    """Set all 16 clean bits in guest memory."""
    _store(vcpu, memory, "hv_clean_fields", clean_fields(vcpu, memory) | CLEAN_ALL)


def _store(vcpu: Vcpu, memory: GuestMemory, name: str, value: int) -> None:
    field = vcpu.kvm.nested.evmcs.by_name[name]
    memory.write(_page_of(vcpu.vmx.evmptr) + field.offset, value.to_bytes(field.size, "little"))


def _page_of(gpa: int) -> int:
    # The whole page is mapped and used from its start: the low 12 bits of the GPA do not count.
    return gpa & ~0xFFF
