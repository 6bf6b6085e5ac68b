"""Faults of linear addresses: how a trace is translated, what is no access, where objects are and where they went."""

from __future__ import annotations

from .mutant import Mutant
from .paths import MACHINE, TRACE, named

PAGING_PY = "engine/cpu/guest_paging.py"
PAGES_PY = "engine/cpu/access_over_pages.py"
VIRTUAL_PY = "engine/trace/guest_virtual.py"
REPLAY_PY = "engine/trace/replay.py"
INTERACTIVE_PY = "engine/trace/interactive.py"
SCATTERED_PY = "engine/trace/scattered.py"
OBJECTS_PY = "engine/machine/virtual_objects.py"
TRACES = f"{TRACE}/test_guest_virtual.py"
OBJECTS = f"{MACHINE}/test_virtual_objects.py"

MUTANTS = (
    Mutant(
        "bare-walk-asks-permission",
        PAGING_PY,
        "facts |= (12 + index_bits * (level - 1)) << tlb.GUEST_SIZE_AT",
        "doing &= ~BARE",
        "a translation asks for no privilege and sets no flag",
        named(TRACES, "reserved_bits_lead_nowhere_and_permissions_are_not_asked"),
    ),
    Mutant(
        "space-of-own-registers",
        PAGING_PY,
        "cr3 = space if paging >= FOUR_LEVELS else space & LOW_32",
        "pass",
        "a record's address space is under which it is translated",
        named(TRACES, "a_record_may_have_an_address_space_of_its_own"),
    ),
    Mutant(
        "space-without-pdptes",
        PAGING_PY,
        "entry = read_entry(m, slot | space_of(m, vcpu), 8)",
        "pass",
        "4.4.1: a load of CR3 reads the page-directory-pointer entries",
        (f"{TRACES}::test_a_record_may_have_an_address_space_of_its_own[pae]",),
    ),
    Mutant(
        "cache-of-any-space",
        VIRTUAL_PY,
        "if cache[row, C_PAGE] != page or cache[row, C_SPACE] != space or cache[row, C_VCPU] != vcpu:",
        "if cache[row, C_PAGE] != page or cache[row, C_VCPU] < 0:",
        "a translation is of one address space of one vCPU",
        named(TRACES, "a_record_may_have_an_address_space_of_its_own"),
    ),
    Mutant(
        "far-frames-are-neighbours",
        VIRTUAL_PY,
        "neighbours = neighbours and gpa == first + (count << 12)",
        "neighbours = True",
        "each page of an access is where the tables put it",
        named(TRACES, "the_far_part_refuses_and_is_what_the_exit_reports"),
    ),
    Mutant(
        "far-page-as-if-near",
        PAGES_PY,
        "return m.places[((gpa & (PAGE - 1)) + done) >> 12] | (gpa & SMM)",
        "return gpa + done",
        "each page of an access is where the tables put it",
        named(TRACES, "the_far_part_refuses_and_is_what_the_exit_reports"),
    ),
    Mutant(
        "untranslated-is-an-access",
        REPLAY_PY,
        "tally[reg.RECORDS] += i - start - nowhere",
        "tally[reg.RECORDS] += i - start",
        "what leads nowhere is no access",
        named(TRACES, "first_ones_are_listed_and_all_are_counted"),
    ),
    Mutant(
        "tables-as-they-were",
        INTERACTIVE_PY,
        "self._tables.forget()",
        "pass",
        "translations go by the tables as they are when the record is reached",
        named(TRACES, "memory_that_changes_at_a_pause_is_walked_again"),
    ),
    Mutant(
        "objects-of-the-first-run",
        SCATTERED_PY,
        "rows += [(row, gpa, size) for gpa, size, _ in runs]",
        "rows += [(row, gpa, size) for gpa, size, _ in runs[:1]]",
        "an exit record names the objects of all its pages",
        named(TRACES, "the_far_part_refuses_and_is_what_the_exit_reports"),
    ),
    Mutant(
        "hits-of-the-first-run",
        SCATTERED_PY,
        "told[:, EXIT_GPA] = [gpa for gpa, _, _ in runs]",
        "pass",
        "a violation counts for the objects of all its pages",
        named(TRACES, "the_far_part_refuses_and_is_what_the_exit_reports"),
    ),
    Mutant(
        "object-in-one-run",
        OBJECTS_PY,
        "starts = np.flatnonzero(np.diff(frames, prepend=frames[0] - 2 * PAGE) != PAGE)",
        "starts = np.zeros(1, dtype=np.int64)",
        "an object is split where its frames are no neighbours",
        named(OBJECTS, "split_where_frames_are_no_neighbours"),
    ),
    Mutant(
        "retranslate-leaves-the-old-place",
        "engine/machine/protection_operations.py",
        "self._recover(now, [before, after], {**now.protections, name: after})",
        "self._recover(now, [after], {**now.protections, name: after})",
        "what is protected moves",
        named(OBJECTS, "retranslate_moves_what_is_protected"),
    ),
    Mutant(
        "far-page-leaves-smm",
        PAGES_PY,
        "return m.places[((gpa & (PAGE - 1)) + done) >> 12] | (gpa & SMM)",
        "return m.places[((gpa & (PAGE - 1)) + done) >> 12]",
        "an access over two frames stays in the address space of its vCPU",
        named(TRACES, "an_access_over_two_frames_stays_in_the_address_space_of_its_vcpu"),
    ),
)
