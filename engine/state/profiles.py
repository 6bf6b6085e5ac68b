"""What differs between the KVMs that a machine can have: one table, a column for each kernel.

Rows are grouped by the package that goes by them. A difference that is no row here is a ``profiles`` entry in a table
of checks or of ioctls. ``kvm-2019`` is Linux 5.3 with version 4 of the sub-page series (2019-08-14), ``kvm-latest``
today's Linux with version 12 (2020-05-16) and the fault semantics of version 11. Where the one or the other crashes or
corrupts a host, loops for ever or leaves a hole that nobody wants, both do something else: ``docs/profiles.md`` lists
each such case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, Literal, Never, TypeVar

from engine.arch import kvm_nested_state as blob
from engine.arch import vmx_msrs as vmx
from engine.arch.evmcs import EVMCS, EVMCS_FIELDS, EVMCS_FIELDS_PACKED, EVMCS_PACKED
from engine.arch.hyperv_cpuid import leaves_2019, leaves_latest
from engine.errors import InvalidValue

ProfileName = Literal["kvm-2019", "kvm-latest"]
KVM_2019: Final = "kvm-2019"
KVM_LATEST: Final = "kvm-latest"
PROFILES: tuple[ProfileName, ...] = (KVM_2019, KVM_LATEST)
ONLY_2019: tuple[ProfileName, ...] = (KVM_2019,)
ONLY_LATEST: tuple[ProfileName, ...] = (KVM_LATEST,)

T = TypeVar("T")


class Row(Generic[T]):
    """What the kernel of 2019 does, and what the latest does. Read through a column it is the one or the other."""

    def __init__(self, of_2019: T, latest: T) -> None:
        self._values = of_2019, latest

    def __get__(self, column: Column, _: type[Column]) -> T:
        return self._values[column.number]

    def __set__(self, column: Column, value: Never) -> None:
        raise AttributeError("the table is fixed")


class Column:
    """The rows of one group as one kernel has them; ``number`` is its place in PROFILES."""

    def __init__(self, number: int) -> None:
        self.number = number


class SubpageRows(Column):
    """Sub-page write protection (``kvm``): the ioctls, then faults, then what user space is told."""

    series = Row("v4", "v12, faults of v11")
    enable_call = Row("KVM_INIT_SPP", "KVM_ENABLE_CAP")  # what switches SPP on
    # In order; the first that fails gives the error.
    enable_tests = Row(
        ("support", "active", "allocation"),
        ("flags", "nested", "support", "active", "allocation"),
    )
    unsupported_errno = Row("EINVAL", "ENODEV")  # no SPP or no EPT
    nested_errno = Row(None, "EPERM")  # nesting allowed; None: not looked at
    excludes_nesting = Row(False, True)  # unless the host says otherwise, nesting is off once SPP is on
    enable_flags_errno = Row(None, "EINVAL")  # flags of the enabling call are not 0; None: it has no flags
    max_pages = Row(64, 512)  # of one GET or SET through the ABI
    too_many_errno = Row("EINVAL", "EINVAL")
    npages_zero_errno = Row("EINVAL", None)  # None: returns 0
    access_flags_errno = Row(None, "EINVAL")  # flags of GET and SET are not 0; None: they have none
    subpage_header = Row(16, 16)  # bytes before access_map
    fixed_map = Row(True, False)  # the struct has room for max_pages maps, and is copied whole
    get_failure_copies = Row(True, False)  # a GET that fails copies the maps before the failing page out
    set_with_hole = Row("applied", "stored")  # the pages before, by a SET that meets a page without a slot
    hole_after_mapped_returns_zero = Row(True, False)  # such a SET returns 0 where a page before was mapped
    check_extension = Row(0, 512)  # what KVM_CHECK_EXTENSION says about the capability; 0: there is none
    capability = Row(None, 182)

    sppt_per_vcpu = Row(True, False)  # a tree for each vCPU, or one for the VM
    control_from_birth = Row(True, False)  # secondary control 23 on at vCPU creation, or by the enabling call
    fill_in_set = Row(True, False)  # SET and faults write vectors, or only the miss handler
    fill_region = Row(False, True)  # a miss fills the 512 pages of the region, or its own page
    miss_needs_slot = Row(True, False)  # a miss of a page without a slot fails KVM_RUN with EFAULT
    force_small = Row(False, True)  # no huge mapping over protected pages
    set_zaps = Row(False, True)  # SET drops the mappings of its pages
    saved_bit = Row(False, True)  # bit 61 is put aside while KVM itself forbids writes
    saved_shift = Row(52, 54)  # where access tracking keeps read; the SPP bit is above it, execute above that
    emulator_checks = Row(False, True)  # writes that KVM emulates obey sub-page permissions
    marks_special = Row(True, False)  # an EPT entry that marks MMIO has bit 62; or it has neither bit 63 nor bit 11
    refuses_delivery = Row(True, False)  # an EPT misconfiguration while an event is delivered is an internal error

    exit_spp = Row(28, 29)  # KVM_EXIT_SPP
    skips_instruction = Row(True, False)  # the guest is past the store when user space sees the exit
    reports_length = Row(False, True)  # kvm_run.spp.insn_len


class LimitRows(Column):
    """Memory slots and vCPUs (``kvm``, ``ioctls``): include/asm/kvm_host.h of Linux 5.3 and 7.1."""

    user_slots = Row(509, 32764)  # of one address space
    soft_vcpus = Row(240, 1024)  # how many are recommended
    vcpus = Row(288, 1024)  # of a machine
    vcpu_ids = Row(1023, 4096)  # to choose from
    vcpu_ids_chosen = Row(False, True)  # KVM_CAP_MAX_VCPU_ID can be enabled, with a lower limit
    checks_boot_vcpu = Row(False, True)  # KVM_SET_BOOT_CPU_ID wants an id that there can be
    tells_room = Row(False, True)  # KVM_CAP_MAX_VCPUS of a VM says what that VM has room for


class VcpuRows(Column):
    """A vCPU's CPUID, MSRs and registers, and their ioctls (``vcpu``, ``ioctls``): Linux 5.3 and 7.1."""

    max_cpuid_entries = Row(80, 256)  # where KVM_SET_CPUID2 must stop
    cpuid_freezes = Row(False, True)  # new contents are refused after the first run and in L2
    refused_cpuid_sticks = Row(True, False)  # a CPUID that is refused for its contents is in force all the same
    reports_cpuid_count = Row(False, True)  # KVM_GET_CPUID2 says how many leaves there are
    # KVM_SET_SREGS looks at CR0, CR3 and reserved bits of CR4, and keeps the rights of an unusable segment.
    strict_sregs = Row(False, True)
    invvpid_by_host = Row(False, True)  # its address has the host's width, or that of CR4.LA57
    runtime_cpuid_needs_leaf_1 = Row(True, False)  # without it no leaf follows CR4, XCR0 and the APIC
    takes_same_apic_base = Row(False, True)  # a write that changes nothing is not looked at
    # Bits of IA32_FEATURE_CONTROL that the host may set whatever the guest CPUID has.
    feature_control_of_host = Row(vmx.FEATURE_CONTROL_LOCKED, vmx.FEATURE_CONTROL_ALL)
    hwcr_bits = Row(1 << 18, 1 << 18 | 1 << 24)  # of MSR 0xC0010015: McStatusWrEn; TscFreqSel
    hwcr_clears = Row(False, True)  # a write of 0 to it is stored
    # The capability MSRs of a guest hypervisor; host writes are measured against the vCPU's own values, or the host's.
    vmx_controls = Row(vmx.CONTROLS_2019, vmx.CONTROLS_LATEST)
    vmx_values = Row(vmx.VALUES_2019, vmx.VALUES_LATEST)
    capabilities_only_shrink = Row(True, False)
    xsave_normalised = Row(False, True)  # KVM_GET_XSAVE shows components that are not present as initial
    x2apic_id_fixed = Row(False, True)  # KVM_SET_LAPIC ignores the id in x2APIC mode
    x2apic_command_is_one = Row(False, True)  # the command register has 64 bits in x2APIC mode, on Intel
    lapic_timer_reported = Row(False, True)  # KVM_GET_LAPIC says what is left of the timer's count
    run_tells_guest_mode = Row(False, True)  # KVM_RUN says in the run page whether the vCPU is in L2
    run_tells_cpu = Row(False, True)  # and, where an entry failed, on which processor
    mp_states_known = Row(False, True)  # KVM_SET_MP_STATE refuses a number that is none
    smm_excludes_waiting = Row(True, False)  # who is in SMM cannot be made to wait for a SIPI, or is refused to run


