"""All VM-entry checks together, and the last step that can still refuse: loading the guest's CR3."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from engine.arch import vmx_msrs as vmx
from engine.arch.vmcs12 import get
from engine.kvm.memory_views import GuestMemory
from engine.nested.entry_context import EntryCheck, EntryContext, ReadingContext
from engine.nested.entry_controls import CONTROL_CHECKS, CONTROL_FIELDS
from engine.nested.entry_state import GUEST_CHECKS, HOST_CHECKS
from engine.nested.verdict import CheckReport, Facts, report_in_order
from engine.vcpu.registers import CR0_PG, CR4_PAE, guest_efer
from engine.vcpu.vcpu import Vcpu

ENTRY_CHECKS = CONTROL_CHECKS + HOST_CHECKS + GUEST_CHECKS

# PDPTE bits 2:1 and 8:5 are reserved, and so is everything above the physical address width.
_PDPTE_RESERVED = 0x1E6


def checks_of(profile: str, area: str = "") -> Iterator[EntryCheck]:
    """The checks that ``profile`` makes, in order; ``area`` is ``ctl``, ``host``, ``guest`` or everything."""
    return (check for check in ENTRY_CHECKS if profile in check.profiles and check.name.startswith(area))


def first_failure(vcpu: Vcpu, memory: GuestMemory, area: str = "") -> EntryCheck | None:
    """The first check that refuses the cached vmcs12, None when all pass."""
    context = EntryContext(vcpu, memory)
    return next((check for check in checks_of(vcpu.profile, area) if check.fails(context)), None)


def explain_checks(vcpu: Vcpu, memory: GuestMemory) -> list[CheckReport]:
    """Every check of this kernel on the cached vmcs12: which pass, which one decides, which are not reached."""
    return report_in_order(
        (check.name, check.says, partial(_inspect, vcpu, memory, check)) for check in checks_of(vcpu.profile)
    )


def _inspect(vcpu: Vcpu, memory: GuestMemory, check: EntryCheck) -> tuple[bool, Facts]:
    """Whether a check refuses, and the field that it looked at last: the one that settled it."""
    context = ReadingContext(vcpu, memory)
    refuses = check.fails(context)
    name = context.last
    if name is None:
        return refuses, Facts(check.name, "not looked at", check.says)
    masks = [c for c, field in CONTROL_FIELDS if field == name and check.name in (f"ctl:{c}", f"ctl:{c[:3]}")]
    required = check.says
    if masks:
        allowed = vcpu.capabilities.controls[masks[0]]
        required = f"{required}: every bit of {allowed.must1:#x}, and none outside {allowed.may1:#x}"
    return refuses, Facts(f"vmcs12.{name}", f"{context.get(name):#x}", required)


def cr3_refusal(vcpu: Vcpu, memory: GuestMemory, from_vm_entry: bool) -> str | None:
    """Why entering L2 fails once all checks have passed: ``cr3``, ``pdpte`` or None.

    The page-directory pointers are loaded when L2 uses PAE paging without EPT; today's kernel puts that off to the
    next run when the state comes from user space. The kernel of 2019 looks at a CR3 that changes, or whose pointers
    do (nested_vmx_load_cr3); those in use are not known here, so that they count as changed.
    """
    page, rows = vcpu.vmx.vmcs12, vcpu.kvm.nested
    cr3 = get(page, "guest_cr3")
    efer = guest_efer(vcpu.registers, page, vcpu.vmx.run_pending)
    paging = get(page, "guest_cr0") & CR0_PG and get(page, "guest_cr4") & CR4_PAE and not efer & vmx.EFER_LMA
    nested_ept = get(page, "cpu_based_vm_exec_control") & vmx.PROC_SECONDARY
    nested_ept = nested_ept and get(page, "secondary_vm_exec_control") & vmx.SEC_EPT
    pdptes = paging and not nested_ept
    if cr3 >> vcpu.maxphyaddr and (pdptes or not rows.keeps_same_cr3 or cr3 != vcpu.registers["cr3"]):
        return "cr3"
    deferred = not rows.set_loads_pdptes and not from_vm_entry
    if not pdptes or deferred:
        return None
    return None if _pdptes_valid(vcpu, memory, cr3) else "pdpte"


def _pdptes_valid(vcpu: Vcpu, memory: GuestMemory, cr3: int) -> bool:
    raw = memory.read(cr3 & ~0x1F, 32)
    if raw is None:
        return False
    entries = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, 32, 8)]
    return not any(entry & 1 and (entry & _PDPTE_RESERVED or entry >> vcpu.maxphyaddr) for entry in entries)
