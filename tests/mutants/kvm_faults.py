"""Faults of ``engine/kvm``: leaf sizes, write protection, aging, host memory, emulated writes, tables that go back."""

from __future__ import annotations

from .mutant import Mutant
from .paths import EMULATOR, FAULT, HOST_MEMORY, MAPPING, PROFILES, named

LARGE_PAGES_PY = "engine/kvm/large_pages.py"
EPT_VIOLATION_PY = "engine/kvm/ept_violation.py"
SPP_MISS_PY = "engine/kvm/spp_miss.py"
EXIT_HANDLING_PY = "engine/kvm/exit_handling.py"
MISCONFIGURATION_PY = "engine/kvm/ept_misconfiguration.py"
MAPPING_PY = "engine/kvm/mapping.py"
REGIONS_PY = "engine/kvm/regions.py"
HOST_PY = "engine/kvm/host_frames.py"
EPT_PY = "engine/kvm/ept_tables.py"
EMULATOR_PY = "engine/kvm/emulator.py"
EVENTS_PY = "engine/kvm/host_memory_events.py"

MUTANTS = (
    Mutant(
        "level-ignores-region",
        LARGE_PAGES_PY,
        "if regions.protected(m, gfn, 2):",
        "if regions.protected(m, gfn, 3):",
        "kvm-spp 3.4: 4-KByte leaves in a 2-MByte region with a protected page, and not beyond it",
        named(MAPPING, "protected_page_in_a_gbyte_leaves_its_other_regions_2_mbytes"),
    ),
    Mutant(
        "level-forced-in-2019",
        LARGE_PAGES_PY,
        "if level == 1 or not (choice_bits.chooses(m, KVM_FORCE_SMALL) or page_tracking.active(m)):",
        "if level == 1:",
        "kvm-spp 8.2: version 4 maps large pages whatever the bitmaps say",
        named(MAPPING, "2019_maps_a_large_page_over_protected_ones_and_says_which_writes_got_through"),
    ),
    Mutant(
        "level-outside-slot",
        LARGE_PAGES_PY,
        "return begin <= first and first + pages <= begin + m.slots[slot, SLOT_PAGES]",
        "return first + pages <= begin + m.slots[slot, SLOT_PAGES]",
        "a large leaf is inside of its slot",
        named(MAPPING, "leaf_is_as_large_as_host_page_and_slot_allow"),
    ),
    Mutant(
        "regions-count-of-gbyte",
        REGIONS_PY,
        "if small & PROTECTED == 0 or (small + change) & PROTECTED == 0:",
        "if small & PROTECTED == 0:",
        "the counts of a region follow every change",
        named(MAPPING, "counts_of_regions_follow_every_layer"),
    ),
    Mutant(
        "saved-bit-stays",
        "engine/kvm/fast_page_fault.py",
        "return fresh & ~saved_bit(m) | bits.SPP",
        "return fresh | bits.SPP",
        "kvm-spp 3.4: the saved bit is moved back, not copied",
        named(MAPPING, "later_write_protection_puts_bit_61_aside_and_the_next_write_brings_it_back"),
    ),
    Mutant(
        "saved-bit-forgotten",
        "engine/kvm/write_protection.py",
        "entry = entry & ~bits.SPP | saved_bit(m)",
        "entry = entry & ~bits.SPP",
        "kvm-spp 3.4: bit 61 is put aside while KVM forbids writes",
        named(MAPPING, "later_write_protection_puts_bit_61_aside_and_the_next_write_brings_it_back"),
    ),
    Mutant(
        "aged-armed-restored-in-2019",
        "engine/kvm/fast_page_fault.py",
        "return res.VIOLATION",
        "return res.INTERNAL_ERROR",
        "kvm-spp 3.3: in version 4 bit 61 of an aged page makes any write a violation",
        named(MAPPING, "2019_takes_any_write_to_an_aged_armed_page_for_a_violation"),
        function="fast_fault",
    ),
    Mutant(
        "mmio-mark-by-the-other-bits",
        MISCONFIGURATION_PY,
        "if choice_bits.chooses(m, KVM_MARKS_SPECIAL):",
        "if not choice_bits.chooses(m, KVM_MARKS_SPECIAL):",
        "second reading 1: in 5.3 an MMIO entry has bit 62",
        named(FAULT, "entry_that_marks_mmio_goes_to_user_space"),
    ),
    Mutant(
        "mmio-mark-by-bit-63-alone",
        MISCONFIGURATION_PY,
        "return entry & (bits.SUPPRESS_VE | MMU_PRESENT) == 0",
        "return entry & bits.SUPPRESS_VE == 0",
        "second reading 1: in 7.1 an MMIO entry has bits 63 and 11 clear",
        named(FAULT, "entry_that_marks_mmio_goes_to_user_space"),
    ),
    Mutant(
        "misconfiguration-of-a-delivery-looked-at",
        MISCONFIGURATION_PY,
        "if how & acc.DELIVERY and choice_bits.chooses(m, KVM_REFUSES_DELIVERY):",
        "if False:",
        "second reading 1: in 5.3 an event that was being delivered comes first",
        named(FAULT, "misconfiguration_while_an_event_is_delivered"),
    ),
    Mutant(
        "misconfiguration-an-internal-error",
        MISCONFIGURATION_PY,
        "return res.MMIO if marks_mmio(m, entry) else res.RUN_FAILED",
        "return res.MMIO if marks_mmio(m, entry) else res.INTERNAL_ERROR",
        "second reading 1: KVM_RUN fails with EINVAL",
        named(FAULT, "misconfigured_entry_fails_kvm_run"),
    ),
    Mutant(
        "age-takes-rights-always",
        "engine/kvm/access_tracking.py",
        "if m.caps[CAP_EPT_VPID] & bits.CAP_ACCESSED_DIRTY:",
        "if False:",
        "with accessed flags aging clears the flag",
        named(MAPPING, "age_clears_the_accessed_flag"),
    ),
    Mutant(
        "read-only-host-armed",
        MAPPING_PY,
        "bits.ADDRESS | bits.WRITE | bits.SPP | write_protection.saved_bit(m) | HOST_WRITEABLE",
        "bits.ADDRESS | bits.WRITE | write_protection.saved_bit(m) | HOST_WRITEABLE",
        "kvm-spp 5: a permitted sub-page does not override a read-only host page",
        named(HOST_MEMORY, "remap_read_only_disarms_the_leaf_and_a_write_gets_a_copy"),
    ),
    Mutant(
        "no-copy-on-write",
        MAPPING_PY,
        "if write and host_frames.read_only(m, gfn):",
        "if not write and host_frames.read_only(m, gfn):",
        "a write to a shared host page gets a copy",
        named(HOST_MEMORY, "remap_read_only_disarms_the_leaf_and_a_write_gets_a_copy"),
    ),
    Mutant(
        "host-frame-in-slot",
        HOST_PY,
        "frame = m.slots[slot, SLOT_GFN] - 1",
        "frame = m.slots[slot, SLOT_GFN] - 2",
        "a new host frame backs no guest page",
        named(HOST_MEMORY, "host_frames_are_not_those_of_guest_memory"),
    ),
    Mutant(
        "shrink-part-of-region",
        EVENTS_PY,
        "end = first + REGION",
        "end = first + 1",
        "shrink drops the leaves whose vectors it frees",
        named(HOST_MEMORY, "shrink_frees_both_and_all_is_made_anew"),
    ),
    Mutant(
        "release-too-much",
        EPT_PY,
        "if not blank(m, frame):",
        "if False:",
        "a table in which something is left stays",
        named(HOST_MEMORY, "zap_of_a_range_keeps_tables_that_hold_more"),
    ),
    Mutant(
        "large-leaf-keeps-table",
        EPT_PY,
        "if names_table(below, 2):",
        "if False:",
        "the tables under a large leaf return to the free list",
        named(MAPPING, "leaf_over_a_table_frees_it"),
    ),
    Mutant(
        "emulator-page-granular",
        EMULATOR_PY,
        "denied = sppt.touched(at, size) & closed_to(m, source, at) & FULL_ACCESS",
        "denied = closed_to(m, source, at) & FULL_ACCESS",
        "kvm-spp 3.5: an emulated write obeys sub-pages, not pages",
        named(EMULATOR, "emulated_write"),
    ),
    Mutant(
        "miss-without-slot-fails",
        SPP_MISS_PY,
        "if not has_slot and choice_bits.chooses(m, KVM_MISS_NEEDS_SLOT):",
        "if not has_slot:",
        "kvm-spp 4: later series leave pages without a slot out",
        named(FAULT, "miss_of_a_page_without_a_slot"),
    ),
    Mutant(
        "nmi-not-blocked",
        EXIT_HANDLING_PY,
        "if qualification & exits.Q_NMI_UNBLOCKING and not how & acc.DELIVERY:",
        "if qualification & exits.Q_NMI_UNBLOCKING and how & acc.DELIVERY:",
        "kvm-spp 4: blocking by NMI comes back, but for exits in the delivery of an event",
        named(PROFILES, "nmis_that_iret_had_unblocked_are_blocked_again"),
    ),
)
