"""What long commands show on a terminal: a bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

ProgressOption = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="Show a bar; on a terminal by default.")
]

Move = Callable[..., object]
"""Takes how much is done, and what is said beside it: ``done``, a text, and ``description``."""


@contextmanager
def bar(what: str, wanted: bool | None, size: int | None = None) -> Iterator[Move]:
    """A bar that follows a share of 1 with the text ``done``, or bytes out of ``size`` with their rate. ``wanted`` as
    the option says it; where there is no bar, moving it does nothing.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda completed, **said: None
        return
    from rich import progress as rich
    from rich.console import Console

    amounts = (
        (rich.TextColumn("{task.percentage:>3.0f} %"), rich.TextColumn("{task.fields[done]}"))
        if size is None
        else (rich.DownloadColumn(binary_units=True), rich.TransferSpeedColumn())
    )
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *amounts, rich.TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with rich.Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(what, total=1.0 if size is None else size or None, done="")
            yield lambda completed, **said: shown.update(task, completed=completed, **said)
    finally:
        console.show_cursor()  # an interruption while the bar comes or goes would leave it hidden
