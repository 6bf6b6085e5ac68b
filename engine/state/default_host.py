"""The host that a machine has unless told otherwise: raw values of the capability MSRs that a host can be given."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from engine.arch import ept

# IA32_VMX_EPT_VPID_CAP of the default host: an Ice Lake server without advanced exit information, so that the
# qualification has no more than the bits every part reports; ``host.vmx_capabilities`` changes it.
EPT_VPID_CAP = 0x0000_0F01_0633_41C1
assert EPT_VPID_CAP & ept.CAP_WALK_5

# IA32_VMX_PROCBASED_CTLS2: its high half is the secondary controls that may be 1, all that such a server has, sub-page
# write permissions (bit 23) among them. IA32_VMX_PROCBASED_CTLS3 is the tertiary controls that may be 1: it has none.
PROCBASED_CTLS2 = 0x07DF_FFFF_0000_0000
PROCBASED_CTLS3 = 0

# Capabilities a host can be given by name, as raw MSR values.
VMX_CAPABILITIES: Mapping[str, int] = MappingProxyType(
    {"ept_vpid_cap": EPT_VPID_CAP, "procbased_ctls2": PROCBASED_CTLS2, "procbased_ctls3": PROCBASED_CTLS3}
)
