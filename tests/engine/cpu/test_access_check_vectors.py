"""The decision about an access by itself: tables A to D of the printed vectors, and rows that need entries only.

``(id, set-up, access, reason, qualification, why)``; reason 0 is an access that completes. Each was run on a processor
model, or is derived from the manual where none could run it (ids with K).
"""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.cpu import ept
from tests.engine.cpu import vectors_tables
from tests.engine.cpu.bench_machine import ALL
from tests.engine.cpu.tables import (
    ADVANCED,
    B58,
    B60,
    B61,
    CAP,
    FAR_PT,
    L1,
    L2,
    L3,
    NEAR,
    PT,
    ROOT,
    Access,
    Tables,
    fetch,
    modify,
    read,
    write,
)
from tests.engine.cpu.vectors import described, expectations, set_up

Row = tuple[str, dict[str, Any], Access, int, int, str]
OK, VIOLATION, MISCONFIGURATION, SPP = 0, 48, 49, 66
USER, WRITABLE, NX = acc.LINEAR_USER, acc.LINEAR_WRITABLE, acc.LINEAR_EXECUTE_DISABLE
VALID = acc.LINEAR_VALID
AD = bits.EPTP_ACCESSED_DIRTY
SUPERVISOR_SHADOW_STACK = bits.EPTP_SHADOW_STACK

MISCONFIGURATIONS: list[Row] = [
    ("B03", {"pte": 0x17}, read(), MISCONFIGURATION, 0, "memory type 2"),
    ("B06", {"pte": 0x07}, read(), OK, 0, "memory type 0"),
    ("B09", {"pte": 0x2F}, read(), OK, 0, "memory type 5"),
    ("B15", {"PDE": PT | 7 | 0x40}, read(), MISCONFIGURATION, 0, "bit 6 of a PDE that names a table"),
]

SUBPAGES: list[Row] = [
    ("C14", {"pte": 0x35 | B61, "L4E": 0}, write(), SPP, 0x800, "SPPL4E invalid: miss"),
    ("C20", {"pte": 0x35 | B61, "L2E": L1 | 1 | 1 << 40, "vec": 1}, write(), SPP, 0, "SPPL2E beyond the width"),
    ("C26", {"pte": 0x35 | B61, "L3E": 2}, write(), SPP, 0x800, "not valid counts before reserved bits"),
    ("C29", {"pte": 0x35 | B61, "vec": ALL, "spp": False}, write(), VIOLATION, 0x1AA, "control off: no SPP"),
    ("C35", {"pte": 0x34 | B61, "vec": ALL}, write(), VIOLATION, 0x1A2, "execute-only leaf: not eligible by default"),
    ("C35 switch", {"pte": 0x34 | B61, "vec": ALL, "execute_only_spp": 1}, write(), OK, 0, "eligible by the switch"),
    (
        "C35 modify",
        {"pte": 0x34 | B61, "vec": ALL, "execute_only_spp": 1},
        modify(),
        VIOLATION,
        0x1A2,
        "read is missing",
    ),
    ("C38", {"PDE": PT | 5, "pte": 0x37 | B61, "vec": 1}, write(), OK, 0, "W=0 above the leaf: eligible"),
]

WIDTHS: list[Row] = [
    ("D01 mirrored", {"pte": 0x35 | B61, "vec": 4}, write(0x7C), VIOLATION, 0x1AA, "S0 denied, S1 allowed"),
    ("D20", {"pte": 0x35 | B61, "vec": ALL & ~(1 << 20)}, write(0, 4096), VIOLATION, 0x1AA, "a whole page, S10 denied"),
    ("D23", {"pte": 0x35 | B61, "vec": 1 << 62}, write(0xFFC), OK, 0, "over two pages, both allowed"),
]

PAGING = read(8, kind=acc.PAGING_READ)
UPDATE = write(8, kind=acc.PAGING_UPDATE)
STACK = write(kind=acc.SHADOW_STACK)

