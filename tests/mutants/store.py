"""Faults of what holds the state: ``engine/store.py``, frames, the fast path."""

from __future__ import annotations

from .mutant import Mutant
from .paths import FASTPATH, FRAMES, STORE, named

STORE_PY = "engine/state/frame_store.py"
CLONES = "tests/engine/machine/test_clones.py"
FRAMES_PY = "engine/cpu/frames.py"
FASTPATH_PY = "engine/cpu/fastpath.py"
SERVED_PY = "engine/trace/served.py"

SUMMARY_PY = "engine/machine/summary.py"
SUMMARY = "tests/engine/machine/test_summary.py"
LIMITS = "tests/engine/machine/test_virtual_machine.py"

PAGES_PY = "engine/kvm/page_contents.py"
LOADS_PY = "engine/machine/memory_operations.py"
LOADS = "tests/engine/machine/test_image_loads.py"
BACKED = "tests/engine/machine/test_file_backed_slots.py"
FILES_PY = "engine/cpu/memory_files.py"
CONTENTS_PY = "engine/cpu/guest_memory.py"
IMAGES = "tests/engine/images/test_image_readers.py"
ELF_PY, NOTES_PY, LIME_PY = (f"engine/images/{name}.py" for name in ("elf_core", "elf_notes", "lime"))

