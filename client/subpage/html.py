"""What notebooks show: tables of documents, and bitmaps as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

ROWS = 200  # of a table; what follows is counted
_CELL = 10  # pixels of a sub-page
_LABEL = 90


class Document(dict[str, Any]):
    """A reply of the service: a dictionary that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return of_members(self)


def of_members(document: Mapping[str, Any], title: str = "") -> str:
    """Names and values; lists of documents as tables of their own below."""
    plain = {name: value for name, value in document.items() if not _records(value)}
    parts = [table(("", title), plain.items())] if plain else []
    parts += [f"<b>{escape(name)}</b>{of_records(rows)}" for name, rows in document.items() if _records(rows)]
    return "".join(parts)


def of_records(rows: Sequence[Mapping[str, Any]]) -> str:
    """Documents with the same members, one a row."""
    names = list(dict.fromkeys(name for row in rows[:ROWS] for name in row))
    return table(names, ([row.get(name) for name in names] for row in rows), len(rows))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], count: int = 0) -> str:
    """Rows under a head, the first ``ROWS`` of them."""
    lines = []
    for number, row in enumerate(rows):
        if number == ROWS:
            lines.append(f"<tr><td colspan={len(head)}>and {count - ROWS} more</td></tr>")
            break
        lines.append("<tr>" + "".join(f"<td style='text-align:left'>{_text(cell)}</td>" for cell in row) + "</tr>")
    shown = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{shown}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def picture(first_gfn: int, words: Sequence[int]) -> str:
    """Pages as rows of 32 sub-pages: light what may be written, dark what may not."""
    shown = min(len(words), ROWS)
    height, width = (shown + 1) * (_CELL + 2), _LABEL + 32 * (_CELL + 1)
    parts = [f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' font-size='10'>"]
    for row in range(shown):
        top = row * (_CELL + 2)
        parts.append(f"<text x='0' y='{top + _CELL}' font-family='monospace'>{first_gfn + row:#x}</text>")
        parts += [_cell(bit, top, bool(words[row] >> bit & 1)) for bit in range(32)]
    left = f"; {len(words) - shown} more pages" if len(words) > shown else ""
    foot = f"32 sub-pages of 128 bytes a row; dark: no write{left}"
    parts.append(f"<text x='{_LABEL}' y='{height - 2}'>{foot}</text></svg>")
    return "".join(parts)


def _cell(bit: int, top: int, writable: bool) -> str:
    colour = "#cfe8cf" if writable else "#8b1a1a"
    left = _LABEL + bit * (_CELL + 1)
    return f"<rect x='{left}' y='{top}' width='{_CELL}' height='{_CELL}' fill='{colour}'/>"


def _records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return escape(text if len(text) <= 300 else f"{text[:300]}…")