PAGING_STRUCTURES: list[Row] = [
    ("E01", {"pte": 0x35}, PAGING, OK, 0, "flags off: a walk only reads"),
    ("E02", {"pte": 0x35}, UPDATE, VIOLATION, 0xAB, "A update is a write: bits 0 and 1, bit 8 clear"),
    ("E05", {"EPTP": AD, "pte": 0x35}, PAGING, VIOLATION, 0xAB, "flags on: a walk read counts as a write"),
    ("E07", {"pte": 0x35 | B61, "vec": ALL}, UPDATE, VIOLATION, 0xAB, "never eligible for SPP"),
    ("E08", {"PTE": 0}, PAGING, VIOLATION, 0x81, "not present, flags off"),
    ("E16", {"pte": 0x35 | B61, "vec": ALL}, write(8), OK, 0, "an ordinary write to the same page is eligible"),
    ("K10", {"paging_write": 1, "pte": 0x34 | B58}, fetch(), MISCONFIGURATION, 0, "bit 58 without read"),
    ("K11", {"paging_write": 1, "EPTP": AD, "pte": 0x31 | B58}, PAGING, OK, 0, "bit 58 lets paging writes pass"),
    ("K11 data", {"paging_write": 1, "pte": 0x31 | B58}, write(), VIOLATION, 0x18A, "and no other writes"),
    ("K11 off", {"EPTP": AD, "pte": 0x31 | B58}, PAGING, VIOLATION, 0x8B, "nor anything with the control off"),
    (
        "K13",
        {"paging_write": 1, "EPTP": AD, "PDE": PT | 5, "pte": 0x35 | B58},
        PAGING,
        VIOLATION,
        0xAB,
        "W above the leaf must be 1",
    ),
    (
        "K14",
        {"EPTP": AD, "PTE": 0},
        read(kind=acc.PAGING_READ, linear=0),
        VIOLATION,
        0x1,
        "PDPTE load by MOV to CR3: no linear address, and a read even with flags on",
    ),
    ("K18", {"EPTP": SUPERVISOR_SHADOW_STACK, "pte": 0x37}, STACK, VIOLATION, 0x21BA, "bit 60 decides, not W"),
    ("K19", {"EPTP": SUPERVISOR_SHADOW_STACK, "pte": 0x31 | B60}, STACK, OK, 0, "leaf W is irrelevant"),
    (
        "K19 upper",
        {"EPTP": SUPERVISOR_SHADOW_STACK, "PDE": PT | 5, "pte": 0x31 | B60 | B61, "vec": ALL},
        STACK,
        VIOLATION,
        0x618A,
        "W above must be 1, and SPP does not help",
    ),
    (
        "K19 user",
        {"EPTP": SUPERVISOR_SHADOW_STACK, "pte": 0x31 | B60},
        write(kind=acc.SHADOW_STACK, linear=VALID | USER),
        VIOLATION,
        0x618A,
        "user shadow stacks go by W",
    ),
]

EXIT_INFORMATION: list[Row] = [
    (
        "N01",
        {"cap": ADVANCED, "pte": 0x35},
        write(linear=VALID | USER | WRITABLE),
        VIOLATION,
        0x7AA,
        "user, writable, executable",
    ),
    ("N03", {"cap": ADVANCED, "pte": 0x35}, write(linear=VALID | WRITABLE | NX), VIOLATION, 0xDAA, "supervisor, NX"),
    ("N04", {"cap": ADVANCED, "PTE": 0}, read(linear=VALID | USER | NX), VIOLATION, 0xB81, "user, read-only, NX"),
    ("K17", {"cap": ADVANCED, "PTE": 0}, write(linear=VALID | USER | WRITABLE), VIOLATION, 0x782, "paging off"),
    ("N off", {"PTE": 0}, read(linear=VALID | USER | NX), VIOLATION, 0x181, "no bits 11:9 without the capability"),
    ("N paging", {"cap": ADVANCED, "pte": 0x35}, UPDATE, VIOLATION, 0xAB, "nor for paging structures"),
]

