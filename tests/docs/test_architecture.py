"""What is said of the house: its rooms, and functions on the way of a request, are where they are said to be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREE = re.search(r"## The house\n\n```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
HOUSES = ("engine", "service")
# Path, and functions that are entered there.
STOPS = re.findall(r"^\| `([\w./]+\.py)` \| ((?:`\w+`(?:, )?)+) \|", ARCHITECTURE, re.MULTILINE)


def tree() -> list[str]:
    """The paths that the tree of CONTRIBUTING.md shows."""
    assert TREE is not None
    house, paths = "", []
    for line in TREE[1].splitlines():
        name = line.split()[0]
        house = "" if not line.startswith(" ") else house
        paths.append(house + name)
        house = house or name
    return paths


def rooms(house: str) -> set[str]:
    return {f"{house}/{path.parent.name}/" for path in (ROOT / house).glob("*/__init__.py")}


def test_the_tree_is_what_stands() -> None:
    assert [path for path in tree() if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("house", HOUSES)
def test_every_room_is_told_of(house: str) -> None:
    told = set(re.findall(r"^\|.*?\|", ARCHITECTURE, re.MULTILINE))
    assert [room for room in sorted(rooms(house)) if not any(f"`{room}`" in row for row in told)] == []


@pytest.mark.parametrize("house", HOUSES)
def test_every_room_is_in_the_tree(house: str) -> None:
    assert rooms(house) - set(tree()) == set()


@pytest.mark.parametrize(("place", "names"), STOPS, ids=[f"{at}-{place}" for at, (place, _) in enumerate(STOPS)])
def test_functions_on_the_way_are_there(place: str, names: str) -> None:
    defined = {
        node.name
        for node in ast.walk(ast.parse((ROOT / place).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(re.findall(r"`(\w+)`", names)) <= defined


def test_both_walks_are_read() -> None:
    assert len(STOPS) > 70
