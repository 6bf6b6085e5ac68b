"""Faults of ``engine/hyperv``: reading of hypercalls, execution of flushes, queues, direct flush."""

from __future__ import annotations

from .mutant import Mutant
from .paths import HYPERV, MACHINE, named

KVM_RULES = "engine/hyperv/kvm_rules.py"
TLFS_RULES = "engine/hyperv/tlfs_rules.py"
QUEUES_PY = "engine/hyperv/queues.py"
EXECUTION_PY = "engine/hyperv/flush_execution.py"
DIRECT_PY = "engine/hyperv/l2_hypercalls.py"
RANGES_PY = "engine/hyperv/flush_ranges.py"
LINEAR_WIDTH_PY = "engine/machine/linear_width.py"
SELECT_PY = "engine/cpu/tlb_select.py"
VECTORS = f"{HYPERV}/test_hypercall_vectors.py"
LISTS = f"{HYPERV}/test_list_ranges.py"
# The page before the upper half of 48-bit addresses, and one more.
ACROSS = "0xffff7ffffffff001-48"

MUTANTS = (
    Mutant(
        "hyperv-empty-mask",
        KVM_RULES,
        "everyone = bool(header[1] & hv.ALL_PROCESSORS) or header[2] == 0",
        "everyone = bool(header[1] & hv.ALL_PROCESSORS)",
        "Linux 7.1: an empty processor mask means everyone",
        (f"{VECTORS}::test_as_kvm_reads_it[S07-kvm-2019]",),
    ),
    Mutant(
        "hyperv-long-list",
        KVM_RULES,
        "if call.rep and control.reps <= LONGEST_LIST:",
        "if call.rep:",
        "Linux 7.1: a list of more than 15 is not read",
        (f"{VECTORS}::test_as_kvm_reads_it[F06-kvm-2019]",),
    ),
    Mutant(
        "hyperv-nested-reserved",
        KVM_RULES,
        "if control.value & hv.RESERVED_WITH_NESTED:",
        "if control.value & hv.RESERVED:",
        "Linux 7.1: bit 31 of the input value is reserved",
        (f"{VECTORS}::test_as_kvm_reads_it[S17-kvm-2019]",),
    ),
    Mutant(
        "hyperv-page-crossing",
        TLFS_RULES,
        "if gpa % hv.WORD_BYTES or gpa % hv.PAGE + size > hv.PAGE or gpa + size > 1 << environment.physical_width:",
        "if gpa % hv.WORD_BYTES or gpa + size > 1 << environment.physical_width:",
        "TLFS: a parameter list does not cross a page",
        (f"{VECTORS}::test_by_the_specification[S22-exact]",),
    ),
    Mutant(
        "hyperv-rep-start",
        TLFS_RULES,
        "words = block[call.header + control.variable + control.start :]",
        "words = block[call.header + control.variable :]",
        "TLFS: a rep call resumes at its start index",
        (f"{VECTORS}::test_by_the_specification[L13-exact]",),
    ),
    Mutant(
        "hyperv-all-processors",
        TLFS_RULES,
        "everyone = bool(flags & hv.ALL_PROCESSORS) or (call.sparse and block[2] == hv.SET_ALL)",
        "everyone = call.sparse and block[2] == hv.SET_ALL",
        "TLFS: ALL_PROCESSORS counts in every call",
        (f"{VECTORS}::test_by_the_specification[X09-exact]",),
    ),
    Mutant(
        "hyperv-large-ranges",
        RANGES_PY,
        "bits = hv.HUGE_BITS if word & hv.RANGE_1G else hv.LARGE_BITS",
        "bits = hv.LARGE_BITS",
        "Ranges of 1-GiB pages have bit 12 set",
        named(f"{HYPERV}/test_second_level.py", "vectors"),
    ),
    Mutant(
        "hyperv-hole-of-a-range",
        RANGES_PY,
        "first, last = max(first, ~highest), min(last, highest)",
        "first, last = first if first >= ~highest else last + 1, last",
        "TLFS: addresses beyond the GVA space are ignored, not ranges",
        (f"{LISTS}::test_by_the_specification[{ACROSS}-kvm-2019]",),
    ),
    Mutant(
        "hyperv-range-wraps",
        RANGES_PY,
        "if first < 0 and not wraps:",
        "if first < 0:",
        "Linux: the pages of a range follow each other modulo 2^64",
        (f"{LISTS}::test_as_kvm_reads_it[0xfffffffffffffffe-48-kvm-latest]",),
    ),
    Mutant(
        "hyperv-first-address",
        RANGES_PY,
        "return self.by_page or canonical(word, self.width)",
        "return True",
        "Linux 6.16: a range goes by its first address",
        (f"{LISTS}::test_as_kvm_reads_it[{ACROSS}-kvm-2019]",),
    ),
    Mutant(
        "hyperv-each-page",
        "engine/state/profiles.py",
        "flushes_each_page = Row(False, True)  # of a range of a flush list, or by its first address: 7.1 and 6.16",
        "flushes_each_page = Row(False, False)  # of a range of a flush list, or by its first address: 7.1 and 6.16",
        "Linux 7.1: each page of a range is looked at",
        (f"{LISTS}::test_as_kvm_reads_it[{ACROSS}-kvm-latest]",),
    ),
    Mutant(
        "hyperv-width-of-the-host",
        LINEAR_WIDTH_PY,
        "return LINEAR_57 if _host_has_la57(config, m, states) else LINEAR_48",
        "return LINEAR_48",
        "Linux: addresses of a flush list are held to the host's width",
        named(f"{MACHINE}/test_linear_width.py", "a_list_goes_by_the_width_of_the_host"),
    ),
    Mutant(
        "invvpid-width-of-7.1",
        "engine/state/profiles.py",
        "invvpid_by_host = Row(False, True)  # its address has the host's width, or that of CR4.LA57",
        "invvpid_by_host = Row(False, False)  # its address has the host's width, or that of CR4.LA57",
        "Linux 7.1: INVVPID holds its address to the host's width",
        named(f"{MACHINE}/test_linear_width.py", "invvpid_goes_by_cr4_or_the_host"),
    ),
    Mutant(
        "invvpid-width-of-5.3",
        LINEAR_WIDTH_PY,
        "return LINEAR_57 if _wide(config, m)[position] else LINEAR_48",
        "return LINEAR_48",
        "Linux 5.3: INVVPID holds its address to the width of CR4.LA57",
        named(f"{MACHINE}/test_linear_width.py", "invvpid_goes_by_cr4_or_the_host"),
    ),
    Mutant(
        "la57-without-cpuid",
        "engine/vcpu/control_registers.py",
        "return not value & CR4_LA57 or cpuid_facts.has_la57(entries)",
        "return True",
        "Linux 5.3.6: KVM_SET_SREGS refuses CR4.LA57 without its CPUID bit",
        named("tests/engine/ioctls/test_register_ioctls.py", "sregs_that_cannot_be_together"),
    ),
    Mutant(
        "hyperv-each-page-by-the-specification",
        EXECUTION_PY,
        'by_page = config.flush_policy == "tlfs" or kvm_version(config.profile).hyperv.flushes_each_page',
        "by_page = kvm_version(config.profile).hyperv.flushes_each_page",
        "TLFS: whatever carries a flush out leaves nothing that is required",
        (f"{LISTS}::test_by_the_specification[{ACROSS}-kvm-2019]",),
    ),
    Mutant(
        "hyperv-queue-place",
        QUEUES_PY,
        "wanted = words if words is not None and 0 < len(words) < PLACES - count else (EVERYTHING,)",
        "wanted = words if words is not None and 0 < len(words) <= PLACES - count else (EVERYTHING,)",
        "Linux 7.1: one place of a queue is kept for everything",
        named(f"{HYPERV}/test_queues.py", "sequences"),
    ),
    Mutant(
        "hyperv-queue-of-mode",
        EXECUTION_PY,
        "which = queues.NESTED_QUEUE if in_nested else queues.OWN_QUEUE",
        "which = queues.OWN_QUEUE",
        "Linux 7.1: a vCPU does the queue of its mode",
        named(f"{HYPERV}/test_queues.py", "each_mode_has_its_queue"),
        function="service",
    ),
    Mutant(
        "hyperv-globals",
        SELECT_PY,
        "return globals_ == tlb.GLOBALS_TOO",
        "return True",
        "TLFS: NON_GLOBAL_MAPPINGS_ONLY lets global translations be",
        (f"{VECTORS}::test_by_the_specification[S05-exact]",),
    ),
    Mutant(
        "hyperv-large-page",
        SELECT_PY,
        "return in_ranges(first, first + (1 << bits) - 1, ranges)",
        "return in_ranges(m.tlb[row, tlb.E_PAGE], m.tlb[row, tlb.E_PAGE], ranges)",
        "TLFS: an address within a large page drops the whole page",
        named(f"{HYPERV}/test_properties.py", "a_page_inside_a_large_one_drops_it_whole"),
    ),
    Mutant(
        "hyperv-nested-ids",
        SELECT_PY,
        "if nested == 0 or m.tlb[row, tlb.E_NESTED_VM] != vm:",
        "if nested == 0:",
        "TLFS: a direct flush is of the contexts of the caller's VM id",
        named(f"{HYPERV}/test_l2_hypercalls.py", "nothing_required_is_left_of_other_contexts_either"),
    ),
    Mutant(
        "hyperv-lock-count",
        "engine/hyperv/dispatch.py",
        "if not any(page):",
        "if True:",
        "TLFS: L1 is told after a flush while its TLB lock count is not 0",
        named(f"{HYPERV}/test_l2_hypercalls.py", "the_lock_count_asks_for_an_exit_after_the_flush"),
    ),
    Mutant(
        "hyperv-direct-hypercall",
        DIRECT_PY,
        "if not guest.direct:",
        "if False:",
        "TLFS: L1 asks for direct hypercalls in its VP assist page",
        named(f"{HYPERV}/test_l2_hypercalls.py", "reflected"),
    ),
    Mutant(
        "hyperv-clean-bit",
        "engine/nested/enlightened.py",
        'if page is not None and not EVMCS.get(page, "hv_clean_fields") >> CLEAN_BITS["ENLIGHTENMENTSCONTROL"] & 1:',
        "if page is not None:",
        "TLFS: clean bit 15 covers VP id, VM id and partition assist page",
        named(f"{HYPERV}/test_nested_guest.py", "a_clean_bit_keeps_the_old_id"),
    ),
    Mutant(
        "hyperv-late-vp-id",
        "engine/hyperv/kvm_on_hyperv.py",
        '_put(m, vcpu, host, {"hv_vp_id": vp_index & 0xFFFF_FFFF, "hv_clean_fields": CLEAN_ALL})',
        '_put(m, vcpu, host, {"hv_clean_fields": CLEAN_ALL})',
        "Linux 5.4: the VP id is stored after each exit",
        named(f"{MACHINE}/test_hypercall_operations.py", "enabling_writes_the_enlightened_vmcs_and_running_the_vp_id"),
    ),
    Mutant(
        "hyperv-direct-hypercall-taken-back",
        "engine/hyperv/kvm_on_hyperv.py",
        'fields["control"] |= DIRECT_HYPERCALL if asks else 0',
        'fields["control"] = DIRECT_HYPERCALL if asks else 0',
        "Linux 5.4: loading an enlightened VMCS that does not ask leaves DirectHypercall as it is",
        named(f"{HYPERV}/test_kvm_on_hyperv.py", "loading_and_leaving_a_cpu"),
    ),
    Mutant(
        "hyperv-msrs-enforced",
        "engine/vcpu/msrs.py",
        "return leaf is None or not leaf.eax & _NEEDED[number]",
        "return leaf is None",
        "Linux 7.1: each MSR needs its bit of CPUID 0x40000003.EAX where CPUID is enforced",
        named("tests/service/api/hyperv/test_hypercalls.py", "msrs_are_kept_from_a_guest_whose_cpuid_has_them_not"),
    ),
    Mutant(
        "hyperv-amd-2019",
        "engine/hyperv/kvm_on_hyperv.py",
        "able = self.ported if self.svm else self.evmcs",
        "able = self.svm or self.evmcs",
        "Linux 5.4: on AMD there is no direct flush",
        named(f"{HYPERV}/test_kvm_on_hyperv.py", "on_amd_kvm_asks_since_it_was_ported"),
    ),
    Mutant(
        "hyperv-xmm-list",
        "engine/arch/hypercall.py",
        "XMM_CALLS = frozenset(code for code, call in CALLS.items() if call.header + call.rep > FAST_GENERAL)",
        "XMM_CALLS = VIRTUAL_CALLS",
        "TLFS: a list of second-level ranges does not fit two general registers",
        named(f"{HYPERV}/test_modes.py", "which_calls_have_input_in_xmm_registers"),
    ),
)