MODE_BASED_EXECUTE: list[Row] = [
    ("M01", {"mbec": 1, "pte": 0x435}, write(), VIOLATION, 0x1EA, "bit 6 is set for data accesses too"),
    ("M02", {"mbec": 1, "pte": 0x433}, fetch(), VIOLATION, 0x1DC, "supervisor fetch, only user execute"),
    ("M04", {"mbec": 1, "pte": 0x432}, read(), MISCONFIGURATION, 0, "-W- and user execute"),
    ("M05", {"mbec": 1, "pte": 0x435 | B61, "vec": 1}, write(), OK, 0, "with SPP"),
    ("M06", {"mbec": 1, "pte": 0x433}, fetch(linear=VALID | USER), OK, 0, "user fetch, user execute"),
    ("M07", {"mbec": 1, "pte": 0x037}, fetch(linear=VALID | USER), VIOLATION, 0x1BC, "user fetch, supervisor execute"),
    ("M08", {"mbec": 1, "PTE": 0}, fetch(), VIOLATION, 0x184, "not present: rights are 0"),
    ("M09", {"mbec": 0, "pte": 0x430}, read(), VIOLATION, 0x181, "user execute alone is not present without MBEC"),
    ("K07", {"mbec": 1, "cap": CAP & ~bits.CAP_EXECUTE_ONLY, "pte": 0x430}, read(), MISCONFIGURATION, 0, "XU alone"),
    ("K07 X", {"cap": CAP & ~bits.CAP_EXECUTE_ONLY, "pte": 0x34}, fetch(), MISCONFIGURATION, 0, "X alone"),
]

PROCESSORS: list[Row] = [
    ("K08", {"far": 1, "cap": CAP & ~bits.CAP_1G, "PDPTE": 0xB7}, read(), MISCONFIGURATION, 0, "no 1-GByte pages"),
    ("K09", {"cap": CAP & ~bits.CAP_2M, "PDE": 0x800000 | 0xB7}, read(), MISCONFIGURATION, 0, "no 2-MByte pages"),
    ("K04", {"five": ROOT | 0x87}, read(), MISCONFIGURATION, 0, "PML5E bit 7"),
    ("K05", {"five": ROOT | 5, "pte": 0x37 | B61, "vec": 1}, write(), OK, 0, "PML5E W=0: eligible"),
    ("K05 denied", {"five": ROOT | 5, "pte": 0x37 | B61, "vec": 0}, write(), VIOLATION, 0x1AA, "and denied"),
    ("K06", {"five": 0}, write(), VIOLATION, 0x182, "PML5E not present"),
    ("width 52", {"width": 52, "pte": 0x37 | 1 << 51}, read(), OK, 0, "bit 51 is an address bit of a wide processor"),
]

PRINTED = vectors_tables.chosen(
    (
        *(vectors_tables.PERMISSIONS + vectors_tables.MISCONFIGURATION),
        *(vectors_tables.SUBPAGES + vectors_tables.WIDTHS),
    )
)


@pytest.mark.parametrize(("setup", "access", "expected"), [row[1:] for row in PRINTED], ids=[row[0] for row in PRINTED])
def test_printed_vector(setup: str, access: str, expected: str) -> None:
    """Without a walk of guest paging before it, and no part of an access but the first is looked at after a refusal."""
    tables = Tables({"far": "G39" in setup})
    set_up(tables.processor, setup)
    how, kind, size, circumstances, linear = described(access)
    outcome = tables.access(Access(acc.describe(how, kind, circumstances=circumstances), size, linear - NEAR))
    (legal,) = expectations(expected, advanced=False)
    assert (outcome.reason, outcome.qualification) == (legal.reason, legal.qualification or 0)


ROWS = [
    *MISCONFIGURATIONS,
    *SUBPAGES,
    *WIDTHS,
    *PAGING_STRUCTURES,
    *EXIT_INFORMATION,
    *MODE_BASED_EXECUTE,
    *PROCESSORS,
]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}: {row[5]}" for row in ROWS])
def test_vector(row: Row) -> None:
    _, setup, access, reason, qualification, _ = row
    tables = Tables(setup)
    outcome = tables.access(access)
    assert (outcome.reason, hex(outcome.qualification)) == (reason, hex(qualification))


