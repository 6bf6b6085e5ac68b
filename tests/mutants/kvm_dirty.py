"""Faults of dirty tracking and page access."""

from __future__ import annotations

from .mutant import Mutant
from .paths import DIRTY, KINDS, PAGE_ACCESS, named

LARGE_PAGES_PY = "engine/kvm/large_pages.py"
TRACKING_PY = "engine/kvm/dirty_marking.py"
DIRTY_LOG_PY = "engine/kvm/dirty_harvest.py"
MAPPING_PY = "engine/kvm/mapping.py"
RUN_PY = "engine/kvm/vcpu_run.py"
RIGHTS_PY = "engine/kvm/kvmi_rights.py"
ACCESS_PY = "engine/machine/page_access.py"

MUTANTS = (
    Mutant(
        "logging-of-some-vcpus-by-the-fast-path",
        "engine/machine/fastpath_choice.py",
        "ctl.V_SECONDARY,",
        "ctl.V_PRIMARY,",
        "SDM 29.3.6: what one vCPU logs and another does not is no matter for one answer",
        named(DIRTY, "logs_of_several_vcpus_leave_the_fast_path_on"),
    ),
    Mutant(
        "dirty-linear-by-choice",
        "engine/trace/access_execution.py",
        "_note_written(draft, found, config.vcpu_position(request.vcpu))",
        "pass",
        "a write that lands by the caller's choice is dirty, by linear address too",
        named(KINDS, "dirty_logs_know_what_lands_by_linear_address"),
    ),
    Mutant(
        "dirty-opens-all",
        TRACKING_PY,
        "note_written(m, gfn, denied or EVERYTHING)",
        "note_written(m, gfn, EVERYTHING)",
        "a write opens the sub-pages it touches and no other",
        named(DIRTY, "allowed_and_already_dirty"),
    ),
    Mutant(
        "dirty-opens-what-is-refused",
        TRACKING_PY,
        "return mask & ~unseen(m, gfn, slot, mask)",
        "return ~unseen(m, gfn, slot, mask) & FULL_ACCESS",
        "the hardware may write what the policy allows AND what is dirty",
        named(DIRTY, "what_the_host_wrote_is_not_open_to_the_guest"),
    ),
    Mutant(
        "dirty-refused-noted",
        TRACKING_PY,
        "if state == 0 or denied & ~mask or not watched(m, slot):",
        "if state == 0 or not watched(m, slot):",
        "a refused write is not dirty",
        named(DIRTY, "a_refusal_names_what_the_policy_refuses"),
    ),
    Mutant(
        "dirty-refusal-names-clean",
        RUN_PY,
        "return refused or denied",
        "return denied",
        "a refusal names what the policy refuses, not what the log has closed",
        named(DIRTY, "a_refusal_names_what_the_policy_refuses"),
    ),
    Mutant(
        "dirty-harvest-leaves-open",
        DIRTY_LOG_PY,
        "watch_again(m, at, trail)",
        "pass",
        "a harvested page is clean",
        named(DIRTY, "allowed_and_already_dirty"),
        function="take_harvest",
    ),
    Mutant(
        "dirty-log-of-armed-2019",
        TRACKING_PY,
        "elif m.caps[CAP_KVM] & KVM_SAVED_BIT and not page_tracking.active(m):",
        "elif not page_tracking.active(m):",
        "the first series does not log a page that is protected in part",
        named(DIRTY, "the_first_series_leaves_an_armed_leaf_alone"),
    ),
    Mutant(
        "dirty-saved-bit",
        TRACKING_PY,
        "if mask == FULL_ACCESS or not m.caps[CAP_KVM] & KVM_SAVED_BIT or mode(m) & BY_PML:",
        "if True:",
        "later series put bit 61 aside for the log",
        named(DIRTY, "the_saved_bit_waits_for_the_log"),
    ),
    Mutant(
        "dirty-flag-kept",
        MAPPING_PY,
        "if not dirty_marking.flag_waits(m, gfn, slot):",
        "if True:",
        "the processor logs a page whose dirty flag begins at 0",
        named(DIRTY, "a_dirty_flag_begins_at_0_and_pages_are_logged_once"),
    ),
    Mutant(
        "dirty-buffer-lost",
        DIRTY_LOG_PY,
        "write_word(m, frame, ctl.V_PML_INDEX, np.int64(position - 1))",
        "write_word(m, frame, ctl.V_PML_INDEX, LAST_LOG_ENTRY)",
        "entries that were not noted stay in the log",
        named(DIRTY, "a_log_that_frames_do_not_suffice_for_is_emptied_in_part"),
    ),
    Mutant(
        "dirty-large-pages",
        LARGE_PAGES_PY,
        "if level > 1 and (dirty_marking.watched(m, slot) or kvmi_rights.restricted(m, gfn, 2)):",
        "if level > 1 and kvmi_rights.restricted(m, gfn, 2):",
        "tracked pages are mapped at 4 KBytes",
        named(DIRTY, "tracked_pages_are_small"),
    ),
    Mutant(
        "access-large-pages",
        LARGE_PAGES_PY,
        "if level > 1 and (dirty_marking.watched(m, slot) or kvmi_rights.restricted(m, gfn, 2)):",
        "if level > 1 and dirty_marking.watched(m, slot):",
        "a restricted page is mapped at 4 KBytes",
        named(PAGE_ACCESS, "a_restricted_page_is_mapped_small_and_comes_back_from_disk"),
    ),
    Mutant(
        "access-write-without-read",
        RIGHTS_PY,
        "if gone & bits.READ and qualification & exits.Q_WRITE:",
        "if False:",
        "no write reaches a page without read",
        named(PAGE_ACCESS, "rights_of_a_leaf"),
    ),
    Mutant(
        "access-keeps-full-map",
        ACCESS_PY,
        "elif bitmap == FULL_ACCESS:",
        "elif False:",
        "without write access a map of all ones becomes 0",
        named(PAGE_ACCESS, "write_access_is_the_set_map"),
    ),
    Mutant(
        "access-grant",
        "engine/kvm/granted_subpages.py",
        "return False  # no sub-page of it is eligible",
        "pass",
        "a grant does not open a page without read",
        named(PAGE_ACCESS, "no_grant_opens_a_page_without_read"),
    ),
)
