"""Fields of a vCPU by name: those VMCS fields and guest registers that decide about memory accesses.

Encodings of the VMCS fields are in SDM vol. 3D, appendix B; CPL stands for the DPL of SS.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from engine.arch import controls as ctl


class VmcsField(NamedTuple):
    """Where a field is kept: its word of a vCPU record, and how many bits it has."""

    word: int
    bits: int
    about: str


FIELDS: Mapping[str, VmcsField] = MappingProxyType(
    {
        "eptp": VmcsField(int(ctl.V_EPTP), 64, "EPT pointer."),
        "sppt_pointer": VmcsField(int(ctl.V_SPPTP), 64, "Sub-page-permission-table pointer, SPPTP."),
        "primary_controls": VmcsField(int(ctl.V_PRIMARY), 32, "Primary processor-based VM-execution controls."),
        "secondary_controls": VmcsField(int(ctl.V_SECONDARY), 32, "Secondary ones: bit 1 EPT, 17 PML, 23 SPP."),
        "tertiary_controls": VmcsField(int(ctl.V_TERTIARY), 64, "Tertiary processor-based VM-execution controls."),
        "pml_address": VmcsField(int(ctl.V_PML_ADDRESS), 64, "Address of the page-modification log."),
        "pml_index": VmcsField(int(ctl.V_PML_INDEX), 16, "Its next free entry; above 511 it is full."),
        "ve_information_address": VmcsField(int(ctl.V_VE_ADDRESS), 64, "Virtualization-exception information address."),
        "eptp_index": VmcsField(int(ctl.V_EPTP_INDEX), 16, "What a virtualization exception reports as EPTP index."),
        "vpid": VmcsField(int(ctl.V_VPID), 16, "Virtual-processor identifier."),
        "cr0": VmcsField(int(ctl.V_CR0), 64, "Guest CR0."),
        "cr3": VmcsField(int(ctl.V_CR3), 64, "Guest CR3."),
        "cr4": VmcsField(int(ctl.V_CR4), 64, "Guest CR4."),
        "efer": VmcsField(int(ctl.V_EFER), 64, "Guest IA32_EFER."),
        "cpl": VmcsField(int(ctl.V_CPL), 2, "Current privilege level of the guest."),
        "rflags": VmcsField(int(ctl.V_RFLAGS), 64, "Guest RFLAGS."),
        "pdpte0": VmcsField(int(ctl.V_PDPTE0), 64, "Guest PDPTE 0, used under PAE paging."),
        "pdpte1": VmcsField(int(ctl.V_PDPTE1), 64, "Guest PDPTE 1."),
        "pdpte2": VmcsField(int(ctl.V_PDPTE2), 64, "Guest PDPTE 2."),
        "interruptibility": VmcsField(
            int(ctl.V_INTERRUPTIBILITY), 32, "Guest interruptibility state: bit 3 blocking by NMI."
        ),
        "pdpte3": VmcsField(int(ctl.V_PDPTE3), 64, "Guest PDPTE 3."),
    }
)
