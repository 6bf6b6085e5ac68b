"""The register file, and how it moves between L1, L2 and vmcs12.

Registers carry the names of vmcs12's guest fields without ``guest_``. Segments have ``_selector``, ``_base``,
``_limit`` and ``_ar_bytes``; ``ldtr`` and ``tr`` included, ``gdtr`` and ``idtr`` have base and limit.
"""

from __future__ import annotations

from engine.arch import vmx_msrs as vmx
from engine.arch.vmcs12 import get, put

SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
TABLES = ("gdtr", "idtr")

DR7_FIXED = 0x400
_DR7_WRITABLE = 0xFFFF_2BFF
_RFLAGS_FIXED = 0x2
_UNUSABLE = 0x1_0000
CR0_PE = 1 << 0
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
CR4_VMXE = 1 << 13
CR4_OSXSAVE = 1 << 18
CR4_PKE = 1 << 22

# Copied as they are, in both directions.
PLAIN = (
    "cr0",
    "cr3",
    "cr4",
    "rsp",
    "rip",
    "rflags",
    "pending_dbg_exceptions",
    "sysenter_cs",
    "sysenter_esp",
    "sysenter_eip",
    *(f"{name}_{part}" for name in SEGMENTS for part in ("selector", "base", "limit", "ar_bytes")),
    *(f"{name}_{part}" for name in TABLES for part in ("base", "limit")),
)
_CONDITIONAL = (
    "dr7",
    "ia32_efer",
    "ia32_pat",
    "ia32_debugctl",
    "bndcfgs",
    "interruptibility_info",
    "linear_address",
    "intr_status",
    "pdptr0",
    "pdptr1",
    "pdptr2",
    "pdptr3",
)

# Of no interest to nesting: general registers, CR2, CR8 and the events that KVM_SET_VCPU_EVENTS leaves behind.
_CARRIED = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("cr2", "cr8"),
)

RESET_REGISTERS: dict[str, int] = {
    **dict.fromkeys(PLAIN + _CONDITIONAL + _CARRIED, 0),
    "rdx": 0x600,
    "cr0": 0x6000_0010,
    "rip": 0xFFF0,
    "rflags": _RFLAGS_FIXED,
    "dr7": DR7_FIXED,
    "ia32_pat": 0x0007_0406_0007_0406,
    **{f"{name}_limit": 0xFFFF for name in SEGMENTS + TABLES},
    **{f"{name}_ar_bytes": 0x93 for name in ("es", "ss", "ds", "fs", "gs")},
    "cs_selector": 0xF000,
    "cs_base": 0xFFFF_0000,
    "cs_ar_bytes": 0x9B,
    "ldtr_ar_bytes": 0x82,
    "tr_ar_bytes": 0x8B,
}

# Registers that an attempt to enter L2 leaves behind even when it fails half-way.
TOUCHED_BY_FAILURE = ("cr0", "cr4", "ia32_efer", "rflags", "dr7")


def load_guest(registers: dict[str, int], page: bytearray, run_pending: bool) -> None:
    """Give L2 its registers from vmcs12. Debug controls, PAT, EFER and BNDCFGS count only while the run is pending."""
    for name in PLAIN:
        registers[name] = get(page, f"guest_{name}")
    entry = get(page, "vm_entry_controls") if run_pending else 0
    if entry & vmx.ENTRY_LOAD_DEBUG:
        set_dr7(registers, get(page, "guest_dr7"))
        registers["ia32_debugctl"] = get(page, "guest_ia32_debugctl")
    if entry & vmx.ENTRY_LOAD_PAT:
        registers["ia32_pat"] = get(page, "guest_ia32_pat")
    if entry & vmx.ENTRY_LOAD_BNDCFGS:
        registers["bndcfgs"] = get(page, "guest_bndcfgs")
    registers["ia32_efer"] = guest_efer(registers, page, run_pending)
    registers["interruptibility_info"] = get(page, "guest_interruptibility_info") if run_pending else 0
    registers["intr_status"] = get(page, "guest_intr_status")
    registers["linear_address"] = 0
    for index in range(4):
        registers[f"pdptr{index}"] = get(page, f"guest_pdptr{index}")


def guest_efer(registers: dict[str, int], page: bytearray, run_pending: bool) -> int:
    """EFER that L2 starts with: vmcs12's if loaded, else L1's with the long-mode bits of the entry controls."""
    entry = get(page, "vm_entry_controls")
    if run_pending and entry & vmx.ENTRY_LOAD_EFER:
        return get(page, "guest_ia32_efer")
    return _with_long_mode(registers["ia32_efer"], bool(entry & vmx.ENTRY_IA32E))


