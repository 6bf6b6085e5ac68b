"""Faults of names of guest memory: ``engine/symbols/``, what is kept of them, and the search for the kernel."""

from __future__ import annotations

from .mutant import Mutant
from .paths import named

TABLE_PY = "engine/symbols/table.py"
PLACEMENT_PY = "engine/symbols/placement.py"
SEARCH_PY = "engine/machine/kernel_search.py"
KEPT_PY = "engine/state/kept_bytes.py"

TABLE = "tests/engine/symbols/test_symbol_table.py"
FILES = "tests/engine/symbols/test_symbol_files.py"
MACHINE = "tests/engine/machine/test_symbol_operations.py"

MUTANTS = (
    Mutant(
        "symbols-end",
        TABLE_PY,
        "inside = (below >= 0) & (addresses - self.addresses[first] < reach)",
        "inside = (below >= 0) & (addresses - self.addresses[first] <= reach)",
        "the first byte behind a symbol is not of it",
        named(TABLE, "beyond_a_size_of_the_file_there_is_no_name", "lookups_agree_with_a_plain_search"),
    ),
    Mutant(
        "symbols-inside-a-name",
        TABLE_PY,
        "if self.bounds[position] == at:",
        "if position:",
        "a name that ends like another is not that of a module",
        named(TABLE, "a_name_that_modules_alone_have"),
    ),
    Mutant(
        "placement-by-tables",
        PLACEMENT_PY,
        "return address >= KERNEL_HALF and not in_image and placement.gpa(address) is None",
        "return not in_image and placement.gpa(address) is None",
        "data per CPU have offsets for addresses, which no table has",
        named(TABLE, "what_only_tables_say_is_neither_image_nor_direct_map"),
    ),
    Mutant(
        "symbols-far-apart",
        TABLE_PY,
        "gaps[gaps >= _APART] = 0",
        "pass",
        "the distance to a symbol of another image is no size",
        named(FILES, "the_last_symbol_and_one_far_from_the_next_have_no_size"),
    ),
    Mutant(
        "placement-phys-base",
        PLACEMENT_PY,
        "found = address - START_KERNEL_MAP + self.phys_base",
        "found = address - START_KERNEL_MAP",
        "pa = va - __START_KERNEL_map + phys_base (page_64.h of Linux)",
        named(TABLE, "slide_and_phys_base_move_the_image_apart"),
    ),
    Mutant(
        "search-negative-phys-base",
        SEARCH_PY,
        "slide = shift - (said - (1 << 64) if said >= 1 << 63 else said)",
        "slide = shift - said",
        "phys_base is negative where the image moved further in virtual memory than in physical memory",
        named(MACHINE, "the_kernel_is_found_in_memory"),
    ),
    Mutant(
        "search-another-kernel",
        SEARCH_PY,
        "text = file.banner or _BANNER",
        "text = _BANNER",
        "a banner that says another version is of another kernel",
        named(MACHINE, "symbols_of_another_kernel_are_refused"),
    ),
    Mutant(
        "kept-bytes-next-index",
        KEPT_PY,
        "listed[:-1, _LISTED] = index[1:]",
        "pass",
        "what one index frame cannot list is listed by the next",
        named(MACHINE, "loading_again_replaces_and_dropping_frees"),
    ),
)
