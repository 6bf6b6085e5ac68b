"""Faults of traces with flushes: what is remembered, what is stale, which operation is said to have missed it."""

from __future__ import annotations

from .mutant import Mutant
from .paths import MACHINE, TRACE, named

TRANSLATED_PY = "engine/trace/translated.py"
OPERATIONS_PY = "engine/trace/operations.py"
TIMED_PY = "engine/trace/timed.py"
PERFORMED_PY = "engine/machine/trace_operations.py"
MISSED_PY = "engine/machine/missed_flushes.py"
TRACES = f"{MACHINE}/test_missed_flushes.py"
ARGUMENTS = f"{TRACE}/test_operation_columns.py"


def missing(*rows: str) -> tuple[str, ...]:
    """Rows of what does not remove a translation."""
    return tuple(f"{TRACES}::test_what_does_not[tlfs-{row}]" for row in rows)


MUTANTS = (
    Mutant(
        "translated-other-space",
        TRANSLATED_PY,
        "if own and tlb.translates(m, row, vcpu, kind, page):",
        "if tlb.translates(m, row, vcpu, kind, page):",
        "a translation is of one address space",
        named(TRACES, "address_spaces_are_told_apart"),
    ),
    Mutant(
        "translated-recorded-gpa",
        TRANSLATED_PY,
        "return gpa if apart else at, stale",
        "return gpa, stale",
        "a stale access takes place where the translation leads",
        named(TRACES, "it_takes_place_where_the_translation_leads"),
    ),
    Mutant(
        "translated-kept-after-violation",
        TRANSLATED_PY,
        "tlb.drop(m, row)",
        "pass",
        "29.4.3.1: an EPT violation removes the combined mapping of its linear address",
        named(TRACES, "it_takes_place_where_the_translation_leads"),
    ),
    Mutant(
        "translated-own-sightings",
        TRANSLATED_PY,
        "for other in range(m.queues.shape[0]):",
        "for other in range(vcpu, vcpu + 1):",
        "every vCPU tells when a page was still where it had been",
        named(TRACES, "what_changed_when_is_known_from_every_processor"),
    ),
    Mutant(
        "translated-no-source",
        TRANSLATED_PY,
        "mine = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK == acc.GUEST",
        "mine = True",
        "KVM and the host use no translations of the guest",
        named(TRACES, "what_is_not_by_a_linear_address"),
    ),
    Mutant(
        "translated-second-page",
        TRANSLATED_PY,
        "keep(m, vcpu, gva + done, at + done, index, word, trail, uses)",
        "keep(m, vcpu, gva, at, index, word, trail, uses)",
        "each page of an access has its own translation",
        named(TRACES, "an_access_over_two_pages"),
    ),
    Mutant(
        "timed-halted",
        TIMED_PY,
        "self._enter_guest(TraceChunk(part, None, {}, operations=beside))",
        "pass",
        "a vCPU does what is queued for it before it runs",
        named(TRACES, "a_halted_processor_flushes_before_it_runs"),
    ),
    Mutant(
        "operations-space-of-others",
        PERFORMED_PY,
        "write_word(m, FIRST_VCPU_FRAME + position, ctl.V_CR3, signed(space))",
        "pass",
        "an operation runs under its address space",
        named(TRACES, "an_operation_runs_under_its_address_space"),
    ),
    Mutant(
        "missed-order",
        MISSED_PY,
        "if why is not None and (found is None or MISSES.index(why) <= found[0]):",
        "if why is not None:",
        "the operation that came nearest is told, not the last one",
        missing("the nearest of several"),
    ),
    Mutant(
        "missed-window",
        MISSED_PY,
        "if not place.after < item.index < place.index:",
        "if not item.index < place.index:",
        "what came before the page changed could not help",
        named(TRACES, "what_changed_when_is_known_from_every_processor"),
    ),
    Mutant(
        "missed-elsewhere",
        MISSED_PY,
        'return "not-targeted" if pages and spaces else None',
        'return "not-targeted"',
        "a flush of another page on another processor missed nothing",
        missing("another page elsewhere"),
    ),
    Mutant(
        "argument-fast-words",
        OPERATIONS_PY,
        "elif rest > XMM_BYTES or rest % WORD:",
        "elif rest > XMM_BYTES:",
        "registers hold whole words",
        named(ARGUMENTS, "what_is_no_operation"),
    ),
)
