"""Faults of replays and accesses that ask."""

from __future__ import annotations

from .mutant import Mutant
from .paths import INTERACTIVE, INTERACTIVE_TIMED, named

INTERACTIVE_PY = "engine/trace/interactive.py"
ACCESS_PY = "engine/trace/interactive_access.py"

TIMED_PY = "engine/trace/interactive_timed.py"
PUBLISHED_PY = "engine/trace/published.py"

MUTANTS = (
    Mutant(
        "published-question-without-its-chunk",
        PUBLISHED_PY,
        "self._drain(self._place.chunk, self._place.base)",
        "pass",
        "an exit that is published before it is answered has the columns that it carries",
        named(INTERACTIVE, "what_is_published_at_each_question_adds_up"),
    ),
    Mutant(
        "published-resumes-behind-the-question",
        PUBLISHED_PY,
        "return max(self._next, self._options.start) if paused is None else paused",
        "return max(self._next, self._options.start)",
        "the record that is asked about has not been run",
        named(INTERACTIVE, "what_is_published_at_each_question_adds_up"),
    ),
    Mutant(
        "interactive-writes",
        INTERACTIVE_PY,
        "self.tally[reg.WRITES] += writes",
        "self.tally[reg.WRITES] += 1",
        "only a write that was answered is a write",
        named(INTERACTIVE, "always_the_same_answer"),
    ),
    Mutant(
        "interactive-second-violation",
        INTERACTIVE_PY,
        "for counter in COUNTED_ONCE:",
        "for counter in COUNTED_ONCE[::2]:",
        "a granted access counts once for page granularity",
        named(INTERACTIVE, "always_the_same_answer"),
    ),
    Mutant(
        "interactive-landing",
        INTERACTIVE_PY,
        "if self._ended_in == res.VIOLATION:",
        "if self._ended_in != res.VIOLATION:",
        "dirty logs are told of a write that was allowed",
        named(INTERACTIVE, "dirty_logs_are_told_as_by_a_replay"),
    ),
    Mutant(
        "interactive-counted-twice",
        INTERACTIVE_PY,
        "self._counted[:] = self.tally",
        "pass",
        "each stretch adds its own part to the totals of the machine",
        named(INTERACTIVE, "always_the_same_answer"),
    ),
    Mutant(
        "interactive-retry-skips",
        INTERACTIVE_PY,
        "return self._run_on(place, 0, most)",
        "return self._run_on(place, 1, most)",
        "retry runs the same record",
        named(INTERACTIVE, "retry_runs_on_the_state_as_it_is"),
    ),
    Mutant(
        "interactive-rest-forgotten",
        INTERACTIVE_PY,
        "self._left = place._replace(position=end)",
        "pass",
        "what an answer has left of a chunk is replayed",
        named(INTERACTIVE, "an_answer_and_a_few_records_at_a_time"),
    ),
    Mutant(
        "interactive-retry-seen",
        INTERACTIVE_PY,
        "self._seen.fill(-1)",
        "pass",
        "a retried violation counts for its object again",
        named(INTERACTIVE, "retry_that_is_refused_again_counts_again"),
    ),
    Mutant(
        "interactive-change-unnoticed",
        INTERACTIVE_PY,
        "self._changed = draft.base is not self._draft.machine",
        "self._changed = False",
        "a grant of what was opened meanwhile runs the access",
        named(INTERACTIVE, "grant_of_what_was_opened_meanwhile_runs_it"),
    ),
    Mutant(
        "interactive-objects-of-now",
        INTERACTIVE_PY,
        "self._set = self._set_of(targets)",
        "self._set = 0",
        "an exit record names the objects that were protected when it happened",
        named(INTERACTIVE, "objects_that_come_and_go"),
    ),
    Mutant(
        "interactive-hits-forgotten",
        INTERACTIVE_PY,
        "elif name in self._gone:",
        "elif name == self._gone:",
        "an object that comes back goes on to be counted",
        named(INTERACTIVE, "objects_that_come_and_go"),
    ),
    Mutant(
        "interactive-granted-where-recorded",
        TIMED_PY,
        "records[at, 0] = self._accessed(place)[0]",
        "pass",
        "what is granted by a stale translation runs where that leads",
        named(INTERACTIVE_TIMED, "always_the_same_answer"),
    ),
    Mutant(
        "interactive-load-beside-its-space",
        TIMED_PY,
        "space = operation.address_space if operation.arg is not None else None",
        "space = operation.address_space",
        "the recorded operand of a load is not the space that another value is loaded under",
        named(INTERACTIVE_TIMED, "what_is_loaded_may_be_another_value"),
    ),
    Mutant(
        "asked-access-counts-again",
        ACCESS_PY,
        "tally[counter] = 0",
        "pass",
        "an access that runs again is one record",
        named(INTERACTIVE, "an_access_retried"),
    ),
    Mutant(
        "asked-access-outcome",
        ACCESS_PY,
        "attempt = replace(whole, exit_columns=whole.exit_columns[self._before :])",
        "attempt = whole",
        "a retry that goes through is an access that completed",
        named(INTERACTIVE, "an_access_retried"),
    ),
)
