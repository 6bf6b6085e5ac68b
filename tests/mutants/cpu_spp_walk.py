"""Faults of ``engine/cpu``. The SPPT walk and its words."""

from __future__ import annotations

from .mutant import Mutant
from .paths import ACCESS_CHECK, WORDS, named, plain

SPPT_PY = "engine/cpu/sppt.py"
INSTRUCTION_PY = "engine/cpu/instruction.py"

MUTANTS = (
    Mutant(
        "sppt-reserved-high",
        SPPT_PY,
        "HIGH = -(1 << 52)",
        "HIGH = 0",
        "29.3.4.2: bits 63:52 are reserved, unlike in EPT",
        plain("C21"),
    ),
    Mutant(
        "sppt-order",
        SPPT_PY,
        "if not entry & sppt.VALID:",
        "if not entry & sppt.VALID and not entry & reserved:",
        "29.3.4.2: an entry that is not valid is a miss, whatever else it holds",
        named(ACCESS_CHECK, "invalid_entry_with_reserved_bits_is_a_miss"),
    ),
    Mutant(
        "sppt-reserved-unchecked",
        SPPT_PY,
        "if entry & reserved:",
        "if level == 4 and entry & reserved:",
        "29.3.4.2: reserved bits count at every upper level",
        plain("C24"),
    ),
    Mutant(
        "sppt-odd-bits",
        SPPT_PY,
        "return (MISCONFIGURED if entry & sppt.VECTOR_RESERVED else FOUND), entry",
        "return FOUND, entry",
        "29.3.4.2: an odd bit of SPPL1E is a misconfiguration",
        plain("C13"),
    ),
    Mutant(
        "sppt-index-of-root",
        SPPT_PY,
        "index = index_of(gpa, level)",
        "index = index_of(gpa, level) if level < 4 else 0",
        "29.3.4.2: SPPL4 is indexed by GPA[47:39]",
        plain("C43"),
    ),
    Mutant(
        "sppt-touched-last",
        SPPT_PY,
        "last = ((gpa & 0xFFF) + size - 1) >> sppt.SUBPAGE_SHIFT",
        "last = ((gpa & 0xFFF) + size) >> sppt.SUBPAGE_SHIFT",
        "29.3.4.2: sub-page s is bytes 128s to 128s + 127",
        named(WORDS, "sub_pages_that_an_access_touches"),
    ),
    Mutant(
        "sppt-touched-first-only",
        SPPT_PY,
        "return (2 << last) - (1 << first)",
        "return 1 << first",
        "29.3.4.2: a write may touch several sub-pages",
        plain("D01"),
    ),
    Mutant(
        "sppt-sub-page-index",
        SPPT_PY,
        "first = (gpa >> sppt.SUBPAGE_SHIFT) & 31",
        "first = (gpa >> sppt.SUBPAGE_SHIFT) & 15",
        "29.3.4.2: the sub-page is GPA[11:7]",
        named(WORDS, "sub_pages_that_an_access_touches"),
    ),
    Mutant(
        "sppt-gather",
        SPPT_PY,
        "word = (word | (word >> 4)) & 0x00FF_00FF_00FF_00FF",
        "word = (word | (word >> 4)) & 0x00FF_00FF_00FF_000F",
        "29.3.4.2: bit 2s of SPPL1E is sub-page s",
        named(WORDS, "bit_s_of_a_mask_is_bit_2s_of_a_vector"),
    ),
    Mutant(
        "access-second-page",
        INSTRUCTION_PY,
        "while done < size:",
        "while done == 0:",
        "29.3.4.1: each page of an access needs permission",
        plain("D22"),
    ),
)
