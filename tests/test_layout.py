"""Where tests lie: each in the folder of the room that it is about, under a name that no other has."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Houses with rooms, and what is tested of each as a whole.
HOUSES = {
    "engine": {"test_errors.py", "test_kernel_cache.py"},
    "service": {"test_examples.py", "test_problems.py", "test_service.py"},
    "service/api": set(),
    "client": set(),
}
# Files and failures of the operating system: the rooms that use them have the tests.
WITHOUT_TESTS = {"platform"}
MODULES = sorted(TESTS.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The parts of the name of everything that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (part for name in names for part in name.split("."))


def test_no_two_files_of_tests_have_one_name() -> None:
    names = Counter(path.name for path in MODULES if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_module_imports_one_of_tests() -> None:
    """What several of them need is in a module of its own."""
    files = {path.stem for path in MODULES if path.name.startswith("test_")}
    assert [path for path in MODULES if not files.isdisjoint(imported(path))] == []


@pytest.mark.parametrize(("house", "about_it_all"), HOUSES.items())
def test_every_room_has_its_folder(house: str, about_it_all: set[str]) -> None:
    rooms = {path.name for path in (TESTS.parent / house).iterdir() if (path / "__init__.py").exists()}
    tests = TESTS / house
    filled = {path.relative_to(tests).parts[0] for path in tests.rglob("test_*.py") if path.parent != tests}
    assert filled == rooms - WITHOUT_TESTS
    assert {path.name for path in tests.glob("test_*.py")} == about_it_all
