"""Where tests lie: each in the folder of the room that it is about, under a name that no other has."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
ROOMS = {path.name for path in (TESTS.parent / "engine").iterdir() if (path / "__init__.py").exists()}
# What is about the package as a whole.
ABOUT_THE_ENGINE = {"test_errors.py", "test_kernel_cache.py"}
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


def test_every_room_of_the_engine_has_its_folder() -> None:
    filled = {path.parent.relative_to(TESTS / "engine").parts[:1] for path in (TESTS / "engine").rglob("test_*.py")}
    assert filled == {(), *((room,) for room in ROOMS)}
    assert {path.name for path in (TESTS / "engine").glob("test_*.py")} == ABOUT_THE_ENGINE
