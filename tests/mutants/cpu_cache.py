"""Faults of ``engine/cpu``. The translation cache."""

from __future__ import annotations

from .mutant import Mutant
from .paths import CACHED, named

TLB_PY = "engine/cpu/tlb.py"
MMU_PY = "engine/cpu/cached_check.py"
INSTRUCTION_PY = "engine/cpu/instruction.py"

MUTANTS = (
    Mutant(
        "tlb-tag-root",
        TLB_PY,
        "return m.tlb[row, E_ROOT] == root and same_space(m, row, space)",
        "return same_space(m, row, space)",
        "29.4.1: mappings are tagged with EPTP[51:12]",
        named(CACHED, "tags_keep_address_spaces_apart"),
    ),
    Mutant(
        "tlb-tag-space",
        TLB_PY,
        "return m.tlb[row, E_ROOT] == root and same_space(m, row, space)",
        "return m.tlb[row, E_ROOT] == root",
        "29.4.1: linear and combined mappings are tagged with VPID and PCID",
        named(CACHED, "vpid_tags_combined_mappings"),
    ),
    Mutant(
        "tlb-global-any-pcid",
        TLB_PY,
        "mask = ctl.VPID_MASK if m.tlb[row, E_FACTS] & GUEST_GLOBAL else -1",
        "mask = -1",
        "29.4.1: a global translation serves every PCID",
        named(CACHED, "global_mapping_serves_every_pcid"),
    ),
    Mutant(
        "tlb-vector-unread",
        MMU_PY,
        "return not asks_vector or m.tlb[row, tlb.E_FACTS] & tlb.VECTOR_READ != 0",
        "return True",
        "29.4.1: a mapping of a read holds no sub-page permissions",
        named(CACHED, "mapping_of_a_read_refuses_no_write"),
    ),
    Mutant(
        "tlb-clean-page",
        MMU_PY,
        "if mode & ept.MODE_ACCESSED_DIRTY and not leaf & bits.DIRTY:",
        "if mode & ept.MODE_ACCESSED_DIRTY and not leaf & bits.ACCESSED:",
        "29.3.5: a write through a clean mapping sets the dirty flag",
        named(CACHED, "a_write_to_a_clean_page_walks_to_set_the_flag"),
    ),
    Mutant(
        "tlb-vpid-0-stays",
        TLB_PY,
        "if (own_vpid == 0) if vpid == EVERY else (own_vpid != vpid):",
        "if vpid != EVERY and own_vpid != vpid:",
        "INVVPID: type 2 spares VPID 0",
        named(CACHED, "vpid_0_survives_no_transition_and_no_other_vpid_removes_it"),
    ),
    Mutant(
        "tlb-large-page",
        TLB_PY,
        "shift = (facts >> GUEST_SIZE_AT) & GUEST_SIZE_MASK",
        "shift = 12",
        "29.4.3.1: an address stands for its whole page",
        named(CACHED, "invlpg_takes_all_of_a_large_page"),
    ),
    Mutant(
        "tlb-invept-combined",
        TLB_PY,
        "if kind & KIND_MASK == LINEAR or (vcpu != EVERY and kind >> VCPU_SHIFT != vcpu):",
        "if kind & KIND_MASK != PHYSICAL or (vcpu != EVERY and kind >> VCPU_SHIFT != vcpu):",
        "29.4.3.1: INVEPT removes combined mappings too",
        named(CACHED, "removals"),
    ),
    Mutant(
        "tlb-violation",
        INSTRUCTION_PY,
        "tlb.violated(m, vcpu, gpa, at)",
        "tlb.linear_bits(at)",
        "29.4.3.1: an EPT violation removes the mappings that led to it",
        named(CACHED, "stale_answers_are_the_cached_ones_and_say_so", "a_spurious_violation_happens_once"),
    ),
    Mutant(
        "tlb-transition",
        TLB_PY,
        "if modelled(m) and vpid_of(m, vcpu) == 0:",
        "if modelled(m) and vpid_of(m, vcpu) != 0:",
        "29.4.3.1: without VPIDs, VM entries and exits remove what is by linear address",
        named(CACHED, "vpid_0_survives_no_transition_and_no_other_vpid_removes_it"),
    ),
    Mutant(
        "tlb-stale-address",
        INSTRUCTION_PY,
        "stale = reason != real_reason or value != real_value or gpa != real_gpa or denied != real_denied",
        "stale = reason != real_reason or value != real_value or denied != real_denied",
        "an answer for another page is stale",
        named(CACHED, "guest_translations_are_remembered_until_removed"),
    ),
    Mutant(
        "tlb-page-fault",
        INSTRUCTION_PY,
        "if reason < 0:",
        "if reason < -14:",
        "29.4.3.1 and volume 3A, 4.10.4.1: a page fault removes its mapping",
        named(CACHED, "a_stale_page_fault_drops_its_mapping"),
        function="page",
    ),
    Mutant(
        "tlb-guest-dirty",
        INSTRUCTION_PY,
        "if guest_paging.writes(how) and not m.tlb[row, tlb.E_FACTS] & tlb.GUEST_DIRTY:",
        "if guest_paging.writes(how) and not m.tlb[row, tlb.E_FACTS]:",
        "volume 3A, 4.8: the first write sets the guest's dirty flag",
        named(CACHED, "write_after_a_read_sets_the_guests_dirty_flag"),
    ),
    Mutant(
        "tlb-cr3",
        TLB_PY,
        "remove_linear(m, vcpu, vpid_of(m, vcpu), pcid_of(m, vcpu), EVERY, GLOBALS_STAY, EVERY)",
        "remove_linear(m, vcpu, vpid_of(m, vcpu), EVERY, EVERY, GLOBALS_STAY, EVERY)",
        "volume 3A, 4.10.4.1: MOV to CR3 leaves other PCIDs",
        named(CACHED, "removals"),
    ),
)
