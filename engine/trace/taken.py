"""What a reader took the body of a tool for, and what it left out: told with the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Skipped lines that are shown, and how much of a line.
SHOWN_LINES = 10
SHOWN_CHARACTERS = 200


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


def shown(line: bytes) -> str:
    """A line for people: at most SHOWN_CHARACTERS, without what terminals act on."""
    text = line[: 4 * SHOWN_CHARACTERS].removesuffix(b"\r").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:SHOWN_CHARACTERS])
