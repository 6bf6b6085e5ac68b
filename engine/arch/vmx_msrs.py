"""VMX capability MSRs: numbers, control bits, and the values that KVM gives a guest hypervisor.

A control MSR holds the bits that must be 1 in its low half and the bits that may be 1 in its high half. The values are
those of a typical Intel host with EPT and unrestricted guest, without APIC virtualisation, MPX and CET. For the
secondary controls, EPT capabilities and miscellaneous data the exact value depends on the host; the ones here are what
KVM offers on such a host.
Source: Intel SDM volume 3, appendix A; Linux v5.3 and v7.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

IA32_FEATURE_CONTROL = 0x3A
FEATURE_CONTROL_LOCKED = 0x1
FEATURE_CONTROL_VMXON_IN_SMX = 0x2
FEATURE_CONTROL_VMXON = 0x4
# All bits that Linux 7.1 knows: these three, SGX launch control (17), SGX (18) and LMCE (20).
FEATURE_CONTROL_ALL = 0x16_0007

EFER = 0xC000_0080
EFER_SCE = 0x1
EFER_LME = 0x100
EFER_LMA = 0x400
EFER_NX = 0x800
EFER_SVME = 0x1000

MSR_BY_NAME = {
    "IA32_VMX_BASIC": 0x480,
    "IA32_VMX_PINBASED_CTLS": 0x481,
    "IA32_VMX_PROCBASED_CTLS": 0x482,
    "IA32_VMX_EXIT_CTLS": 0x483,
    "IA32_VMX_ENTRY_CTLS": 0x484,
    "IA32_VMX_MISC": 0x485,
    "IA32_VMX_CR0_FIXED0": 0x486,
    "IA32_VMX_CR0_FIXED1": 0x487,
    "IA32_VMX_CR4_FIXED0": 0x488,
    "IA32_VMX_CR4_FIXED1": 0x489,
    "IA32_VMX_VMCS_ENUM": 0x48A,
    "IA32_VMX_PROCBASED_CTLS2": 0x48B,
    "IA32_VMX_EPT_VPID_CAP": 0x48C,
    "IA32_VMX_TRUE_PINBASED_CTLS": 0x48D,
    "IA32_VMX_TRUE_PROCBASED_CTLS": 0x48E,
    "IA32_VMX_TRUE_EXIT_CTLS": 0x48F,
    "IA32_VMX_TRUE_ENTRY_CTLS": 0x490,
    "IA32_VMX_VMFUNC": 0x491,
}
VMX_MSR_FIRST = 0x480
VMX_MSR_LAST = 0x491

# Pin-based VM-execution controls
PIN_EXTERNAL_INTERRUPT = 1 << 0
PIN_NMI_EXITING = 1 << 3
PIN_VIRTUAL_NMIS = 1 << 5
PIN_PREEMPTION_TIMER = 1 << 6
PIN_POSTED_INTERRUPTS = 1 << 7

# Primary processor-based controls
PROC_TSC_OFFSET = 1 << 3
PROC_TPR_SHADOW = 1 << 21
PROC_NMI_WINDOW = 1 << 22
PROC_IO_BITMAPS = 1 << 25
PROC_MONITOR_TRAP = 1 << 27
PROC_MSR_BITMAPS = 1 << 28
PROC_SECONDARY = 1 << 31

# Secondary processor-based controls
SEC_APIC_ACCESSES = 1 << 0
SEC_EPT = 1 << 1
SEC_DESCRIPTOR_TABLES = 1 << 2
SEC_RDTSCP = 1 << 3
SEC_X2APIC = 1 << 4
SEC_VPID = 1 << 5
SEC_WBINVD = 1 << 6
SEC_UNRESTRICTED_GUEST = 1 << 7
SEC_APIC_REGISTERS = 1 << 8
SEC_INTERRUPT_DELIVERY = 1 << 9
SEC_PAUSE_LOOP = 1 << 10
SEC_RDRAND = 1 << 11
SEC_INVPCID = 1 << 12
SEC_VMFUNC = 1 << 13
SEC_SHADOW_VMCS = 1 << 14
SEC_RDSEED = 1 << 16
SEC_PML = 1 << 17
SEC_XSAVES = 1 << 20
SEC_MODE_BASED_EXECUTE = 1 << 22
SEC_TSC_SCALING = 1 << 25

# VM-exit controls
EXIT_SAVE_DEBUG = 1 << 2
EXIT_HOST_64BIT = 1 << 9
EXIT_LOAD_PERF_GLOBAL = 1 << 12
EXIT_ACK_INTERRUPT = 1 << 15
EXIT_SAVE_PAT = 1 << 18
EXIT_LOAD_PAT = 1 << 19
EXIT_SAVE_EFER = 1 << 20
EXIT_LOAD_EFER = 1 << 21
EXIT_SAVE_PREEMPTION_TIMER = 1 << 22
EXIT_CLEAR_BNDCFGS = 1 << 23
EXIT_LOAD_CET = 1 << 28

# VM-entry controls
ENTRY_LOAD_DEBUG = 1 << 2
ENTRY_IA32E = 1 << 9
ENTRY_LOAD_PERF_GLOBAL = 1 << 13
ENTRY_LOAD_PAT = 1 << 14
ENTRY_LOAD_EFER = 1 << 15
ENTRY_LOAD_BNDCFGS = 1 << 16
ENTRY_LOAD_CET = 1 << 20

VMFUNC_EPTP_SWITCHING = 1 << 0

# IA32_VMX_BASIC and IA32_VMX_MISC
BASIC_NO_ERROR_CODE_CHECK = 1 << 56
MISC_ZERO_LENGTH_INJECTION = 1 << 30

# IA32_VMX_EPT_VPID_CAP
EPT_WALK_4 = 1 << 6
EPT_WALK_5 = 1 << 7
EPT_UNCACHEABLE = 1 << 8
EPT_WRITE_BACK = 1 << 14
EPT_ACCESSED_DIRTY = 1 << 21

# Bits that the "true" MSRs let a guest clear and the older ones report as must-be-1.
CLASSIC_MUST1 = {"pin": 0x16, "proc": 0x0401_E172, "exit": 0x0003_6DFF, "entry": 0x0000_11FF}


class ControlValue(NamedTuple):
    """Bits that must be 1 and bits that may be 1, each in 32 bits."""

    must1: int
    may1: int


_SECONDARY = (
    SEC_APIC_ACCESSES
    | SEC_EPT
    | SEC_DESCRIPTOR_TABLES
    | SEC_RDTSCP
    | SEC_X2APIC
    | SEC_VPID
    | SEC_WBINVD
    | SEC_UNRESTRICTED_GUEST
    | SEC_RDRAND
    | SEC_INVPCID
    | SEC_VMFUNC
    | SEC_SHADOW_VMCS
    | SEC_RDSEED
    | SEC_PML
    | SEC_XSAVES
)

CONTROLS_2019: Mapping[str, ControlValue] = MappingProxyType(
    {
        "pin": ControlValue(0x0000_0016, 0x0000_007F),
        "proc": ControlValue(0x0400_6172, 0xFFF9_FFFE),
        "secondary": ControlValue(0, _SECONDARY),
        "exit": ControlValue(0x0003_6DFB, 0x007F_EFFF),
        "entry": ControlValue(0x0000_11FB, 0x0000_D3FF),
    }
)

CONTROLS_LATEST: Mapping[str, ControlValue] = MappingProxyType(
    {
        "pin": ControlValue(0x0000_0016, 0x0000_007F),
        "proc": ControlValue(0x0400_6172, 0xFFF9_FFFE),
        "secondary": ControlValue(0, _SECONDARY | SEC_TSC_SCALING),
        "exit": ControlValue(0x0003_6DFB, 0x007F_FFFF),
        "entry": ControlValue(0x0000_11FB, 0x0000_F3FF),
    }
)

# Execute-only, 4-level walk, write-back, 2 MiB and 1 GiB pages, INVEPT and its two kinds, accessed and dirty flags;
# INVVPID and its four kinds.
_EPT_VPID = 0x0000_0F01_0633_4041

# Save EFER.LMA, preemption timer rate 5, HLT, VMWRITE to any field; wait-for-SIPI since 2021; no CR3 targets.
_MISC = 0x2000_0065

VALUES_2019: Mapping[str, int] = MappingProxyType(
    {
        "basic": 0x00D8_1000_11E5_7ED0,
        "misc": _MISC,
        "cr0_fixed0": 0x8000_0021,
        "cr0_fixed1": 0xFFFF_FFFF,
        "cr4_fixed0": 0x2000,
        "vmcs_enum": 0x2E,
        "ept_vpid": _EPT_VPID,
        "vmfunc": VMFUNC_EPTP_SWITCHING,
    }
)

VALUES_LATEST: Mapping[str, int] = MappingProxyType(
    {
        "basic": 0x00D8_1000_11E5_7ED0,
        "misc": _MISC | 1 << 8,
        "cr0_fixed0": 0x8000_0021,
        "cr0_fixed1": 0xFFFF_FFFF,
        "cr4_fixed0": 0x2000,
        "vmcs_enum": 0x32,
        "ept_vpid": _EPT_VPID | EPT_WALK_5,
        "vmfunc": VMFUNC_EPTP_SWITCHING,
    }
)

# What a kernel of 2019 takes away for good from a vCPU on which the enlightened VMCS is enabled.
EVMCS_CLEARED = {"pin": 0xC0, "secondary": 0x0202_6701, "exit": 0x1000, "entry": 0x2000}
EVMCS_CLEARED_VMFUNC = VMFUNC_EPTP_SWITCHING

# What today's kernel leaves of the may-be-1 halves, in guest reads and in VM-entry checks, while the vCPU has both
# Hyper-V in its CPUID and the enlightened VMCS enabled.
EVMCS_SUPPORTED = {
    "pin": 0x0000_003F,
    "proc": 0xFFF9_FFFE,
    "secondary": 0xC519_98FE,
    "exit": 0x03BF_FFFF,
    "entry": 0x0007_F3FF,
}
EVMCS_SUPPORTED_VMFUNC = 0