class NestedRows(Column):
    """Nested state and the enlightened VMCS (``nested``): Linux 5.3 and 7.1."""

    # Bits of kvm_nested_state.flags that the generic part lets through.
    flags_mask = Row(
        blob.GUEST_MODE | blob.RUN_PENDING | blob.EVMCS,
        blob.GUEST_MODE | blob.RUN_PENDING | blob.EVMCS | blob.MTF_PENDING | blob.GIF_SET,
    )
    entry_failure = Row(1, 2)  # what SET returns when a blob passes every check and entering L2 then fails
    set_loads_pdptes = Row(True, False)  # such a failure may be due to the PDPTEs, or they are loaded at the next run
    keeps_same_cr3 = Row(True, False)  # a CR3 that entering L2 does not change is not looked at
    hooks_always = Row(False, True)  # the state hooks exist without nesting and on AMD hosts
    # A vmcs12 counts as present while an enlightened VMCS is set but not yet mapped, and GET reports EVMCS.
    map_pending = Row(False, True)
    reports_timer = Row(False, True)  # GET knows the preemption timer deadline and MTF
    get_ignores_clean = Row(False, True)  # GET in L1 copies all fields whatever the clean bits say; not to is a bug
    smm_leaves_nested = Row(False, True)  # toggling SMM from user space leaves nested mode
    evmcs_needs_hyperv = Row(False, True)  # attaching one also needs Hyper-V in the guest CPUID
    evmcs_clears_controls = Row(True, False)  # enabling it takes controls from the vCPU for good, or filters
    assist_size = Row(56, 624)  # of the assist page that is read
    enlighten_size = Row(4, 1)  # of its enlighten_vmentry
    # The enlightened VMCS as the kernel sees it, and the directions of EvmcsField.copies that mean "into vmcs12".
    evmcs = Row(EVMCS_PACKED, EVMCS)
    evmcs_fields = Row(EVMCS_FIELDS_PACKED, EVMCS_FIELDS)
    copies_in = Row(frozenset("I"), frozenset("Ii"))


