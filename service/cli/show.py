"""One way to print: tables on a terminal, aligned columns in a pipe, documents where JSON is asked for.

Rich leaves colours out where NO_COLOR is set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

GAP = "  "


def console() -> Console:
    """Standard output, as wide as the terminal is."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def on_terminal() -> bool:
    """Whether people look at it."""
    return bool(console().is_terminal)


def document(found: Any) -> None:
    """One document as JSON."""
    typer.echo(json.dumps(found, indent=1, ensure_ascii=False))


def line(found: Any) -> None:
    """One of many documents, on a line of its own."""
    typer.echo(json.dumps(found, separators=(",", ":"), ensure_ascii=False))


def table(
    names: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Sequence[str] = (),
    literal: bool = False,
    to: Console | None = None,
) -> None:
    """Rows of values under names; those of columns in ``right`` end under each other, as numbers do. ``literal``: the
    names are those of data, and stay as they are."""
    cells = [[_cell(value) for value in row] for row in rows]
    to = to or console()
    if to.is_terminal:
        _rich_table(names, cells, right, to)
        return
    lines = [list(names) if literal else [name.upper() for name in names], *cells]
    widths = [max(len(row[at]) for row in lines) for at in range(len(names))]
    for row in lines:
        shown = zip(names, row, widths, strict=True)
        padded = (text.rjust(width) if name in right else text.ljust(width) for name, text, width in shown)
        _echo(GAP.join(padded).rstrip(), to)


def members(found: Mapping[str, object]) -> None:
    """Names and their values, one on a line."""
    cells = {name: _cell(value) for name, value in found.items()}
    if on_terminal():
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in cells.items():
            grid.add_row(_plain(name), _plain(text))
        console().print(grid)
        return
    width = max(map(len, cells), default=0)
    for name, text in cells.items():
        typer.echo(f"{name:<{width}}{GAP}{text}".rstrip())


def _echo(text: str, to: Console) -> None:
    """A line as it is, however long."""
    to.print(text, markup=False, soft_wrap=True)


def _rich_table(names: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[str], to: Console) -> None:
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for at, name in enumerate(names):
        number = name in right
        shown.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number or not at)
    for row in cells:
        shown.add_row(*map(_plain, row))
    to.print(shown)


def _plain(text: str) -> Any:
    """What stands in it is no markup."""
    from rich.text import Text

    return Text(text)


def _cell(value: object) -> str:
    """A value as people read it, in a line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return printable(text)


def printable(text: str, also: str = "") -> str:
    """Text from elsewhere, a guest perhaps: characters that move the cursor, or command a terminal, are shown escaped.
    Those of ``also`` stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in also else c.encode("unicode_escape").decode() for c in text)


def size(octets: int) -> str:
    """Bytes as people say them."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if octets >= 1 << shift:
            return f"{octets / (1 << shift):.4g} {unit}"
    return f"{octets} bytes"


def moment(text: str | None) -> str:
    """A time of the service, to the second."""
    return "-" if text is None else f"{text[:19].replace('T', ' ')}Z"