def test_no_vector_is_listed_twice() -> None:
    ids = [row[0] for row in ROWS]
    assert len(set(ids)) == len(ids)


WIDE = [
    ("K01", read(), 0x181),
    ("K02", write(), 0x182),
    ("K03", fetch(), 0x184),
]


@pytest.mark.parametrize(("access", "qualification"), [row[1:] for row in WIDE], ids=[row[0] for row in WIDE])
@pytest.mark.parametrize("bit", [48, 49, 51])
def test_address_wider_than_four_levels_is_a_violation_without_rights(
    access: Access, qualification: int, bit: int
) -> None:
    tables = Tables({"width": 52, "pte": 0x35 | B61, "vec": ALL})
    outcome = tables.access(access, gpa=1 << bit | NEAR)
    assert (outcome.reason, outcome.qualification, outcome.denied) == (VIOLATION, qualification, 0)
    assert tables.trail[9].tolist()[:2] == [0, 0], "nothing was read"


def test_five_levels_translate_what_four_do_not() -> None:
    tables = Tables({"five": ROOT | 7})
    assert tables.access(read()).reason == OK
    assert tables.access(read(), gpa=1 << 48 | NEAR).qualification == 0x181
    tables.put(*(tables.places["five"][0], 1), ROOT | 7)
    assert tables.access(read(), gpa=1 << 48 | NEAR).reason == OK


# ---- what is reported beside the qualification

DENIED = [
    ("one sub-page", 0, write(0x80), 1 << 1),
    ("second of two", 1, write(0x7C), 1 << 1),
    ("first of two", 4, write(0x7C), 1 << 0),
    ("both of two", 0, write(0x7C), 3),
    ("some of four", 0b00_01_00_01, write(0, 512), 0b1010),
    ("last", ALL & ~(1 << 62), write(0xFFF, 1), 1 << 31),
    ("all", 0, write(0, 4096), 0xFFFF_FFFF),
]


@pytest.mark.parametrize(("vec", "access", "denied"), [row[1:] for row in DENIED], ids=[row[0] for row in DENIED])
def test_denied_is_the_mask_of_touched_sub_pages_that_refuse(vec: int, access: Access, denied: int) -> None:
    outcome = Tables({"pte": 0x35 | B61, "vec": vec}).access(access)
    assert (outcome.reason, outcome.denied) == (VIOLATION, denied)


def test_second_page_is_decided_only_when_the_first_allows() -> None:
    setup = {"pte": 0x35 | B61, "vec": 0, "next_PTE": 0}
    assert Tables(setup).access(write(0xFFC)).gpa == NEAR + 0xFFC
    outcome = Tables({**setup, "vec": 1 << 62}).access(write(0xFFC))
    assert (outcome.gpa, outcome.qualification) == (NEAR + 0x1000, 0x182)


@pytest.mark.parametrize("name", ["PML4E", "PDPTE", "PDE"])
def test_absent_table_memory_reads_as_all_ones(name: str) -> None:
    nowhere = (1 << 38) | 7
    outcome = Tables({name: nowhere}).access(read())
    assert outcome.reason == MISCONFIGURATION, "all ones have reserved bits set"


@pytest.mark.parametrize("name", ["L4E", "L3E", "L2E"])
def test_absent_sub_page_table_memory_reads_as_all_ones(name: str) -> None:
    outcome = Tables({"pte": 0x35 | B61, name: (1 << 38) | 1}).access(write())
    assert (outcome.reason, outcome.qualification) == (SPP, 0)


def test_absent_sppt_root_reads_as_all_ones() -> None:
    assert Tables({"pte": 0x35 | B61, "SPPTP": 0x1000}).access(write()).reason == SPP


# ---- accessed and dirty flags

A, D = bits.ACCESSED, bits.DIRTY

