"""The two kernels, as one table of choices: v5.3 (``kvm-2019``) and v7.1 (``kvm-latest``).

Every difference in nesting between the profiles is a column here, an ``eras`` entry in a table of checks, or a pair of
values in ``engine.arch``.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch import nested_state as abi
from engine.arch.evmcs import EVMCS, EVMCS_FIELDS, EVMCS_FIELDS_PACKED, EVMCS_PACKED, EvmcsField
from engine.arch.struct_layout import Layout
from engine.errors import InvalidValue

KVM_2019 = "kvm-2019"
KVM_LATEST = "kvm-latest"
BOTH = (KVM_2019, KVM_LATEST)
ONLY_2019 = (KVM_2019,)
ONLY_LATEST = (KVM_LATEST,)


@dataclass(frozen=True)
class Era:
    """Choices of one kernel. The comments give the values of 2019 first, then today's."""

    name: str
    # Bits of kvm_nested_state.flags that the generic part lets through: 0x7, 0x10f.
    flags_mask: int
    # What the ioctl returns when a blob passes every check and entering L2 then fails: 1, 2.
    entry_failure: int
    # The state hooks exist without nesting and on AMD hosts: no, yes.
    hooks_always: bool
    # A vmcs12 counts as present while an enlightened VMCS is set but not yet mapped, and GET reports EVMCS: no, yes.
    map_pending: bool
    # GET knows the preemption timer deadline and MTF: no, yes.
    reports_timer: bool
    # GET in L1 copies the enlightened VMCS whatever its clean bits say: no (a bug), yes.
    get_ignores_clean: bool
    # Attaching an enlightened VMCS also needs Hyper-V in the guest CPUID: no, yes.
    evmcs_needs_hyperv: bool
    # Enabling it takes controls away from the vCPU for good: yes, no (it filters instead).
    evmcs_clears_controls: bool
    # Size of the assist page that is read and of its enlighten_vmentry: 56 and 4, 624 and 1.
    assist_size: int
    enlighten_size: int
    # The enlightened VMCS as the kernel sees it.
    evmcs: Layout
    evmcs_fields: tuple[EvmcsField, ...]
    # Directions of EvmcsField.copies that mean "into vmcs12".
    copies_in: frozenset[str]
    # Host writes to capability MSRs are measured against the vCPU's own values: yes, no (the host's).
    capabilities_only_shrink: bool
    # KVM_SET_CPUID2 with new contents is refused after the first run and in L2: no, yes.
    cpuid_freezes: bool
    # A CPUID that is refused for its contents is in force all the same: yes, no.
    refused_cpuid_sticks: bool
    # Toggling SMM from user space leaves nested mode: no, yes.
    smm_leaves_nested: bool
    # Where must KVM_SET_CPUID2 stop: 80, 256 entries.
    max_cpuid_entries: int
    # VM-entry checks. EPT walk lengths that are looked up in the capability MSR: 4 (taken for granted), 4 and 5.
    ept_walks: tuple[int, ...]
    ept_walk_4_assumed: bool
    # MSR lists may have at most 512 entries for each step of IA32_VMX_MISC: no, yes.
    msr_lists_limited: bool
    # Width of an injected error code: 15, 16 bits; vectors that carry one; may a capability bit relax that: no, yes.
    error_code_bits: int
    error_code_vectors: frozenset[int]
    error_code_relaxable: bool
    # Activity states that L2 may start in: active and halted; wait-for-SIPI too.
    activity_states: tuple[int, ...]
    # VMLAUNCH compares the host address-space size with EFER.LMA: no, yes.
    checks_address_space: bool
    # KVM_SET_SREGS looks at CR0, CR3 and reserved bits of CR4, and keeps the rights of an unusable segment: no, yes.
    strict_sregs: bool
    # KVM_GET_CPUID2 says how many leaves there are: no, yes.
    reports_cpuid_count: bool
    # A failing SET may be due to the PDPTEs: yes, no (they are loaded at the next run).
    set_loads_pdptes: bool


# #DF, #TS, #NP, #SS, #GP, #PF, #AC
_ERROR_CODE_VECTORS = frozenset({8, 10, 11, 12, 13, 14, 17})

ERAS: dict[str, Era] = {
    KVM_2019: Era(
        name=KVM_2019,
        flags_mask=abi.GUEST_MODE | abi.RUN_PENDING | abi.EVMCS,
        entry_failure=1,
        hooks_always=False,
        map_pending=False,
        reports_timer=False,
        get_ignores_clean=False,
        evmcs_needs_hyperv=False,
        evmcs_clears_controls=True,
        assist_size=56,
        enlighten_size=4,
        evmcs=EVMCS_PACKED,
        evmcs_fields=EVMCS_FIELDS_PACKED,
        copies_in=frozenset("I"),
        capabilities_only_shrink=True,
        cpuid_freezes=False,
        refused_cpuid_sticks=True,
        smm_leaves_nested=False,
        max_cpuid_entries=80,
        ept_walks=(4,),
        ept_walk_4_assumed=True,
        msr_lists_limited=False,
        error_code_bits=15,
        error_code_vectors=_ERROR_CODE_VECTORS,
        error_code_relaxable=False,
        activity_states=(0, 1),
        checks_address_space=False,
        strict_sregs=False,
        reports_cpuid_count=False,
        set_loads_pdptes=True,
    ),
    KVM_LATEST: Era(
        name=KVM_LATEST,
        flags_mask=abi.GUEST_MODE | abi.RUN_PENDING | abi.EVMCS | abi.MTF_PENDING | abi.GIF_SET,
        entry_failure=2,
        hooks_always=True,
        map_pending=True,
        reports_timer=True,
        get_ignores_clean=True,
        evmcs_needs_hyperv=True,
        evmcs_clears_controls=False,
        assist_size=624,
        enlighten_size=1,
        evmcs=EVMCS,
        evmcs_fields=EVMCS_FIELDS,
        copies_in=frozenset("Ii"),
        capabilities_only_shrink=False,
        cpuid_freezes=True,
        refused_cpuid_sticks=False,
        smm_leaves_nested=True,
        max_cpuid_entries=256,
        ept_walks=(4, 5),
        ept_walk_4_assumed=False,
        msr_lists_limited=True,
        error_code_bits=16,
        error_code_vectors=_ERROR_CODE_VECTORS | {21},
        error_code_relaxable=True,
        activity_states=(0, 1, 3),
        checks_address_space=True,
        strict_sregs=True,
        reports_cpuid_count=True,
        set_loads_pdptes=False,
    ),
}


def era_of(profile: str) -> Era:
    """The era called ``profile``. Raises InvalidValue for any other name."""
    era = ERAS.get(profile)
    if era is None:
        raise InvalidValue("must be kvm-2019 or kvm-latest", field="profile", value=profile)
    return era
