"""Faults of ``engine/kvm``."""

from __future__ import annotations

from .mutant import Mutant
from .paths import FAULT, LAYERS, MAPPING, REPLAY, SLOTS, SPPT, named

SPP_SET_PY = "engine/kvm/spp_set.py"
EPT_VIOLATION_PY = "engine/kvm/ept_violation.py"
SPP_MISS_PY = "engine/kvm/spp_miss.py"
EXIT_HANDLING_PY = "engine/kvm/exit_handling.py"
LAYERS_PY = "engine/kvm/bitmaps.py"
PROTECTIONS_PY = "engine/kvm/protections.py"
SLOT_LOOKUP_PY = "engine/cpu/memory_slots.py"
SLOTS_PY = "engine/kvm/slots.py"
SPPT_PY = "engine/kvm/sppt_tables.py"
LEAF_PY = "engine/kvm/ept_leaf.py"
MAPPING_PY = "engine/kvm/mapping.py"
RUN_PY = "engine/kvm/vcpu_run.py"

MUTANTS = (
    Mutant(
        "layers-set-ignored",
        LAYERS_PY,
        "return ~(denied | covered & ~lifted) & FULL_ACCESS",
        "return ~(covered & ~lifted) & FULL_ACCESS",
        "effective = not denied by SET and (not protected or granted)",
        named(LAYERS, "effective_of_whole_words"),
    ),
    Mutant(
        "layers-grant-ignored",
        LAYERS_PY,
        "return ~(denied | covered & ~lifted) & FULL_ACCESS",
        "return ~(denied | covered) & FULL_ACCESS",
        "a grant lifts a protection",
        named(LAYERS, "effective_for_every_combination"),
    ),
    Mutant(
        "layers-set-keeps-grant",
        LAYERS_PY,
        "store(m, gfn, before, ~access & FULL_ACCESS, before[1], NOTHING)",
        "store(m, gfn, before, ~access & FULL_ACCESS, before[1], before[2])",
        "a grant ends with a SET of the page",
        named(LAYERS, "grant_ends_with_a_set_of_the_page"),
    ),
    Mutant(
        "layers-unprotect-keeps-grant",
        SPP_SET_PY,
        "bitmaps.store(m, gfn, before, before[0], masks[i], before[2] & masks[i])",
        "bitmaps.store(m, gfn, before, before[0], masks[i], before[2])",
        "a grant ends with the protection",
        named(LAYERS, "grant_ends_with_the_protection"),
    ),
    Mutant(
        "layers-protect-lifts-set",
        SPP_SET_PY,
        "bitmaps.store(m, gfn, before, before[0], masks[i], before[2] & masks[i])",
        "bitmaps.store(m, gfn, before, np.int64(0), masks[i], before[2] & masks[i])",
        "a protection never lifts a SET",
        named(LAYERS, "set_never_lifts_a_protection_and_a_protection_never_lifts_a_set"),
    ),
    Mutant(
        "layers-grant-leaves-set",
        "engine/kvm/granted_subpages.py",
        "bitmaps.store(m, gfn, before, denied & ~mask, covered, lifted | (mask & covered))",
        "bitmaps.store(m, gfn, before, denied, covered, lifted | (mask & covered))",
        "a grant opens what SET denied",
        named(LAYERS, "grant_opens_what_was_refused_and_nothing_else"),
    ),
    Mutant(
        "protections-last-sub-page",
        PROTECTIONS_PY,
        "high = np.where(gfn == last[owner] >> 5, last[owner] & 31, 31)",
        "high = np.where(gfn == last[owner] >> 5, (last[owner] & 31) - 1, 31)",
        "objects are rounded outward to 128 bytes",
        named(LAYERS, "pages_and_masks_of_objects"),
    ),
    Mutant(
        "slots-first-page",
        SLOT_LOOKUP_PY,
        "if m.slots[middle, SLOT_GFN] <= gfn:",
        "if m.slots[middle, SLOT_GFN] < gfn:",
        "a slot begins with its first page",
        named(SLOTS, "slot_of_a_page"),
    ),
    Mutant(
        "slots-end",
        SLOT_LOOKUP_PY,
        "if position < 0 or gfn >= m.slots[position, SLOT_GFN] + m.slots[position, SLOT_PAGES]:",
        "if position < 0 or gfn > m.slots[position, SLOT_GFN] + m.slots[position, SLOT_PAGES]:",
        "a slot ends before gfn + pages",
        named(SLOTS, "slot_of_a_page"),
    ),
    Mutant(
        "slots-overlap",
        SLOTS_PY,
        "and self.gpa < other.gpa + other.size",
        "and self.gpa <= other.gpa + other.size",
        "slots that touch do not overlap",
        named(SLOTS, "overlap"),
    ),
    Mutant(
        "mapping-arm-bit",
        LEAF_PY,
        "return entry | (write_protection.saved_bit(m) if dirty_marking.saved(m, gfn, slot, mask) else bits.SPP)",
        "return entry",
        "kvm-spp 3.4: a page whose map is not full is armed",
        named(FAULT, "first_touch_arms_a_page_whose_map_is_not_full"),
    ),
    Mutant(
        "mapping-arm-empty-only",
        LEAF_PY,
        "if mask != sp.FULL_ACCESS and level == 1:",
        "if mask == 0 and level == 1:",
        "kvm-spp 3.4: one refused sub-page arms a page",
        named(FAULT, "first_touch_arms_a_page_whose_map_is_not_full"),
        function="leaf_for",
    ),
    Mutant(
        "mapping-born-clean",
        LEAF_PY,
        "return entry | bits.WRITE | (NOTHING if dirty_marking.flag_waits(m, gfn, slot) else bits.DIRTY)",
        "return entry | bits.WRITE",
        "kvm-spp 3.4: a writable leaf is born dirty",
        named(FAULT, "first_touch_maps_a_full_page_writable"),
    ),
    Mutant(
        "mapping-fill-in-set",
        SPPT_PY,
        "write_entry(m, table, gfn & 511, sppt.spread(mask))",
        "write_entry(m, table, gfn & 255, sppt.spread(mask))",
        "29.3.4.2: SPPL1 is indexed by GPA[20:12]",
        named(SPPT, "two_pages_of_one_region_have_vectors_of_their_own"),
    ),
    Mutant(
        "mapping-invalidate-level",
        SPPT_PY,
        "table, index = entry_above(m, tree, gfn, 2)",
        "table, index = entry_above(m, tree, gfn, 3)",
        "kvm-spp 3.3: SET invalidates the SPPL2E of the region",
        named(SPPT, "set_makes_its_own_region_miss_and_no_other"),
        function="invalidate_region",
    ),
    Mutant(
        "mapping-refresh-skips",
        SPP_SET_PY,
        "if not found or level != 1 or entry & LOCKLESS_WRITABLE != LOCKLESS_WRITABLE:",
        "if not found or level != 1 or not entry & bits.SPP:",
        "kvm-spp 2.3: SET brings the leaf of a mapped page in line",
        named(FAULT, "2019_set_arms_and_disarms_a_mapped_page"),
        function="rearm",
    ),
    Mutant(
        "mapping-fast-path-stays",
        MAPPING_PY,
        "fastpath.forget(m, gfn)",
        "fastpath.forget(m, gfn + 1)",
        "a page whose map changed leaves the fast path",
        named(REPLAY, "grant_opens_the_sub_page_once", "dropping_the_fast_path_changes_no_answer"),
        function="forget",
    ),
    Mutant(
        "fault-violation-any",
        "engine/kvm/fast_page_fault.py",
        "if write and level == 1 and entry & bits.SPP and lockless:",
        "if level == 1 and entry & bits.SPP and lockless:",
        "kvm-spp 3.3: only a write is a sub-page violation",
        named(MAPPING, "age_without_accessed_flags_takes_all_rights"),
    ),
    Mutant(
        "fault-read-only",
        EPT_VIOLATION_PY,
        "if write and read_only:",
        "if write and read_only and slot > 0:",
        "kvm-spp 3.3: a write to a read-only slot is MMIO",
        named(FAULT, "read_only_slot_is_mapped_without_write_and_never_armed"),
    ),
    Mutant(
        "fault-miss-profile",
        SPP_MISS_PY,
        "if choice_bits.chooses(m, KVM_FILL_REGION):",
        "if not choice_bits.chooses(m, KVM_FILL_REGION):",
        "kvm-spp 3.3: 2019 fills one page, later series the region",
        named(FAULT, "later_series_fill_the_whole_region_at_one_miss", "2019_miss_fills_the_page_that_missed"),
    ),
    Mutant(
        "fault-region-start",
        SPP_MISS_PY,
        "first = gfn & ~(sp.REGION_PAGES - 1)",
        "first = gfn",
        "kvm-spp 3.3: a region begins at a multiple of 2 MiB",
        named(SPPT, "miss_fills_the_pages_below_too"),
    ),
    Mutant(
        "fault-count-miss",
        EXIT_HANDLING_PY,
        "elif qualification & exits.Q_SPP_MISS:",
        "elif not qualification & exits.Q_SPP_MISS:",
        "28.2.1: bit 11 of the qualification is a miss",
        named(FAULT, "exits_are_counted_by_kind"),
    ),
    Mutant(
        "fault-log-emptied",
        "engine/kvm/dirty_harvest.py",
        "LAST_LOG_ENTRY = np.int64(LOG_ENTRIES - 1)",
        "LAST_LOG_ENTRY = np.int64(LOG_ENTRIES)",
        "29.3.6: an empty log begins at entry 511",
        named(FAULT, "full_log_is_emptied_and_the_access_goes_on"),
    ),
    Mutant(
        "run-fast-path-vector",
        RUN_PY,
        "elif dirty and trail[ept.TRAIL_COUNTS, 1] == 4 and sppt.gather(trail[ept.TRAIL_SPPT + 3, 3]) == mask:",
        "elif dirty and trail[ept.TRAIL_COUNTS, 1] == 4:",
        "the fast path holds what the entries say, not the map",
        named(SPPT, "vector_decides_where_the_map_allows_more"),
    ),
    Mutant(
        "run-fast-path-dirty",
        RUN_PY,
        "if dirty and rights & bits.WRITE:",
        "if rights & bits.WRITE:",
        "a write to a clean page sets its dirty flag",
        named(REPLAY, "write_after_a_read_sets_the_dirty_flag"),
    ),
)
