"""``subpage events``: the event log of a machine of a running service, to its end or for as long as it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import typer

from service.cli.vms import HERE, Authorities, Client, Token, Unanswered, Url, complete

# A service shows at least this often that a stream lives, unless it was told otherwise; then the stream is begun anew.
_SILENCE = 60.0
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
# Ends after which there is nothing to come back to.
_FINAL = ("deleted", "unauthenticated")
# Members of a violation that a line shows.
_VIOLATION = ("index", "vcpu", "gpa", "gva", "size", "access", "denied", "objects")


class _Broken(Exception):
    """The stream broke off, or the service was not to be reached just now."""


class _Follower:
    """One reader of a log, who knows how far it has come."""

    def __init__(self, client: Client, vm: str, query: dict[str, str]) -> None:
        self._client = client
        self._path = f"/v1/vms/{vm}/events"
        self._query = query
        self._connected = False

    def events(self, *, follow: bool) -> Iterator[dict[str, Any]]:
        """Events in order; with ``follow``, through every interruption. Raises Unanswered."""
        failures = 0
        if self._query.get("after") == "latest":
            # As a number, or what happens during an interruption would be passed over.
            self._query["after"] = str(self._client.get(f"{self._path}?after=latest")["last"])
        while True:
            try:
                for event in self._once(follow=follow):
                    failures = 0
                    yield event
                    if event["kind"] == "end" and event["detail"]["reason"] in _FINAL:
                        return
            except _Broken as broken:
                if not follow or not self._connected:
                    raise Unanswered(str(broken)) from None
                if not failures:
                    typer.echo(f"subpage events: {broken}; trying again", err=True)
            if not follow:
                return
            time.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
            failures += 1

    def _once(self, *, follow: bool) -> Iterator[dict[str, Any]]:
        query = {**self._query, "follow": "true"} if follow else self._query
        for line in self._client.lines(self._path, query, _SILENCE, _Broken):
            self._connected = True
            if line:
                event = json.loads(line)
                if event["id"] is not None:
                    self._query["after"] = str(event["id"])
                yield event


def _text(event: dict[str, Any]) -> str:
    """An event on one line."""
    detail, number = event["detail"], "" if event["id"] is None else event["id"]
    if event["kind"] == "dropped":
        told = "{count} events, {first} to {last}, cannot be shown: {reason}".format(**detail)
    else:
        names = _VIOLATION if event["kind"] == "violation" and "gpa" in detail else detail
        told = " ".join(f"{name}={_word(detail[name])}" for name in names)
        if event["trace"] is not None:
            told += f" trace={event['trace']}"
    return f"{number:>10}  {event['created'][:23].replace('T', ' ')}Z  {event['kind']:<11}  {told}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() and " " not in value else json.dumps(value)


def events(
    vm: Annotated[str, typer.Argument(help="Id of the machine.", autocompletion=complete)],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until the VM is deleted.")
    ] = False,
    kinds: Annotated[
        str | None, typer.Option(help="Only these kinds, with commas between them, such as violation,host-memory.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="Begin after the event of this id; `latest`: with what comes next.")
    ] = None,
    url: Url = HERE,
    token: Token = None,
    authorities: Authorities = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """Print the events of a machine, oldest first: violations, changes, host memory, flushes.

    With --follow a connection that breaks is made again where it ended: no event is missed, and none comes twice.
    """
    query = {name: value for name, value in (("kinds", kinds), ("after", after)) if value is not None}
    try:
        with Client(url, token, authorities) as client:
            for event in _Follower(client, quote(vm, safe=""), query).events(follow=follow):
                typer.echo(json.dumps(event, separators=(",", ":")) if as_json else _text(event))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
