"""Faults of ``engine/trace``."""

from __future__ import annotations

from .mutant import Mutant
from .paths import LINE_PATTERNS, OBJECTS, REPLAY, TOOL_LINES, named

RECORD_CHECKS_PY = "engine/trace/record_checks.py"
REPLAY_PY = "engine/trace/replay.py"
SESSION_PY = "engine/trace/session.py"
OBJECTS_PY = "engine/trace/object_hits.py"
SCAN_PY = "engine/trace/lines/scan.py"
READERS = "engine/trace/readers"

MUTANTS = (
    Mutant(
        "replay-guarded",
        REPLAY_PY,
        "guarded += 1",
        "guarded += 0",
        "page-granular violations count allowed writes to guarded pages",
        named(REPLAY, "page_granular_counts_writes_to_pages_with_any_refused_sub_page"),
    ),
    Mutant(
        "replay-guarded-straddle",
        REPLAY_PY,
        "done += access_over_pages.page_part(at, at + size - done)",
        "done += size",
        "both pages of an access count for page granularity",
        named(REPLAY, "second_page_counts_for_page_granularity"),
        function="in_protected_page",
    ),
    Mutant(
        "replay-grant-whole-page",
        "engine/kvm/granted_subpages.py",
        "refused = asked & ~bitmaps.effective(m, at >> 12)",
        "refused = ~bitmaps.effective(m, at >> 12)",
        "a grant opens the sub-pages that are touched, no more",
        named(REPLAY, "grant_opens_the_sub_page_once", "grant_opens_every_refused_sub_page_of_the_access"),
    ),
    Mutant(
        "replay-reserved-half",
        RECORD_CHECKS_PY,
        "if (word >> 24) & 0xFF or (word >> 48) & 0xFFFF:",
        "if (word >> 24) & 0xFF:",
        "the reserved bytes of a record are zero",
        named(REPLAY, "bad_record_is_refused_with_its_index_and_nothing_is_applied"),
    ),
    Mutant(
        "replay-unknown-vcpu",
        RECORD_CHECKS_PY,
        "if vcpu >= m.caps[CAP_VCPUS] or m.vcpu_of_id[vcpu] < 0:",
        "if vcpu >= m.caps[CAP_VCPUS]:",
        "must be the id of a vCPU of this machine",
        named(REPLAY, "vcpu_id_between_two_others_is_refused"),
    ),
    Mutant(
        "replay-grant-goes-on",
        REPLAY_PY,
        "grants = options[OPTION_ON_VIOLATION] == GRANT and access == acc.WRITE",
        "grants = options[OPTION_ON_VIOLATION] == ALLOW and access == acc.WRITE",
        "only grant changes maps",
        named(REPLAY, "allow_goes_on_and_leaves_the_protection"),
    ),
    Mutant(
        "replay-stop-position",
        SESSION_PY,
        "self.stopped_at = self.stop[0]",
        "self.stopped_at = self.stop[0] + 1",
        "a replay stops at the record that violates",
        named(REPLAY, "stop_ends_at_the_record_and_start_goes_on_from_it"),
    ),
    Mutant(
        "replay-again-any-record",
        SESSION_PY,
        "if again == self._identity(chunk, base, position):",
        "if again[2]:",
        "only the record that stopped was counted before",
        named(REPLAY, "only_the_very_record_that_stopped_goes_on"),
    ),
    Mutant(
        "replay-again-counted-for-objects",
        SESSION_PY,
        "self._seen.fill(base + position)",
        "pass",
        "a violation counts once for an object over the results of a replay that stopped and of the next",
        named(REPLAY, "stopping_violation_counts_once_over_the_results"),
    ),
    Mutant(
        "replay-again-page-counted",
        SESSION_PY,
        "COUNTED_ONCE = (reg.VIOLATIONS, reg.PAGE_GRANULAR, reg.STALE_ACCESSES)",
        "COUNTED_ONCE = (reg.VIOLATIONS, reg.STALE_ACCESSES)",
        "nor does the page that it is in",
        named(REPLAY, "sub_page_that_was_opened_meanwhile_is_no_second_violation"),
    ),
    Mutant(
        "replay-start",
        SESSION_PY,
        "position = max(0, min(count, self._options.start - base))",
        "position = max(0, min(count, self._options.start))",
        "start is an index in the whole trace",
        named(REPLAY, "start_skips_records_and_keeps_indices"),
    ),
    Mutant(
        "objects-own-byte",
        OBJECTS_PY,
        "own = begin < limits[1] and limits[0] < end",
        "own = begin < limits[1] and limits[0] <= end",
        "an access just before an object touches none of its bytes",
        named(OBJECTS, "violations_and_collateral"),
    ),
    Mutant(
        "objects-collateral",
        OBJECTS_PY,
        "hits[name, HIT_COLLATERAL] -= 1",
        "hits[name, HIT_COLLATERAL] -= 0",
        "a violation of an object's own byte is no collateral",
        named(OBJECTS, "violations_and_collateral"),
    ),
    Mutant(
        "objects-once",
        OBJECTS_PY,
        "if seen[name] != stamp:",
        "if stamp >= 0:",
        "a violation counts once for each name",
        named(OBJECTS, "violations_and_collateral"),
    ),
    Mutant(
        "objects-end",
        OBJECTS_PY,
        "end = ranges[:, 4] + 1",
        "end = ranges[:, 4] + 2",
        "an object ends with its last sub-page",
        named(OBJECTS, "access_touches_objects_by_sub_page"),
    ),
    Mutant(
        "lines-attempt-registers",
        SCAN_PY,
        "registers[i] = registers[p.REGISTERS + i]",
        "registers[i] = registers[i]",
        "an attempt that fails leaves registers as they were",
        named(LINE_PATTERNS, "an_attempt_that_fails_leaves_registers_as_they_were"),
    ),
    Mutant(
        "ftrace-vendor",
        f"{READERS}/ftrace.py",
        "fetch = code & np.where(intel, _FETCH, _CODE_FETCH) != 0",
        "fetch = code & _FETCH != 0",
        "a fetch is another bit of AMD's error code than of an exit qualification",
        named(TOOL_LINES, "a_line"),
    ),
    Mutant(
        "bochs-halves",
        f"{READERS}/bochs.py",
        "rows[at, GVA] = before[second, GVA]",
        "rows[at, GVA] = rows[at, GVA]",
        "the writing half of a read-modify-write has the linear address of the reading one",
        named(TOOL_LINES, "the_halves_of_a_read_modify_write"),
    ),
    Mutant(
        "drmemtrace-offset",
        f"{READERS}/drmemtrace.py",
        "rows[:, ADDRESS] = frames << _PAGE_BITS | rows[:, ADDRESS] & ((1 << _PAGE_BITS) - 1)",
        "rows[:, ADDRESS] = frames << _PAGE_BITS",
        "markers are about pages; the offset is the access's",
        named(TOOL_LINES, "physical_addresses_by_markers"),
    ),
    Mutant(
        "perf-script-fetch",
        f"{READERS}/perf_script.py",
        "fetch = (rows[:, p.TAG] == _FAULT) & (rows[:, PC] == rows[:, ADDRESS])",
        "fetch = rows[:, PC] == 0",
        "a page fault at its instruction's own address is a fetch",
        named(TOOL_LINES, "a_line"),
    ),
)