# #DF, #TS, #NP, #SS, #GP, #PF, #AC
_ERROR_CODE_VECTORS = frozenset({8, 10, 11, 12, 13, 14, 17})


class EntryRows(Column):
    """The checks of a VM entry (``nested``): Linux 5.3 and 7.1."""

    ept_walks = Row((4,), (4, 5))  # lengths that are looked up in the capability MSR
    ept_walk_4_assumed = Row(True, False)
    msr_lists_limited = Row(False, True)  # at most 512 entries for each step of IA32_VMX_MISC
    error_code_bits = Row(15, 16)  # width of an injected error code
    error_code_vectors = Row(_ERROR_CODE_VECTORS, _ERROR_CODE_VECTORS | {21})  # that carry one
    error_code_relaxable = Row(False, True)  # a capability bit may relax that
    activity_states = Row((0, 1), (0, 1, 3))  # that L2 may start in: active and halted; wait-for-SIPI too
    checks_address_space = Row(False, True)  # VMLAUNCH compares the host address-space size with EFER.LMA


class HypervRows(Column):
    """Hyper-V as KVM offers it, and KVM as Hyper-V's guest (``vcpu``, ``hyperv``): Linux 5.3 and 7.1.

    Flushes of ``kvm-2019`` are those of Linux 6.16: 5.3 flushes everything for a list, and serves no nested guest.
    """

    leaves = Row(leaves_2019, leaves_latest)  # that KVM_GET_SUPPORTED_HV_CPUID lists
    leaves_without_vcpu = Row(False, True)  # that ioctl on the system device
    enforces_cpuid = Row(False, True)  # KVM_CAP_HYPERV_ENFORCE_CPUID
    flushes_each_page = Row(False, True)  # of a range of a flush list, or by its first address: 7.1 and 6.16
    flushes_on_svm = Row(False, True)  # on AMD, too, KVM asks Hyper-V to serve its guests' flushes


@dataclass(frozen=True)
class KvmVersion:
    """One kernel: its column of every group."""

    name: ProfileName
    subpages: SubpageRows
    limits: LimitRows
    vcpu: VcpuRows
    nested: NestedRows
    entry: EntryRows
    hyperv: HypervRows


_VERSIONS: dict[str, KvmVersion] = {
    name: KvmVersion(
        name,
        SubpageRows(column),
        LimitRows(column),
        VcpuRows(column),
        NestedRows(column),
        EntryRows(column),
        HypervRows(column),
    )
    for column, name in enumerate(PROFILES)
}


def kvm_version(profile: str) -> KvmVersion:
    """The kernel called ``profile``. Raises InvalidValue."""
    version = _VERSIONS.get(profile)
    if version is None:
        raise InvalidValue(f"profile is one of {', '.join(PROFILES)}", field="profile", value=profile)
    return version
