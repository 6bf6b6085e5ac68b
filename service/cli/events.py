"""``subpage events``: the event log of a machine, to its end or for as long as it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from service.cli import complete, show
from service.cli.connection import Service, remote, told
from service.cli.vms import VmArgument, machine

# Members of a violation that a line shows.
_VIOLATION = ("index", "vcpu", "gpa", "gva", "size", "access", "denied", "objects")
_KINDS = (
    "lifecycle", "memory-slot", "protection", "subpages", "page-access",
    "violation", "host-memory", "flush", "vcpu", "nested",
)  # fmt: skip


def _kinds(incomplete: str) -> list[str]:
    """The last of several kinds, for the shell."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{kind}" for kind in _KINDS if kind.startswith(last)]


@remote
def events(
    service: Service,
    vm: VmArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until the machine is deleted or Ctrl-C.")
    ] = False,
    kinds: Annotated[
        str | None,
        typer.Option(help="Only these kinds, with commas, such as violation,host-memory.", autocompletion=_kinds),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            help="Begin after the event of this id; latest: with what comes next.",
            autocompletion=complete.one_of("latest"),
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """Print the events of a machine, oldest first: violations, changes, host memory, flushes.

    With --follow a connection that breaks is made again where it ended: no event is missed, and none comes twice.
    """
    try:
        with told("subpage events"), service.client() as client:
            for event in machine(client, vm).events(follow=follow, kinds=kinds, after=after):
                if as_json:
                    show.line(event)
                else:
                    typer.echo(_text(event))
    except KeyboardInterrupt:
        if not follow:
            raise


def _text(event: Mapping[str, Any]) -> str:
    """An event on one line."""
    detail, number = event["detail"], "" if event["id"] is None else event["id"]
    if event["kind"] == "dropped":
        said = "{count} events, {first} to {last}, cannot be shown: {reason}".format(**detail)
    else:
        names = _VIOLATION if event["kind"] == "violation" and "gpa" in detail else detail
        said = " ".join(f"{name}={_word(detail[name])}" for name in names)
        if event["trace"] is not None:
            said += f" trace={event['trace']}"
    return f"{number:>10}  {event['created'][:23].replace('T', ' ')}Z  {event['kind']:<11}  {said}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() and " " not in value else json.dumps(value)
