"""Faults of ``engine/footprint``."""

from __future__ import annotations

from .mutant import Mutant
from .paths import FOOTPRINTS, named

ADVICE_PY = "engine/footprint/advice.py"
COMBINE_PY = "engine/footprint/combine.py"
COSTS_PY = "engine/footprint/costs.py"
HITS_PY = "engine/footprint/hits.py"
KERNELS_PY = "engine/footprint/kernels.py"
ORDERING_PY = "engine/footprint/ordering.py"
PARQUET_BOUNDS_PY = "engine/trace/readers/parquet_bounds.py"
QUESTION_PY = "engine/footprint/question.py"

_REPLAYS = named(f"{FOOTPRINTS}/test_footprint_costs.py", "a_footprint_answers_as_a_replay_does")

MUTANTS = (
    Mutant(
        "footprint-paging-is-plain",
        QUESTION_PY,
        "plain=plain & ~paging,",
        "plain=plain,",
        "accesses to paging structures violate by the page, whatever the sub-page",
        _REPLAYS,
    ),
    Mutant(
        "footprint-read-only",
        QUESTION_PY,
        "mmio = hole | read_only & asks[owner]",
        "mmio = hole",
        "a write to a read-only slot is MMIO, protected or not",
        _REPLAYS,
    ),
    Mutant(
        "footprint-reads-of-read-only",
        QUESTION_PY,
        "mmio = hole | read_only & asks[owner]",
        "mmio = hole | read_only",
        "a read of a read-only slot lands",
        _REPLAYS,
    ),
    Mutant(
        "footprint-large-pages",
        QUESTION_PY,
        "return not kvm_version(self.profile).subpages.force_small",
        "return False",
        "the first series enforces nothing on large pages",
        named(f"{FOOTPRINTS}/test_footprint_costs.py", "large_pages_are_not_enforced_by_the_first_series"),
    ),
    Mutant(
        "footprint-emulated",
        QUESTION_PY,
        "obeying = asks if question.emulator_obeys else asks & guest",
        "obeying = asks",
        "in the first series writes that KVM emulates go past the permissions",
        _REPLAYS,
    ),
    Mutant(
        "footprint-mixed-mmio",
        COSTS_PY,
        "totals.mmio[number] -= count[refused & mixed.mmio].sum()",
        "totals.mmio[number] -= 0",
        "an access that is refused before it comes to MMIO is no MMIO",
        _REPLAYS,
    ),
    Mutant(
        "footprint-collateral",
        COSTS_PY,
        "self.own = united(numbers, gpa, gpa + size - 1, used)",
        "self.own = united(numbers, gpa, gpa + size, used)",
        "collateral touches none of the object's own bytes",
        _REPLAYS,
    ),
    Mutant(
        "footprint-crossing",
        HITS_PY,
        "if line.high[at] >= first[number]:",
        "if line.high[at] > first[number]:",
        "a place that begins before a range and ends at its first sub-page touches it",
        _REPLAYS,
    ),
    Mutant(
        "footprint-once",
        HITS_PY,
        "furthest = max(before + 1, first[number] - line.reach)",
        "furthest = first[number] - line.reach",
        "an access that touches several ranges counts once",
        _REPLAYS,
    ),
    Mutant(
        "footprint-first",
        KERNELS_PY,
        "firsts[cell] = np.uint32(now + np.int64(i))",
        "firsts[cell] = np.uint32(np.int64(i))",
        "indices are absolute",
        named(f"{FOOTPRINTS}/test_footprint_build.py", "any_cut_into_chunks_gives_the_same"),
        "count_bytes",
    ),
    Mutant(
        "footprint-first-of-a-plot",
        KERNELS_PY,
        "plots.firsts[cell] = np.uint32(index - since)",
        "plots.firsts[cell] = np.uint32(index)",
        "first indices of a cell count from the record with which the plots began",
        named(f"{FOOTPRINTS}/test_footprint_build.py", "more_records_than_a_cell_can_count_are_counted"),
    ),
    Mutant(
        "footprint-run",
        KERNELS_PY,
        "begin = i",
        "begin = i + ONE",
        "accesses to one place in a row count each, the first one too",
        named(f"{FOOTPRINTS}/test_footprint_build.py", "places_are_runs_of_sub_pages"),
    ),
    Mutant(
        "footprint-uneven",
        KERNELS_PY,
        "if ((size | gpa) & more) | (more >> LARGEST_SHIFT) | (gpa >> ADDRESS_BITS) != 0:",
        "if (size & more) | (more >> LARGEST_SHIFT) | (gpa >> ADDRESS_BITS) != 0:",
        "an access that is no multiple of its size is in no cell",
        named(f"{FOOTPRINTS}/test_footprint_build.py", "even_and_uneven_places_come_in_order"),
    ),
    Mutant(
        "footprint-uneven-plot",
        KERNELS_PY,
        "if extent == 1 << shift and begin & extent - 1 == 0 and context == 0:",
        "if extent == 1 << shift and context == 0:",
        "an access that is no multiple of its size makes no plot",
        named(f"{FOOTPRINTS}/test_footprint_build.py", "even_and_uneven_places_come_in_order"),
    ),
    Mutant(
        "footprint-far",
        KERNELS_PY,
        "if plots.open[0] == 0:",
        "if False:",
        "where plots would stay empty no more are made",
        named(f"{FOOTPRINTS}/test_footprint_build.py", "places_far_apart_go_to_the_table"),
    ),
    Mutant(
        "footprint-order",
        ORDERING_PY,
        "stop = min(stop, rows[row, 0] << RANK_BEGIN)",
        "stop = min(stop, rows[row, 0] + 1 << RANK_BEGIN)",
        "places that begin alike are in order of their sizes, wherever they were counted",
        named(f"{FOOTPRINTS}/test_footprint_build.py", "an_uneven_place_comes_between_those_of_a_plot"),
    ),
    Mutant(
        "footprint-untranslated",
        KERNELS_PY,
        "what |= UNTRANSLATED",
        "what |= 0",
        "loads of PDPTEs by MOV to CR are reads",
        named(f"{FOOTPRINTS}/test_footprint_build.py", "only_a_paging_read_is_apart_by_whether_it_is_translated"),
    ),
    Mutant(
        "footprint-merge-first",
        COMBINE_PY,
        'found["first"] = np.minimum.reduceat(firsts, begins)',
        'found["first"] = columns["first"][begins]',
        "of first accesses the least (trace, index) stays",
        named(f"{FOOTPRINTS}/test_footprint_stored.py", "merged_in_any_order_files_are_equal"),
    ),
    Mutant(
        "footprint-subtract-first",
        COMBINE_PY,
        'columns["trace"] = np.where(gone, np.int32(UNKNOWN), columns["trace"])',
        'columns["trace"] = np.where(gone, np.int32(0), columns["trace"])',
        "where the first access was of a trace that is gone, it is not known",
        named(f"{FOOTPRINTS}/test_footprint_stored.py", "what_was_added_can_be_taken_away"),
    ),
    Mutant(
        "footprint-merge-last-piece",
        COMBINE_PY,
        "return [None, *cuts.tolist(), None]",
        "return [None, *cuts.tolist()] if len(cuts) else [None, None]",
        "what is merged piece by piece is what is merged at once",
        named(f"{FOOTPRINTS}/test_footprint_stored.py", "large_ones_are_merged_piece_by_piece"),
    ),
    Mutant(
        "footprint-advice-far-mmio",
        ADVICE_PY,
        "return replace(cost, mmio=cost.mmio + self.mmio)",
        "return cost",
        "an edited policy costs the MMIO of places far from it, too",
        named(f"{FOOTPRINTS}/test_footprint_advice.py", "what_is_far_from_a_policy_is_not_forgotten"),
    ),
    Mutant(
        "footprint-advice-far-places",
        ADVICE_PY,
        "taken = [(begin >> 12, last >> 12), _pages_of(policy), far]",
        "taken = [(begin >> 12, last >> 12), _pages_of(policy)]",
        "objects are moved to where nothing is accessed, far from the policy either",
        named(f"{FOOTPRINTS}/test_footprint_advice.py", "what_is_far_from_a_policy_is_not_forgotten"),
    ),
    Mutant(
        "footprint-values-of-pages",
        PARQUET_BOUNDS_PY,
        "if values != chunk.values:",
        "if values < 0:",
        "the pages of a column have as many values as it says",
        named(f"{FOOTPRINTS}/test_footprint_stored.py", "a_directory_that_lies_is_refused"),
    ),
    Mutant(
        "footprint-values-of-columns",
        PARQUET_BOUNDS_PY,
        "if sum(values) != footer.rows:",
        "if sum(values) < footer.rows:",
        "a column has as many values as the file has records, for which memory is asked",
        named(f"{FOOTPRINTS}/test_footprint_stored.py", "a_directory_that_lies_is_refused"),
    ),
)
