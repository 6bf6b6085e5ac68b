"""The tables of docs/kvmi.md from those of the code."""

from __future__ import annotations

from service.kvmi.commands import COMMANDS
from service.kvmi.events import EVENTS

_BEGIN, _END = "<!-- {}: made from the code -->\n", "<!-- end of {} -->\n"


def commands_text() -> str:
    """A row for each command."""
    rows = "".join(f"| {row.id} | {row.name} | {row.about} |\n" for row in COMMANDS.values() if row.handler)
    left = ", ".join(f"{row.name} ({row.id})" for row in COMMANDS.values() if row.handler is None)
    return f"| id | command | here |\n|---|---|---|\n{rows}\nKnown and refused with EOPNOTSUPP: {left}.\n"


def events_text() -> str:
    """A row for each event that is ever sent."""
    rows = "".join(f"| {row.id} | {row.name} | {row.switch} | {row.sent} |\n" for row in EVENTS.values() if row.sent)
    silent = ", ".join(f"{row.name} ({row.id})" for row in EVENTS.values() if not row.sent)
    return (
        f"| id | event | enabled by | sent when |\n|---|---|---|---|\n{rows}\nMay be enabled, never sent: {silent}.\n"
    )


def page_text(page: str) -> str:
    """A page with its tables as they are today."""
    for name, text in (("commands", commands_text()), ("events", events_text())):
        begin, end = _BEGIN.format(name), _END.format(name)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{text}{end}{rest.partition(end)[2]}"
    return page
