"""Faults of the binary ABI: ``engine/abi``, ``engine/ioctls`` and what they call."""

from __future__ import annotations

from .mutant import Mutant
from .paths import named

DIRTY_LOG_PY = "engine/ioctls/dirty_log.py"
ROUTE = "tests/service/api/system"
SPP, SLOTS = f"{ROUTE}/test_ioctls_spp.py", f"{ROUTE}/test_ioctls_slots.py"
VCPUS, DIRTY = f"{ROUTE}/test_ioctls_vcpus.py", f"{ROUTE}/test_ioctls_dirty_log.py"
MEMORY = "tests/engine/abi/test_user_memory.py"
REGISTRY = "tests/engine/ioctls/test_ioctl_registry.py"
DURABLE = "tests/engine/ioctls/test_durable_changes.py"
RECORDS_PY, RECORDS = "engine/machine/vcpu_records.py", "tests/engine/machine/test_vcpu_records.py"

MUTANTS = (
    Mutant(
        "ioctl-copy-out-all-or-nothing",
        "engine/abi/user_memory.py",
        "stored = data[: max(0, len(self.data) - first)]",
        "stored = data if first + len(data) <= len(self.data) else data[:0]",
        "what fits is copied out before the fault",
        named(MEMORY, "what_fits_is_stored_before_the_fault"),
    ),
    Mutant(
        "ioctl-wrong-level-of-vm",
        "engine/abi/call.py",
        '_WRONG_LEVEL = {SYSTEM: "EINVAL", VM: "ENOTTY", VCPU: "EINVAL"}',
        '_WRONG_LEVEL = {SYSTEM: "ENOTTY", VM: "ENOTTY", VCPU: "ENOTTY"}',
        "only a VM answers ENOTTY",
        named(MEMORY, "levels_answer_what_they_do_not_know_as_the_kernel_does"),
    ),
    Mutant(
        "ioctl-of-another-era",
        "engine/ioctls/registry.py",
        "if row is None or target.profile not in row.profiles:",
        "if row is None:",
        "an ioctl that another era has is unknown",
        named(REGISTRY, "another_era_does_not_know_the_ioctl"),
    ),
    Mutant(
        "ioctl-flags-after-range",
        "engine/ioctls/subpages.py",
        "if flags and abi.access_flags_errno is not None:",
        "if flags and npages and abi.access_flags_errno is not None:",
        "flags are refused before an empty range",
        named(SPP, "flags_are_refused_before_an_empty_range"),
    ),
    Mutant(
        "ioctl-get-keeps-partial-maps",
        "engine/ioctls/subpages.py",
        "if whole or kvm_version(target.profile).subpages.get_failure_copies:",
        "if whole:",
        "in 2019 a GET that fails copies out what it has",
        named(SPP, "get_over_a_hole"),
    ),
    Mutant(
        "ioctl-set-fails-after-mapped",
        "engine/ioctls/partial_set.py",
        "returns = 0 if spp_set.any_mapped(draft.machine, gfn, before, trail) else None",
        "returns = None",
        "in 2019 a SET over a hole returns 0 once a page was mapped",
        named(SPP, "old_set_over_a_hole_applies_the_pages_before"),
    ),
    Mutant(
        "ioctl-set-touches-mappings",
        "engine/ioctls/partial_set.py",
        'if whole or self._abi.set_with_hole == "applied":',
        "if whole or before:",
        "later a SET over a hole stores maps and touches no mapping",
        named(SPP, "later_set_over_a_hole_stores_the_maps_before_and_touches_no_mapping"),
    ),
    Mutant(
        "ioctl-set-keeps-regions",
        "engine/kvm/spp_set.py",
        "mapping.invalidate_region(m, at)",
        "pass",
        "a later SET invalidates the regions of its range before anything can fail",
        named(SPP, "later_set_over_a_hole_invalidates_the_regions_all_the_same"),
    ),
    Mutant(
        "allocation-fails-for-ever",
        "engine/machine/fault_injection.py",
        "frames.write_word(draft.machine, frames.STATE_FRAME, reg.FAIL_ALLOCATION, max(0, failing - count))",
        "frames.write_word(draft.machine, frames.STATE_FRAME, reg.FAIL_ALLOCATION, max(1, failing - count))",
        "an allocation fails once",
        named(SPP, "an_allocation_fails_once"),
    ),
    Mutant(
        "region-overlap-across-spaces",
        "engine/kvm/slot_map.py",
        "order = after._order[spec.address_space]",
        "order = after._order[0]",
        "slots of the two address spaces never overlap",
        named(SLOTS, "the_address_spaces_are_apart"),
        "with_slot",
    ),
    Mutant(
        "region-of-smm-reachable",
        "engine/kvm/slots.py",
        "return self.gfn | (SMM_PAGE if self.address_space else 0)",
        "return self.gfn",
        "GET, SET and accesses outside of SMM look in address space 0 only",
        named(SLOTS, "memory_of_system_management_mode_is_out_of_reach"),
    ),
    Mutant(
        "region-wraps",
        "engine/ioctls/user_memory_region.py",
        "if (size | gpa | address) % PAGE_SIZE or address + size > USER_TOP or gpa + size >= 1 << 64:",
        "if (size | gpa) % PAGE_SIZE or gpa + size >= 1 << 64:",
        "the host address is on a page of user memory",
        named(SLOTS, "refused"),
    ),
    Mutant(
        "vcpu-taken-is-full",
        "engine/machine/vcpu_ids.py",
        'raise InvalidValue("must be a new id: a vCPU has it already", field="vcpu", value=vcpu, errno="EEXIST")',
        'raise InvalidValue("must be a new id: a vCPU has it already", field="vcpu", value=vcpu)',
        "an id that is taken is EEXIST",
        named(DURABLE, "vcpus"),
    ),
    Mutant(
        "vcpu-late-without-sppt",
        RECORDS_PY,
        "spp_control.enable(draft.machine, position)",
        "pass",
        "a vCPU made after SPP came on has the SPPT of its siblings",
        named(RECORDS, "one_that_comes_late_has_what_its_siblings_have"),
    ),
    Mutant(
        "vcpu-late-tree-empty",
        RECORDS_PY,
        "draft.machine.rows[draft.machine.row_of[twin]] = words",
        "pass",
        "the tree of a late vCPU says what those of its siblings say",
        named(RECORDS, "a_tree_that_comes_late_says_the_same"),
    ),
    Mutant(
        "vcpu-late-without-page-log",
        RECORDS_PY,
        "page_logs.follow_siblings(draft.machine, position)",
        "pass",
        "a vCPU made while pages are tracked by PML has a log of its own",
        named(RECORDS, "one_that_comes_late_has_what_its_siblings_have"),
    ),
    Mutant(
        "vcpu-places-given-away",
        "engine/state/frame_store.py",
        "idle[places.start : places.stop] = False",
        "pass",
        "a machine that was read back gives nobody the frames of vCPUs to come",
        named(RECORDS, "places_are_not_given_away"),
    ),
    Mutant(
        "dirty-log-number",
        DIRTY_LOG_PY,
        "if number >= kvm_version(target.profile).limits.user_slots or space >= ADDRESS_SPACES:",
        "if space >= ADDRESS_SPACES:",
        "a slot number that cannot be is EINVAL, not ENOENT",
        named(DIRTY, "numbers_that_cannot_be"),
    ),
)