def save_guest(registers: dict[str, int], page: bytearray, mp_state: str) -> None:
    """Refresh vmcs12's guest state from the live registers of L2.

    PAT, DEBUGCTL and BNDCFGS are not among them: a guest's write reaches vmcs12 at once, so vmcs12 has them already.
    """
    for name in PLAIN:
        put(page, f"guest_{name}", registers[name])
    put(page, "guest_interruptibility_info", registers["interruptibility_info"])
    put(page, "guest_linear_address", registers["linear_address"])
    put(page, "guest_activity_state", {"halted": 1, "wait-for-sipi": 3}.get(mp_state, 0))
    secondary = active_secondary(page)
    if secondary & vmx.SEC_EPT and pae_paging(registers):
        for index in range(4):
            put(page, f"guest_pdptr{index}", registers[f"pdptr{index}"])
    if secondary & vmx.SEC_INTERRUPT_DELIVERY:
        put(page, "guest_intr_status", registers["intr_status"])
    long_mode = vmx.ENTRY_IA32E if registers["ia32_efer"] & vmx.EFER_LMA else 0
    put(page, "vm_entry_controls", get(page, "vm_entry_controls") & ~vmx.ENTRY_IA32E | long_mode)
    exits = get(page, "vm_exit_controls")
    if exits & vmx.EXIT_SAVE_DEBUG:
        put(page, "guest_dr7", registers["dr7"])
    if exits & vmx.EXIT_SAVE_EFER:
        put(page, "guest_ia32_efer", registers["ia32_efer"])


def load_host(registers: dict[str, int], page: bytearray) -> None:
    """Give L1 the registers of vmcs12's host state, as a VM exit does. MSR lists are the caller's business."""
    exits = get(page, "vm_exit_controls")
    wide = bool(exits & vmx.EXIT_HOST_64BIT)
    if exits & vmx.EXIT_LOAD_EFER:
        registers["ia32_efer"] = get(page, "host_ia32_efer")
    else:
        registers["ia32_efer"] = _with_long_mode(registers["ia32_efer"], wide)
    for name in ("cr0", "cr3", "cr4", "rsp", "rip"):
        registers[name] = get(page, f"host_{name}")
    for name in ("sysenter_cs", "sysenter_esp", "sysenter_eip"):
        registers[name] = get(page, f"host_ia32_{name}")
    if exits & vmx.EXIT_LOAD_PAT:
        registers["ia32_pat"] = get(page, "host_ia32_pat")
    if exits & vmx.EXIT_CLEAR_BNDCFGS:
        registers["bndcfgs"] = 0
    for name in ("es", "ss", "ds", "fs", "gs"):
        base = get(page, f"host_{name}_base") if name in ("fs", "gs") else 0
        _set_segment(registers, name, get(page, f"host_{name}_selector"), base, 0xFFFF_FFFF, 0xC093)
    _set_segment(registers, "cs", get(page, "host_cs_selector"), 0, 0xFFFF_FFFF, 0xA09B if wide else 0xC09B)
    _set_segment(registers, "tr", get(page, "host_tr_selector"), get(page, "host_tr_base"), 0x67, 0x8B)
    _set_segment(registers, "ldtr", 0, 0, 0, _UNUSABLE)
    for name in TABLES:
        registers[f"{name}_base"] = get(page, f"host_{name}_base")
        registers[f"{name}_limit"] = 0xFFFF
    registers.update(
        rflags=_RFLAGS_FIXED, interruptibility_info=0, pending_dbg_exceptions=0, dr7=DR7_FIXED, ia32_debugctl=0
    )


def set_dr7(registers: dict[str, int], value: int) -> None:
    """Write DR7 as MOV does; a value with high bits set is refused and changes nothing."""
    if not value >> 32:
        registers["dr7"] = value & _DR7_WRITABLE | DR7_FIXED


def active_secondary(page: bytes | bytearray) -> int:
    """Secondary controls of vmcs12, 0 while they are not activated."""
    active = get(page, "cpu_based_vm_exec_control") & vmx.PROC_SECONDARY
    return get(page, "secondary_vm_exec_control") if active else 0


def pae_paging(registers: dict[str, int]) -> bool:
    """32-bit paging with PAE."""
    paging = registers["cr0"] & CR0_PG and registers["cr4"] & CR4_PAE
    return bool(paging) and not registers["ia32_efer"] & vmx.EFER_LMA


def privilege_level(registers: dict[str, int]) -> int:
    """Current privilege level: the DPL of SS; 0 in real mode."""
    return registers["ss_ar_bytes"] >> 5 & 3 if registers["cr0"] & CR0_PE else 0


def _with_long_mode(efer: int, wanted: bool) -> int:
    bits = vmx.EFER_LMA | vmx.EFER_LME
    return efer | bits if wanted else efer & ~bits


def _set_segment(registers: dict[str, int], name: str, selector: int, base: int, limit: int, access: int) -> None:
    registers[f"{name}_selector"] = selector
    registers[f"{name}_base"] = base
    registers[f"{name}_limit"] = limit
    registers[f"{name}_ar_bytes"] = access
