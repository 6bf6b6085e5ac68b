"""What a reader took the body of a tool for, and what it left out: told with the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class SkippedLine(NamedTuple):
    """A line that gave no record: its number from 1, why, and its text, of which the beginning is shown."""

    line: int
    reason: str
    text: str


class Taken(NamedTuple):
    """The format, whose addresses it has, where its sizes are from; how many lines were skipped for each reason, and
    the first of them."""

    format: str
    address: str
    sizes: str
    skipped: Mapping[str, int]
    first: tuple[SkippedLine, ...]
