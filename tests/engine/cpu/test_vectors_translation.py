"""Tables A to F, K, N and M of the printed vectors.

Rows of A to F run without and with advanced exit information, which adds bit 10 for their linear page; those of N and M
show it. None depends on a translation cache: they run with one too, which is empty.
"""

from __future__ import annotations

import pytest

from engine.state.default_host import EPT_VPID_CAP

from . import vectors_tables as tables
from .bench_machine import ADVANCED, Processor
from .vectors import OPTIONS, run

PLAIN = tables.chosen(
    (
        *(tables.PERMISSIONS + tables.MISCONFIGURATION + tables.SUBPAGES),
        *(tables.WIDTHS + tables.GUEST_PAGING + tables.FLAGS_AND_VE),
    )
)
FULL = (*tables.ADVANCED, *tables.MODE_BASED)


@pytest.mark.parametrize("model", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("advanced", [False, True], ids=["plain", "advanced"])
@pytest.mark.parametrize(("setup", "access", "expected"), [row[1:] for row in PLAIN], ids=[row[0] for row in PLAIN])
def test_plain(setup: str, access: str, expected: str, advanced: bool, model: bool) -> None:
    p = Processor(cap=ADVANCED if advanced else EPT_VPID_CAP, model=model)
    run(p, setup, access, expected, advanced=advanced)


@pytest.mark.parametrize(("setup", "access", "expected"), [row[1:] for row in FULL], ids=[row[0] for row in FULL])
def test_full(setup: str, access: str, expected: str) -> None:
    run(Processor(cap=ADVANCED), setup, access, expected)


@pytest.mark.parametrize(
    ("options", "setup", "access", "expected"), [row[1:] for row in tables.DERIVED], ids=[r[0] for r in tables.DERIVED]
)
def test_derived(options: str, setup: str, access: str, expected: str) -> None:
    run(Processor(**OPTIONS[options]), setup, access, expected)


def test_every_choice_is_one_of_the_legal_outcomes() -> None:
    rows = {row[0]: row[3] for row in (*PLAIN, *tables.CACHED, *tables.ENTRY)}
    printed = {
        row[0]: row[3]
        for table in (tables.PERMISSIONS, tables.WIDTHS, tables.FLAGS_AND_VE, tables.CACHED, tables.ENTRY)
        for row in table
    }
    for name, choice in tables.CHOICES.items():
        assert name in rows and choice.split(" gpa=")[0].split(" (")[0] in printed[name]
