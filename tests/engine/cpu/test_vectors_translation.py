"""Tables A to F, N and M of the printed vectors.

Rows of A to F run without and with advanced exit information, which adds bit 10 for their linear page; those of N and M
show it. None depends on a translation cache: they run with one too, which is empty.
"""

from __future__ import annotations

import pytest

from . import vectors_tables as tables
from .vectors import run

PLAIN = (
    *(tables.PERMISSIONS + tables.MISCONFIGURATION + tables.SUBPAGES),
    *(tables.WIDTHS + tables.GUEST_PAGING + tables.FLAGS_AND_VE),
)
FULL = (*tables.ADVANCED, *tables.MODE_BASED)


@pytest.mark.parametrize("model", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("advanced", [False, True], ids=["plain", "advanced"])
@pytest.mark.parametrize(("setup", "access", "expected"), [row[1:] for row in PLAIN], ids=[row[0] for row in PLAIN])
def test_plain(setup: str, access: str, expected: str, advanced: bool, model: bool) -> None:
    run(setup, access, expected, advanced=advanced, model=model)


@pytest.mark.parametrize(("setup", "access", "expected"), [row[1:] for row in FULL], ids=[row[0] for row in FULL])
def test_full(setup: str, access: str, expected: str) -> None:
    run(setup, access, expected, advanced=True, full=True)