FLAGS = [
    ("F01: SPP-allowed write", {"EPTP": AD, "pte": 0x35 | B61, "vec": 1}, write(), A, A | D),
    ("F02: plain write", {"EPTP": AD}, write(), A, A | D),
    ("F03: read", {"EPTP": AD, "pte": 0x35 | B61, "vec": 1}, read(), A, A),
    ("fetch", {"EPTP": AD}, fetch(), A, A),
    ("read-modify-write", {"EPTP": AD}, modify(), A, A | D),
    ("walk read counts as a write", {"EPTP": AD}, PAGING, A, A | D),
    ("flags off", {}, write(), 0, 0),
    ("denied write", {"EPTP": AD, "pte": 0x35 | B61, "vec": 0}, write(), 0, 0),
    ("denied by rights", {"EPTP": AD, "pte": 0x35}, write(), 0, 0),
    ("SPPT miss", {"EPTP": AD, "pte": 0x35 | B61, "L2E": 0}, write(), 0, 0),
    ("misconfiguration", {"EPTP": AD, "pte": 0x3F}, write(), 0, 0),
    ("second page refuses", {"EPTP": AD, "next_PTE": 0}, write(0xFFC), 0, 0),
]


@pytest.mark.parametrize(
    ("setup", "access", "upper", "leaf"), [row[1:] for row in FLAGS], ids=[row[0] for row in FLAGS]
)
def test_flags_are_set_only_by_accesses_that_succeed(
    setup: dict[str, Any], access: Access, upper: int, leaf: int
) -> None:
    tables = Tables(setup)
    tables.perform(access)
    assert [tables.entry(name) & (A | D) for name in ("PML4E", "PDPTE", "PDE", "PTE")] == [upper, upper, upper, leaf]


def test_vector_is_not_touched_by_flags() -> None:
    tables = Tables({"EPTP": AD, "pte": 0x35 | B61, "vec": 1})
    assert tables.perform(write()).reason == OK
    assert [tables.entry(name) for name in ("L4E", "L3E", "L2E", "vec")] == [L3 | 1, L2 | 1, L1 | 1, 1]


def test_dirty_flag_of_a_large_page_is_in_its_leaf() -> None:
    tables = Tables({"EPTP": AD, "PDE": 0x800000 | 0xB7})
    assert tables.perform(write()).reason == OK
    assert tables.entry("PDE") & (A | D) == A | D
    assert tables.entry("PTE") & (A | D) == 0


def test_far_page_has_tables_of_its_own() -> None:
    tables = Tables({"far": 1, "EPTP": AD, "PDE": FAR_PT | 7})
    assert tables.perform(write()).reason == OK
    assert tables.entry("PDE") == FAR_PT | 7 | A


# ---- what the VMCS says about walks

MODES = [
    ("mbec", {"mbec": 1, "spp": False}, ept.MODE_EPT | ept.MODE_MBEC),
    ("spp", {}, ept.MODE_EPT | ept.MODE_SPP),
    ("accessed and dirty flags", {"spp": False, "EPTP": AD}, ept.MODE_EPT | ept.MODE_ACCESSED_DIRTY),
    ("shadow stack", {"spp": False, "EPTP": SUPERVISOR_SHADOW_STACK}, ept.MODE_EPT | ept.MODE_SHADOW_STACK),
    ("paging write", {"spp": False, "paging_write": 1}, ept.MODE_EPT | ept.MODE_PAGING_WRITE),
    ("paging verification", {"spp": False, "paging_verification": 1}, ept.MODE_EPT | ept.MODE_PAGING_VERIFICATION),
    ("virtualization exceptions", {"spp": False, "ve": 1}, ept.MODE_EPT | ept.MODE_VE),
    ("page-modification logging", {"spp": False, "pml": 1}, ept.MODE_EPT | ept.MODE_PML),
    ("nothing", {"spp": False}, ept.MODE_EPT),
]


@pytest.mark.parametrize(("setup", "mode"), [row[1:] for row in MODES], ids=[row[0] for row in MODES])
def test_mode_word(setup: dict[str, Any], mode: int) -> None:
    assert int(ept.mode_of(Tables(setup).m, 0)) == mode
