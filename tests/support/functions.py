"""What a file of tests defines, read from its source: lists that name tests are held against it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def functions_of(name: str) -> frozenset[str]:
    """The functions of a file, which is named from the root of the repository."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
