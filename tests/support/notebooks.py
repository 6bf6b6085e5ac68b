"""Notebooks without Jupyter, which is 35 packages: their cells in order, and what each of them would show."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def shown_by(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Id of each cell with code, what it shows when it is run now, and what the file says that it showed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            found = _run("".join(cell["source"]), f"{path.name}:{cell['id']}", names)
            yield cell["id"], found, [_text(output) for output in cell["outputs"]]


def _run(source: str, name: str, names: dict[str, Any]) -> list[str]:
    """What is printed, and the value of the last line where that is an expression."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    html = getattr(value, "_repr_html_", None)
    displayed = None if value is None else html() if html else repr(value)
    return [text for text in (printed.getvalue(), displayed) if text]


def _text(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    return "".join(data.get("text/html") or data.get("text/plain") or output["text"])
