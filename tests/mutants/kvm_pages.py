"""Faults of ``engine/kvm``: whole pages without sub-page protection, and page access of what is emulated."""

from __future__ import annotations

from .mutant import Mutant
from .paths import PAGE_TRACKING, named

TRACKING_PY = "engine/kvm/page_tracking.py"

MUTANTS = (
    Mutant(
        "tracking-with-spp",
        TRACKING_PY,
        "return read_word(m, STATE_FRAME, SPP_ACTIVE) == 0",
        "return True",
        "sub-page protection takes the place of page tracking once it is on",
        named(PAGE_TRACKING, "enabling_drops_the_leaves_of_tracked_pages"),
    ),
    Mutant(
        "tracked-leaf-kept-writable-by-kvm",
        "engine/kvm/ept_leaf.py",
        "return entry | HOST_WRITEABLE",
        "return entry | LOCKLESS_WRITABLE",
        "mmu_need_write_protect: the leaf of a tracked page has no MMU_WRITEABLE",
        named(PAGE_TRACKING, "first_write_maps_the_page_without_write_permission_and_the_next_one_is_refused"),
    ),
    Mutant(
        "tracked-fault-answered-by-mapping",
        "engine/kvm/ept_violation.py",
        "if present and write and page_tracking.tracks(m, gfn):",
        "if False:",
        "page_fault_handle_page_track: a write to a tracked page that is mapped is no fault of KVM's own",
        named(PAGE_TRACKING, "first_write_maps_the_page_without_write_permission_and_the_next_one_is_refused"),
    ),
    Mutant(
        "tracked-fault-before-mapping",
        "engine/kvm/ept_violation.py",
        "if present and write and page_tracking.tracks(m, gfn):",
        "if write and page_tracking.tracks(m, gfn):",
        "page_fault_handle_page_track: a page that is not mapped is mapped first",
        named(PAGE_TRACKING, "first_write_maps_the_page_without_write_permission_and_the_next_one_is_refused"),
    ),
    Mutant(
        "tracking-waits-for-the-next-fault",
        "engine/kvm/mapping.py",
        "if found and page_tracking.tracks(m, gfn):",
        "if False:",
        "kvm_mmu_slot_gfn_write_protect: write permission goes at once",
        named(PAGE_TRACKING, "mapped_page_loses_write_permission_at_once_and_gets_it_back_by_a_fault"),
    ),
    Mutant(
        "tracked-page-mapped-large-in-2019",
        "engine/kvm/large_pages.py",
        "if level == 1 or not (choice_bits.chooses(m, KVM_FORCE_SMALL) or page_tracking.active(m)):",
        "if level == 1 or not choice_bits.chooses(m, KVM_FORCE_SMALL):",
        "kvm_mmu_gfn_disallow_lpage: a tracked page is mapped small in every version",
        named(PAGE_TRACKING, "large_leaf_keeps_its_place_until_a_neighbour_is_written"),
    ),
    Mutant(
        "tracked-write-logged-as-dirty",
        "engine/kvm/dirty_marking.py",
        "elif m.caps[CAP_KVM] & KVM_SAVED_BIT and not page_tracking.active(m):",
        "elif m.caps[CAP_KVM] & KVM_SAVED_BIT:",
        "a fault that gives no write permission marks nothing dirty",
        named(PAGE_TRACKING, "refused_write_is_dirty_nowhere"),
    ),
    Mutant(
        "grant-of-a-tracked-page-in-part",
        "engine/kvm/granted_subpages.py",
        "asked = FULL_ACCESS if page_tracking.active(m) else sppt.touched(at, part)",
        "asked = sppt.touched(at, part)",
        "without sub-pages a grant frees the page",
        named(PAGE_TRACKING, "what_becomes_of_a_refused_write"),
    ),
    Mutant(
        "enabling-keeps-tracked-leaves",
        "engine/kvm/mapping.py",
        "if bitmaps.effective(m, at) != FULL_ACCESS:",
        "if False:",
        "enabling sub-page protection drops what page tracking made",
        named(PAGE_TRACKING, "enabling_drops_the_leaves_of_tracked_pages"),
        function="end_tracking",
    ),
    Mutant(
        "emulated-read-past-page-access",
        "engine/kvm/emulator.py",
        "return res.VIOLATION if kvmi_rights.lacking(m, gfn) & 1 << access else res.COMPLETED, 0",
        "return res.COMPLETED, 0",
        "kvm-spp 9.2: the emulator asks before it reads and fetches",
        named(PAGE_TRACKING, "page_access_holds_for_what_is_emulated"),
    ),
    Mutant(
        "emulated-write-past-page-access-in-2019",
        "engine/kvm/kvmi_rights.py",
        "return bitmaps.denied_by_set(m, gfn) if read(m, gfn) & bits.WRITE else 0",
        "return 0",
        "kvm-spp 9.2: the emulator's hook knows the tool's bitmap, also in the first series",
        named(PAGE_TRACKING, "emulated_writes_obey_page_access_in_2019_but_no_protection_and_no_set"),
    ),
    Mutant(
        "shadow-paging-tracks-nothing",
        "engine/kvm/shadow_paging.py",
        "if ending != res.COMPLETED:",
        "if ending == res.MMIO:",
        "without EPT KVM's shadow of the guest's tables keeps pages from being written",
        named(PAGE_TRACKING, "shadow_page_tables_keep_it"),
    ),
)
