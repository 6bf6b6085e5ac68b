"""The two KVMs, as one table of choices about sub-page write protection.

``kvm-2019`` is version 4 of the patch series (2019-08-14), ``kvm-latest`` version 12 (2020-05-16) with the fault
semantics of version 11. Where the one or the other crashes or corrupts a host, loops for ever or leaves a hole that
nobody wants, both do something else: ``docs/profiles.md`` lists each such case.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from engine.errors import InvalidValue

# Bits of ``Machine.caps[CAP_KVM]``: the choices that kernels read.
KVM_FILL_IN_SET = 1 << 0
KVM_FILL_REGION = 1 << 1
KVM_SAVED_BIT = 1 << 2
KVM_FORCE_SMALL = 1 << 3
KVM_SET_ZAPS = 1 << 4
KVM_MISS_NEEDS_SLOT = 1 << 5
KVM_EMULATOR_CHECKS = 1 << 6


class Profile(NamedTuple):
    """What one KVM does. The first group is for the operations, the second for faults, the third for user space."""

    name: str
    series: str

    enable_call: str  # what switches SPP on
    enable_tests: tuple[str, ...]  # in order; the first that fails gives the error
    unsupported_errno: str  # no SPP or no EPT
    nested_errno: str | None  # nesting allowed; None: not looked at
    enable_flags_errno: str | None  # flags of the enabling call are not 0; None: it has no flags
    max_pages: int  # of one GET or SET through the ABI
    too_many_errno: str
    npages_zero_errno: str | None  # None: returns 0
    access_flags_errno: str | None  # flags of GET and SET are not 0; None: they have none
    subpage_header: int  # bytes before access_map
    fixed_map: bool  # the struct has room for max_pages maps, and is copied whole
    get_failure_copies: bool  # a GET that fails copies the maps before the failing page out
    set_with_hole: str  # what a SET that meets a page without a slot has done: "applied" or "stored" the pages before
    hole_after_mapped_returns_zero: bool  # such a SET returns 0 where a page before was mapped
    check_extension: int  # what KVM_CHECK_EXTENSION says about the capability; 0: there is none
    capability: int | None

    sppt_per_vcpu: bool  # a tree for each vCPU, or one for the VM
    control_from_birth: bool  # secondary control 23 on at vCPU creation, or by the enabling call
    fill_in_set: bool  # SET and faults write vectors, or only the miss handler
    fill_region: bool  # a miss fills the 512 pages of the region, or its own page
    miss_needs_slot: bool  # a miss of a page without a slot fails KVM_RUN with EFAULT
    force_small: bool  # no huge mapping over protected pages
    set_zaps: bool  # SET drops the mappings of its pages
    saved_bit: bool  # bit 61 is put aside while KVM itself forbids writes
    saved_shift: int  # where access tracking keeps read; the SPP bit is above it, execute above that
    emulator_checks: bool  # writes that KVM emulates obey sub-page permissions

    exit_spp: int  # KVM_EXIT_SPP
    skips_instruction: bool  # the guest is past the store when user space sees the exit
    reports_length: bool  # kvm_run.spp.insn_len

    def caps(self) -> int:
        """The choices that kernels read, as ``CAP_KVM`` holds them."""
        chosen = {
            KVM_FILL_IN_SET: self.fill_in_set,
            KVM_FILL_REGION: self.fill_region,
            KVM_SAVED_BIT: self.saved_bit,
            KVM_FORCE_SMALL: self.force_small,
            KVM_SET_ZAPS: self.set_zaps,
            KVM_MISS_NEEDS_SLOT: self.miss_needs_slot,
            KVM_EMULATOR_CHECKS: self.emulator_checks,
        }
        return sum(bit for bit, on in chosen.items() if on)


KVM_2019 = Profile(
    name="kvm-2019",
    series="v4",
    enable_call="KVM_INIT_SPP",
    enable_tests=("support", "active", "allocation"),
    unsupported_errno="EINVAL",
    nested_errno=None,
    enable_flags_errno=None,
    max_pages=64,
    too_many_errno="EINVAL",
    npages_zero_errno="EINVAL",
    access_flags_errno=None,
    subpage_header=16,
    fixed_map=True,
    get_failure_copies=True,
    set_with_hole="applied",
    hole_after_mapped_returns_zero=True,
    check_extension=0,
    capability=None,
    sppt_per_vcpu=True,
    control_from_birth=True,
    fill_in_set=True,
    fill_region=False,
    miss_needs_slot=True,
    force_small=False,
    set_zaps=False,
    saved_bit=False,
    saved_shift=52,
    emulator_checks=False,
    exit_spp=28,
    skips_instruction=True,
    reports_length=False,
)

KVM_LATEST = Profile(
    name="kvm-latest",
    series="v12, faults of v11",
    enable_call="KVM_ENABLE_CAP",
    enable_tests=("flags", "nested", "support", "active", "allocation"),
    unsupported_errno="ENODEV",
    nested_errno="EPERM",
    enable_flags_errno="EINVAL",
    max_pages=512,
    too_many_errno="EINVAL",
    npages_zero_errno=None,
    access_flags_errno="EINVAL",
    subpage_header=16,
    fixed_map=False,
    get_failure_copies=False,
    set_with_hole="stored",
    hole_after_mapped_returns_zero=False,
    check_extension=512,
    capability=182,
    sppt_per_vcpu=False,
    control_from_birth=False,
    fill_in_set=False,
    fill_region=True,
    miss_needs_slot=False,
    force_small=True,
    set_zaps=True,
    saved_bit=True,
    saved_shift=54,
    emulator_checks=True,
    exit_spp=29,
    skips_instruction=False,
    reports_length=True,
)

TABLE: Mapping[str, Profile] = MappingProxyType({row.name: row for row in (KVM_2019, KVM_LATEST)})


def profile_of(name: str) -> Profile:
    """The row of a profile. Raises InvalidValue."""
    if name not in TABLE:
        raise InvalidValue(f"must be one of {', '.join(TABLE)}", field="profile", value=name)
    return TABLE[name]
