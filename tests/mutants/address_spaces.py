"""Faults in what a vCPU in system-management mode finds."""

from __future__ import annotations

from .mutant import Mutant
from .paths import SPACES, named

LOOKUP_PY = "engine/cpu/memory_slots.py"
SPACES_PY = "engine/machine/address_spaces.py"
MARKING_PY = "engine/kvm/dirty_marking.py"
HOST_EVENTS_PY = "engine/kvm/host_memory_events.py"

MUTANTS = (
    Mutant(
        "space-slots",
        "engine/kvm/exit_handling.py",
        "return handle_violation(m, gpa | space_of(m, vcpu), qualification, denied, trail, tally)",
        "return handle_violation(m, gpa, qualification, denied, trail, tally)",
        "kvm_vcpu_gfn_to_memslot: the slots of the vCPU's address space",
        named(SPACES, "where_space_1_has_no_slot_there_is_mmio"),
    ),
    Mutant(
        "space-root",
        "engine/kvm/ept_tables.py",
        "return address_of(m, read_word(m, STATE_FRAME, ROOT_EPT_SMM if gfn >= SMM_PAGE else ROOT_EPT))",
        "return address_of(m, read_word(m, STATE_FRAME, ROOT_EPT))",
        "a root of another role.smm is another root",
        named(SPACES, "each_space_has_a_root"),
    ),
    Mutant(
        "space-without-slots",
        SPACES_PY,
        "return len(m.slots) > 0 and bool(m.slots[-1, SLOT_GFN] >= SMM_PAGE)",
        "return True",
        "a machine without slots of space 1 has one address space",
        named(SPACES, "a_machine_without_slots_of_space_1_has_one_space"),
    ),
    Mutant(
        "space-fast-path",
        "engine/machine/fastpath_choice.py",
        "if machine.rows[rows, ctl.V_SPACE].any():",
        "if False:",
        "the fast path knows pages of one address space",
        named(SPACES, "one_vcpu_in_smm_has_no_fast_path"),
    ),
    Mutant(
        "space-contents",
        "engine/cpu/guest_paging.py",
        "entry = read_entry(m, slot | smm, size)",
        "entry = read_entry(m, slot, size)",
        "the guest's own page tables are in its address space",
        named(SPACES, "page_tables_of_the_guest_are_in_its_space"),
    ),
    Mutant(
        "space-home",
        LOOKUP_PY,
        "return m.slots[slot, SLOT_GFN] + page - m.slots[slot, SLOT_HOST]",
        "return gfn",
        "slots in one range of user memory are the same memory",
        named(SPACES, "memory_of_both_spaces"),
        "home",
    ),
    Mutant(
        "space-host-frame",
        "engine/kvm/mapping.py",
        "host_frames.back(m, gfn)",
        "pass",
        "memory that space 0 has not is in host frames of its own",
        named(SPACES, "each_space_has_a_root"),
    ),
    Mutant(
        "space-copy",
        "engine/kvm/mapping.py",
        "unmap_elsewhere(m, gfn, trail)",
        "pass",
        "a copy of a shared host page is for all who have the page",
        named(SPACES, "host_memory_events_reach_both_spaces"),
    ),
    Mutant(
        "space-events",
        HOST_EVENTS_PY,
        "change_leaf(m, event, other, trail)",
        "pass",
        "kvm_handle_hva_range: what happens to memory happens in every address space",
        named(SPACES, "host_memory_events_reach_both_spaces"),
    ),
    Mutant(
        "space-vectors",
        "engine/kvm/sppt_tables.py",
        "if gfn >= SMM_PAGE:",
        "if False:",
        "SPPTs are by GPA alone and about space 0",
        named(SPACES, "vectors_stay_when_pages_of_space_1_go"),
        "free_region",
    ),
    Mutant(
        "space-emulated",
        "engine/kvm/emulator.py",
        "return at >> 12 if page_tracking.active(m) else within(at) >> 12",
        "return at >> 12",
        "is_emulator_spp_protected looks in address space 0",
        named(SPACES, "an_emulated_write_in_smm"),
    ),
    Mutant(
        "space-unenforced",
        "engine/kvm/bitmaps.py",
        "if sppt.touched(at, part) & ~effective(m, home(m, at >> 12)):",
        "if sppt.touched(at, part) & ~effective(m, at >> 12):",
        "a write to protected memory that lands is counted, whichever way it came",
        named(SPACES, "sub_page_protection_is_about_space_0"),
    ),
    Mutant(
        "space-logged",
        "engine/kvm/dirty_harvest.py",
        "gfn = (read_entry(m, table, position) & bits.ADDRESS | space_of(m, vcpu)) >> 12",
        "gfn = (read_entry(m, table, position) & bits.ADDRESS) >> 12",
        "vmx_flush_pml_buffer marks pages of the vCPU's address space",
        named(SPACES, "each_slot_has_its_log"),
    ),
    Mutant(
        "space-log-left",
        SPACES_PY,
        "dirty_harvest.empty_buffer(draft.machine, position, np.int64(0))",
        "pass",
        "what was logged in a mode is of that mode's address space",
        named(SPACES, "what_a_processor_logged_in_smm_is_of_that_space"),
    ),
    Mutant(
        "space-written",
        MARKING_PY,
        "page = home(m, gfn)",
        "page = gfn",
        "the written map has what changed in memory of space 0",
        named(SPACES, "the_written_map_has_what_smm_writes_to_memory_of_space_0"),
        "note_written",
    ),
    Mutant(
        "space-handed-back",
        "engine/machine/slot_operations.py",
        "common_memory.hand_back(draft, slots, spec)",
        "pass",
        "memory lives as long as a slot shows it",
        named(SPACES, "memory_lives_as_long_as_a_slot_shows_it"),
    ),
    Mutant(
        "space-flushed",
        SPACES_PY,
        "table[own, tlb.E_GENERATION] = 0",
        "pass",
        "kvm_mmu_load flushes what is remembered of the root",
        named(SPACES, "translations_of_both_spaces_are_kept_apart"),
    ),
)
