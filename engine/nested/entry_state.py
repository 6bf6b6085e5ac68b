"""VM-entry checks on the host state and the guest state of vmcs12, in the order in which KVM makes them.

Source: Intel SDM volume 3, "Checks on host control registers" and the sections after it; Linux v5.3 and v7.1. The
kernel of v5.2 had none of the selector and base checks.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.arch import vmx_msrs as vmx
from engine.arch.kvm_nested_state import NO_ADDRESS
from engine.arch.paging import canonical
from engine.nested.entry_context import (
    EntryCheck,
    EntryContext,
    is_shadow,
    pat_valid,
    revision_matches,
)
from engine.state.profiles import ONLY_LATEST
from engine.vcpu.control_registers import guest_cr0_valid
from engine.vcpu.registers import CR0_PE, CR0_PG, CR4_PAE

_CR0_WP = 1 << 16
_CR4_LA57 = 1 << 12
_CR4_PCIDE = 1 << 17
_CR4_CET = 1 << 23
_RPL_AND_TABLE = 0x7
_SELECTORS = ("cs", "ss", "ds", "es", "fs", "gs", "tr")
_BASES = ("fs_base", "gs_base", "gdtr_base", "idtr_base", "tr_base")
_DEBUGCTL_LBR_BTF = 0x3
_DEBUGCTL_FREEZE_IN_SMM = 1 << 14
_BNDCFGS_RESERVED = 0xFFC
_S_CET_RESERVED = 0x3C0


def _wide(c: EntryContext) -> bool:
    return bool(c.exit & vmx.EXIT_HOST_64BIT)


def _long_mode_guest(c: EntryContext) -> bool:
    return bool(c.entry & vmx.ENTRY_IA32E)


def _linear_bits(c: EntryContext) -> int:
    """Width of a linear address in L1: 57 bits once CR4.LA57 is set."""
    return 57 if c.vcpu.registers["cr4"] & _CR4_LA57 else 48


def _host_control_registers(c: EntryContext) -> bool:
    return not (c.cr_valid("cr0", c.get("host_cr0")) and c.cr_valid("cr4", c.get("host_cr4")))


def _cet_without_write_protect(who: str) -> Callable[[EntryContext], bool]:
    return lambda c: bool(c.get(f"{who}_cr4") & _CR4_CET) and not c.get(f"{who}_cr0") & _CR0_WP


def _host_sysenter(c: EntryContext) -> bool:
    return not all(canonical(c.get(f"host_ia32_sysenter_{part}"), _linear_bits(c)) for part in ("esp", "eip"))


def _loaded(
    control: str, bit: int, field: str, valid: Callable[[EntryContext, int], bool]
) -> Callable[[EntryContext], bool]:
    """``field`` must be ``valid`` if the exit or entry control ``bit`` loads it."""
    return lambda c: bool((c.exit if control == "exit" else c.entry) & bit) and not valid(c, c.get(field))


def _host_pae(c: EntryContext) -> bool:
    return _wide(c) and not c.get("host_cr4") & CR4_PAE


def _host_legacy(c: EntryContext) -> bool:
    if _wide(c):
        return False
    return _long_mode_guest(c) or bool(c.get("host_cr4") & _CR4_PCIDE) or bool(c.get("host_rip") >> 32)


def _host_selectors(c: EntryContext) -> bool:
    selectors = {name: c.get(f"host_{name}_selector") for name in _SELECTORS}
    if any(selector & _RPL_AND_TABLE for selector in selectors.values()):
        return True
    return not selectors["cs"] or not selectors["tr"] or (not selectors["ss"] and not _wide(c))


def _host_bases(c: EntryContext) -> bool:
    return not all(canonical(c.get(f"host_{name}"), _linear_bits(c)) for name in _BASES)


def _host_rip(c: EntryContext) -> bool:
    return not canonical(c.get("host_rip"), 57 if c.get("host_cr4") & _CR4_LA57 else 48)


def _host_efer(c: EntryContext, value: int) -> bool:
    return c.efer_valid(value) and bool(value & vmx.EFER_LMA) == bool(value & vmx.EFER_LME) == _wide(c)


def _cet_common(c: EntryContext, who: str) -> bool:
    state, ssp, table = (c.get(f"{who}_{part}") for part in ("s_cet", "ssp", "ssp_tbl"))
    return not state & _S_CET_RESERVED and not ssp & 3 and canonical(table, _linear_bits(c))


def _host_cet(c: EntryContext) -> bool:
    if not c.exit & vmx.EXIT_LOAD_CET:
        return False
    values = (c.get("host_s_cet"), c.get("host_ssp"))
    in_range = all(canonical(value) for value in values) if _wide(c) else not any(value >> 32 for value in values)
    return not (_cet_common(c, "host") and in_range)


def _guest_cet(c: EntryContext) -> bool:
    return bool(c.entry & vmx.ENTRY_LOAD_CET) and not (_cet_common(c, "guest") and canonical(c.get("guest_ssp"), 49))


def _guest_control_registers(c: EntryContext) -> bool:
    return not (guest_cr0_valid(c.vcpu, c.get("guest_cr0")) and c.cr_valid("cr4", c.get("guest_cr4")))


def _guest_debug(c: EntryContext) -> bool:
    if not c.entry & vmx.ENTRY_LOAD_DEBUG:
        return False
    # LBR and BTF are let through and ignored, FREEZE_IN_SMM is a quirk that is on by default.
    allowed = _DEBUGCTL_LBR_BTF | _DEBUGCTL_FREEZE_IN_SMM
    return bool(c.get("guest_dr7") >> 32) or bool(c.get("guest_ia32_debugctl") & ~allowed)


def _link_pointer(c: EntryContext) -> bool:
    link = c.get("vmcs_link_pointer")
    if link == NO_ADDRESS:
        return False
    if not c.vcpu.page_valid(link):
        return True
    raw = c.memory.read(link, 4)
    if raw is None:
        return True
    word = int.from_bytes(raw, "little")
    return not revision_matches(word) or is_shadow(word) != bool(c.secondary & vmx.SEC_SHADOW_VMCS)


def _guest_paging(c: EntryContext) -> bool:
    return c.get("guest_cr0") & (CR0_PG | CR0_PE) == CR0_PG


def _guest_long_mode(c: EntryContext) -> bool:
    return _long_mode_guest(c) and not (c.get("guest_cr4") & CR4_PAE and c.get("guest_cr0") & CR0_PG)


def _guest_efer(c: EntryContext) -> bool:
    if not c.run_pending or not c.entry & vmx.ENTRY_LOAD_EFER:
        return False
    value, wanted = c.get("guest_ia32_efer"), _long_mode_guest(c)
    paging = c.get("guest_cr0") & CR0_PG
    enabled_ok = not paging or bool(value & vmx.EFER_LME) == wanted
    return not (c.efer_valid(value) and bool(value & vmx.EFER_LMA) == wanted and enabled_ok)


def _bndcfgs_valid(c: EntryContext, value: int) -> bool:
    return canonical(value & ~0xFFF, _linear_bits(c)) and not value & _BNDCFGS_RESERVED


def _activity(c: EntryContext) -> bool:
    return c.get("guest_activity_state") not in c.kvm.entry.activity_states


def _perf_valid(c: EntryContext, value: int) -> bool:
    return c.perf_global_valid(value)


def _pat_valid(c: EntryContext, value: int) -> bool:
    return pat_valid(value)


HOST_CHECKS: tuple[EntryCheck, ...] = (
    EntryCheck("host:hostcr", "host CR0 and CR4 with their fixed bits", _host_control_registers),
    EntryCheck("host:host cr3", "host CR3 within the physical address width", lambda c: not c.legal(c.get("host_cr3"))),
    EntryCheck("host:host cet", "host CR0.WP with CR4.CET", _cet_without_write_protect("host"), ONLY_LATEST),
    EntryCheck("host:host sysenter", "canonical SYSENTER_ESP and SYSENTER_EIP", _host_sysenter),
    EntryCheck(
        "host:host pat",
        "memory types in the host PAT if it is loaded",
        _loaded("exit", vmx.EXIT_LOAD_PAT, "host_ia32_pat", _pat_valid),
    ),
    EntryCheck(
        "host:host perf",
        "existing counters in the host PERF_GLOBAL_CTRL if it is loaded",
        _loaded("exit", vmx.EXIT_LOAD_PERF_GLOBAL, "host_ia32_perf_global_ctrl", _perf_valid),
        ONLY_LATEST,
    ),
    EntryCheck("host:host pae", "CR4.PAE for a 64-bit host", _host_pae, ONLY_LATEST),
    EntryCheck(
        "host:host legacy", "for a 32-bit host: no IA-32e guest, no PCID, RIP below 4 GiB", _host_legacy, ONLY_LATEST
    ),
    EntryCheck(
        "host:host selectors",
        "RPL and TI 0 in all host selectors; CS and TR not 0; SS not 0 unless 64-bit",
        _host_selectors,
    ),
    EntryCheck("host:host bases", "canonical host FS, GS, GDTR, IDTR and TR bases", _host_bases),
    EntryCheck("host:host rip", "canonical host RIP", _host_rip, ONLY_LATEST),
    EntryCheck(
        "host:host efer",
        "valid host EFER with LMA and LME as the host is 64-bit or not, if it is loaded",
        _loaded("exit", vmx.EXIT_LOAD_EFER, "host_ia32_efer", _host_efer),
    ),
    EntryCheck("host:host cet state", "valid host CET state if it is loaded", _host_cet, ONLY_LATEST),
)

GUEST_CHECKS: tuple[EntryCheck, ...] = (
    EntryCheck("guest:guest cr", "guest CR0 and CR4 with their fixed bits", _guest_control_registers),
    EntryCheck("guest:guest cet", "guest CR0.WP with CR4.CET", _cet_without_write_protect("guest"), ONLY_LATEST),
    EntryCheck("guest:guest debug", "valid guest DR7 and DEBUGCTL if they are loaded", _guest_debug, ONLY_LATEST),
    EntryCheck(
        "guest:guest pat",
        "memory types in the guest PAT if it is loaded",
        _loaded("entry", vmx.ENTRY_LOAD_PAT, "guest_ia32_pat", _pat_valid),
    ),
    EntryCheck(
        "guest:link",
        "link pointer -1, or a page of guest memory with the right revision and a shadow bit that fits VMCS shadowing",
        _link_pointer,
    ),
    EntryCheck(
        "guest:guest perf",
        "existing counters in the guest PERF_GLOBAL_CTRL if it is loaded",
        _loaded("entry", vmx.ENTRY_LOAD_PERF_GLOBAL, "guest_ia32_perf_global_ctrl", _perf_valid),
        ONLY_LATEST,
    ),
    EntryCheck("guest:guest paging", "CR0.PE with CR0.PG", _guest_paging, ONLY_LATEST),
    EntryCheck("guest:guest ia32e", "CR4.PAE and CR0.PG for an IA-32e guest", _guest_long_mode, ONLY_LATEST),
    EntryCheck(
        "guest:guest efer",
        "guest EFER that fits the IA-32e control, if the run is pending and it is loaded",
        _guest_efer,
    ),
    EntryCheck(
        "guest:guest bndcfgs",
        "canonical guest BNDCFGS without reserved bits if it is loaded",
        _loaded("entry", vmx.ENTRY_LOAD_BNDCFGS, "guest_bndcfgs", _bndcfgs_valid),
    ),
    EntryCheck("guest:guest cet state", "valid guest CET state if it is loaded", _guest_cet, ONLY_LATEST),
    EntryCheck("guest:activity", "activity state active or halted (today also wait-for-SIPI)", _activity),
)
