"""The threat model names the tests that hold its promises: they are there."""

from __future__ import annotations

import re

import pytest

from tests.support.functions import ROOT, functions_of

GUIDE = ROOT / "docs" / "operations-security.md"


def promises() -> list[tuple[str, list[str]]]:
    """Each promise of the table, and the tests that it names."""
    table = GUIDE.read_text(encoding="utf-8").partition("| promise | held by |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \|([^|]*)\|$", table, re.MULTILINE)
    return [
        (promise, re.findall(r"`([^`]+)`", tests)) for promise, tests in rows if not promise.startswith(("**", "-"))
    ]


@pytest.mark.parametrize(("promise", "named"), promises(), ids=lambda value: value if isinstance(value, str) else "")
def test_each_promise_is_held_by_a_test(promise: str, named: list[str]) -> None:
    assert named, promise
    for test in named:
        file, _, function = test.partition("::")
        assert function.startswith("test_") and function in functions_of(file), test


def test_the_table_is_read() -> None:
    assert len(promises()) > 20


def test_every_file_of_attacks_holds_a_promise() -> None:
    named = {test.partition("::")[0] for _, tests in promises() for test in tests}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "abuse").glob("test_*.py")}
    assert files <= named