MUTANTS = (
    Mutant(
        "image-zeros-stay",
        PAGES_PY,
        "drop_page(m, gfn + at)",
        "pass",
        "a page of zeros in an image replaces what was there",
        named(LOADS, "pages_of_zeros_are_left_out_and_replace_what_was_there"),
    ),
    Mutant(
        "image-zeros-kept",
        PAGES_PY,
        "if last == WORDS and source(m, home(m, gfn + at))[0] == NO_FILE:",
        "if last > WORDS and source(m, home(m, gfn + at))[0] == NO_FILE:",
        "a page of zeros takes no frame",
        named(LOADS, "memory_grows_with_what_is_not_zero"),
    ),
    Mutant(
        "image-zeros-show-the-file",
        PAGES_PY,
        "if last == WORDS and source(m, home(m, gfn + at))[0] == NO_FILE:",
        "if last == WORDS:",
        "a page of zeros replaces that of a file, too",
        named(BACKED, "images_go_over_the_file"),
    ),
    Mutant(
        "file-forgotten-by-the-first-write",
        CONTENTS_PY,
        "memory_files.fill(m, page, m.row_of[frame])",
        "pass",
        "a write leaves what the file has beside it",
        named(BACKED, "what_is_written_is_the_machines_alone"),
    ),
    Mutant(
        "file-from-its-beginning",
        FILES_PY,
        "return m.slots[slot, SLOT_FILE], m.slots[slot, SLOT_FILE_AT] + ((page - m.slots[slot, SLOT_GFN]) << 12)",
        "return m.slots[slot, SLOT_FILE], m.slots[slot, SLOT_FILE_AT] + (page << 12)",
        "the offset is that of the slot's first byte",
        named(BACKED, "what_was_never_written_is_the_files"),
    ),
    Mutant(
        "file-too-short-is-zeros",
        FILES_PY,
        "if count != WORD_BYTES:",
        "if count > WORD_BYTES:",
        "what a file has not any more is no zero",
        named(BACKED, "a_file_that_became_shorter_is_an_error"),
    ),
    Mutant(
        "image-frames-forgotten",
        LOADS_PY,
        "brought = max(0, frames.in_use(change.machine) - before) + register(change.machine, reg.IMAGE_FRAMES)",
        "brought = max(0, frames.in_use(change.machine) - before)",
        "what earlier images brought counts on",
        named(LOADS, "frames_that_images_bring_are_counted_once"),
    ),
    Mutant(
        "image-logs-untold",
        LOADS_PY,
        "if dirty_marking.mode(change.machine):",
        "if False:",
        "the dirty logs are told of an image",
        named(LOADS, "dirty_logs_are_told"),
    ),
    Mutant(
        "lime-end-exclusive",
        LIME_PY,
        "size = last - first + 1",
        "size = last - first",
        "the last address of a range is in it",
        named(IMAGES, "lime_ranges_end_with_their_last_byte"),
    ),
    Mutant(
        "elf-mappings-overlap",
        ELF_PY,
        "same = before.type == segment.type == _LOAD and segment.gpa - segment.offset == before.gpa - before.offset",
        "same = before.type == segment.type == _LOAD and segment.gpa == before.gpa",
        "segments that share bytes of the file are of the same memory",
        named(IMAGES, "mappings_of_the_same_memory_are_one_range"),
    ),
    Mutant(
        "elf-cr3",
        NOTES_PY,
        "_RSP, _RIP, _RFLAGS, _CR0, _CR2, _CR3, _CR4 = 8, 18, 19, 20, 22, 23, 24",
        "_RSP, _RIP, _RFLAGS, _CR0, _CR2, _CR3, _CR4 = 8, 18, 19, 20, 22, 24, 23",
        "control registers follow ten segments",
        named(IMAGES, "elf_cores_have_ranges_and_registers"),
    ),
    Mutant(
        "summary-failing",
        SUMMARY_PY,
        'return {"spp_active": spp_active, "failing": failing}',
        'return {"spp_active": spp_active, "failing": None}',
        "a list shows which allocation fails from now, not from the machine's creation",
        named(SUMMARY, "the_head_has_it", "an_allocation_that_failed_is_not_shown_any_more"),
    ),
    Mutant(
        "summary-identity",
        SUMMARY_PY,
        "first_identity(item) if item.id not in touched else (touched[item.id].vp_index, touched[item.id].cpuid)",
        "first_identity(item)",
        "a list shows the CPUID that a vCPU was given since",
        named(SUMMARY, "the_head_has_it"),
    ),
    Mutant(
        "store-publishes-beyond-the-limit",
        STORE_PY,
        "draft.check()",
        "pass",
        "no more frames than the limit are ever published",
        named(LIMITS, "limit_on_frames_is_that_of_what_is_published"),
    ),
    Mutant(
        "store-grows-beyond-the-limit",
        STORE_PY,
        "total = max(FIRST_FRAMES, min(have + max(needed, have // 2), most))",
        "total = max(FIRST_FRAMES, have + max(needed, have // 2))",
        "a change is beyond the limit by what one access needs at most",
        named(STORE, "change_is_beyond_the_limit_by_one_access_at_most"),
    ),
    Mutant(
        "store-reused-rows",
        STORE_PY,
        "self.spare = draft.spare_rows()",
        "self.spare = np.concatenate([draft.spare_rows(), replaced[:gone]])",
        "a row that a reader may hold is not used again",
        named(STORE, "state_that_a_reader_holds_never_changes", "rows_of_a_held_state_wait_and_then_come_back"),
    ),
    Mutant(
        "store-increment",
        STORE_PY,
        "for frame in np.flatnonzero(machine.row_of != before).tolist():",
        "for frame in np.flatnonzero(machine.row_of > before).tolist():",
        "an increment has every block that changed",
        named(
            STORE,
            "increments_on_top_of_earlier_ones_give_the_same_machine",
            "increment_has_only_the_blocks_that_changed",
        ),
    ),
    Mutant(
        "store-revert-keeps-state",
        STORE_PY,
        "self.published = snapshot",
        "pass",
        "a withdrawn state is not published any more",
        named(STORE, "a_withdrawn_successor_leaves_no_trace", "a_successor_that_grew_is_withdrawn"),
        function="revert",
    ),
    Mutant(
        "store-revert-held-rows",
        STORE_PY,
        "idle[rows] = False",
        "pass",
        "rows of a state that a reader holds are not spare after a withdrawal",
        named(STORE, "a_state_held_from_before_survives_a_withdrawal"),
        function="revert",
    ),
    Mutant(
        "store-revert-late-rows",
        STORE_PY,
        "idle[late] = False",
        "pass",
        "rows of a withdrawn state wait for its readers",
        named(STORE, "a_state_held_from_before_survives_a_withdrawal"),
        function="revert",
    ),
    Mutant(
        "store-revert-retired",
        STORE_PY,
        "while self._retired[-1][0]() is not snapshot:",
        "while False:",
        "rows of the state that comes back are not spare",
        named(STORE, "a_withdrawn_successor_leaves_no_trace"),
        function="revert",
    ),
    Mutant(
        "machine-successor-lock",
        "engine/machine/state.py",
        "self._acquire()",
        "pass",
        "a machine with a successor refuses changes",
        named(STORE, "a_successor_takes_the_changes_and_its_predecessor_shows_none"),
        function="successor",
    ),
    Mutant(
        "store-freed-block",
        STORE_PY,
        "yield frame, int(FREE), bytes(frames.FRAME_SIZE)",
        "continue",
        "freed frames are named",
        named(STORE, "freed_blocks_are_named"),
    ),
    Mutant(
        "frames-own-twice",
        FRAMES_PY,
        "m.fresh[frame] = 1",
        "m.fresh[frame] = 0",
        "a change copies a frame once",
        named(FRAMES, "second_write_copies_nothing"),
        function="own",
    ),
    Mutant(
        "frames-same-word",
        FRAMES_PY,
        "if read_word(m, frame, index) != word:",
        "if m.rows[m.row_of[frame], index] != word or index >= 0:",
        "a word that is already there copies nothing",
        named(FRAMES, "word_that_is_already_there_copies_nothing"),
    ),
    Mutant(
        "frames-ample",
        FRAMES_PY,
        "return m.top[TOP_FREE] >= m.caps[CAP_RESERVE] and m.top[TOP_SPARE] >= m.caps[CAP_RESERVE]",
        "return m.top[TOP_FREE] >= m.caps[CAP_RESERVE]",
        "an access needs frames and rows",
        named(FRAMES, "ample_needs_frames_and_rows"),
    ),
    Mutant(
        "frames-new-not-zeroed",
        FRAMES_PY,
        "m.rows[row, i] = 0",
        "m.rows[row, i] |= 0",
        "a new frame is zeroed",
        named(FRAMES, "new_frame_is_zeroed_and_named"),
    ),
    Mutant(
        "fastpath-forget-any",
        FASTPATH_PY,
        "if m.cache[at] & ~GUARDED == gfn:",
        "if m.cache[at] & ~GUARDED != gfn:",
        "forgetting a page forgets that page",
        named(FASTPATH, "forgetting_a_page_leaves_the_one_that_took_its_place"),
        function="forget",
    ),
    Mutant(
        "fastpath-denial-unknown",
        FASTPATH_PY,
        "if known or writable == 0:",
        "if known or writable:",
        "a refusal is cached where nothing else is left to do",
        named(
            FASTPATH,
            "refusal_is_not_known_before_the_allowed_part_of_the_page_is",
            "known_refusal_answers_for_every_other_sub_page",
        ),
    ),
    Mutant(
        "fastpath-two-pages",
        SERVED_PY,
        "return (cache[np.uint64(gpa >> 12) & CACHE_MASK] ^ ((gpa + more) >> 12)) | (more >> 16)",
        "return (cache[np.uint64(gpa >> 12) & CACHE_MASK] ^ (gpa >> 12)) | (more >> 16)",
        "an access over two pages is not served",
        named(FASTPATH, "access_to_two_pages_is_not_served"),
    ),
    Mutant(
        "fastpath-last-sub-page",
        SERVED_PY,
        "touched = (2 << last) - (1 << ((gpa >> 7) & 31))",
        "touched = 1 << ((gpa >> 7) & 31)",
        "every touched sub-page must be writable",
        named(FASTPATH, "only_sub_pages_that_may_be_written_are_served"),
    ),
    Mutant(
        "fastpath-another-head",
        SERVED_PY,
        "return (cache[np.uint64(gpa >> 12) & CACHE_MASK] ^ ((gpa + more) >> 12)) | (more >> 16)",
        "return cache[np.uint64(gpa >> 12) & CACHE_MASK] ^ ((gpa + more) >> 12)",
        "a record without bytes, or of another vCPU, is not served",
        named(FASTPATH, "record_that_is_no_access_is_never_served"),
    ),
    Mutant(
        "fastpath-guarded-by-reads",
        FASTPATH_PY,
        "m.cache[at] = gfn if writable == FULL_ACCESS else gfn | GUARDED",
        "m.cache[at] = gfn",
        "a page with a closed sub-page is looked at more closely",
        named(FASTPATH, "only_sub_pages_that_may_be_written_are_served"),
    ),
    Mutant(
        "store-lent-rows",
        STORE_PY,
        "freed[at] = part[~lent]",
        "pass",
        "rows that a clone shows are not used again",
        named(
            CLONES,
            "what_one_does_the_other_does_not_see",
            "a_change_of_the_origin_that_is_withdrawn_takes_nothing_of_the_clone",
        ),
    ),
    Mutant(
        "store-lent-rows-come-back",
        STORE_PY,
        "freed.append(held)",
        "pass",
        "rows that a clone has copied come back to its origin",
        named(CLONES, "rows_that_a_clone_shows_wait_for_it_and_then_come_back"),
    ),
    Mutant(
        "store-borrowed-rows-after-a-withdrawal",
        STORE_PY,
        "if snapshot.loan is not None:",
        "if False:",
        "a clone whose change is withdrawn writes in no row of its origin",
        named(CLONES, "a_change_of_a_clone_that_is_withdrawn"),
        function="revert",
    ),
)
