"""Numbers of the Hyper-V MSRs that a vCPU has to know for nesting. Source: Microsoft TLFS."""

from __future__ import annotations

HV_GUEST_OS_ID = 0x4000_0000
HV_HYPERCALL = 0x4000_0001
HV_VP_INDEX = 0x4000_0002
HV_VP_ASSIST_PAGE = 0x4000_0073

NAMES = {
    HV_GUEST_OS_ID: "HV_X64_MSR_GUEST_OS_ID",
    HV_HYPERCALL: "HV_X64_MSR_HYPERCALL",
    HV_VP_INDEX: "HV_X64_MSR_VP_INDEX",
    HV_VP_ASSIST_PAGE: "HV_X64_MSR_VP_ASSIST_PAGE",
}
