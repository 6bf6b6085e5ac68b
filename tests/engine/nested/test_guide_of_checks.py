"""The guide lists every check, in order, with the profiles that make it."""

from __future__ import annotations

from pathlib import Path

from engine.nested import ENTRY_CHECKS, STEPS

GUIDE = Path(__file__).parents[3] / "docs" / "nested-state.md"


def profiles(eras: tuple[str, ...]) -> list[str]:
    return ["✓" if profile in eras else "–" for profile in ("kvm-2019", "kvm-latest")]


def rows(columns: int) -> list[list[str]]:
    lines = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == columns and row[-1] in ("✓", "–")]


def test_steps() -> None:
    told = [[row[0], row[1], *row[3:]] for row in rows(5)]
    assert told == [[s.check, s.says, *profiles(s.profiles)] for s in STEPS if s.check != "SVM"]


def test_entry_checks() -> None:
    assert rows(4) == [[f"`{check.name}`", check.says, *profiles(check.profiles)] for check in ENTRY_CHECKS]
