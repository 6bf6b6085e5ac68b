"""Values for the shell: what a service has, and names that are fixed. Nothing where the service does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import typer

from service.cli.connection import service_of
from service.platform.failures import Failure

if TYPE_CHECKING:
    import subpage

Values = list[tuple[str, str]]

# A shell waits for no longer.
_SECONDS = 2.0
_MOST = 200


def _values(
    context: typer.Context, incomplete: str, found: Callable[[subpage.Client], Iterable[tuple[str, str]]]
) -> Values:
    values: Values = []
    try:
        with service_of(context).client(timeout=_SECONDS, patience=0.0) as client:
            for value, about in found(client):
                if value.startswith(incomplete):
                    values.append((value, about))
                if len(values) == _MOST:
                    break
    except Failure:
        return []
    return values


def vms(context: typer.Context, incomplete: str) -> Values:
    """Ids of machines, with their names."""
    return _values(context, incomplete, lambda client: ((vm.id, vm.name) for vm in client.vms()))


def jobs(context: typer.Context, incomplete: str) -> Values:
    """Ids of jobs, with their states."""
    return _values(context, incomplete, lambda client: ((job.id, job.state) for job in client.jobs()))


def traces(context: typer.Context, incomplete: str) -> Values:
    """Ids of the results of the machine that is named before."""

    def found(client: subpage.Client) -> Iterator[tuple[str, str]]:
        for trace in client.vm(_vm(context)).traces():
            yield trace.id, f"{trace.violations} violations"

    return _values(context, incomplete, found)


def protections(context: typer.Context, incomplete: str) -> Values:
    """Names of the protections of the machine that is named before."""

    def found(client: subpage.Client) -> Iterator[tuple[str, str]]:
        for item in client.vm(_vm(context)).protections():
            yield item["name"], f"{item['subpages']} sub-pages"

    return _values(context, incomplete, found)


def objects(context: typer.Context, incomplete: str) -> Values:
    """Names of the protected objects of the machine that is named before."""

    def found(client: subpage.Client) -> Iterator[tuple[str, str]]:
        for item in client.vm(_vm(context)).protections():
            for each in item["objects"]:
                yield each["name"], each["gpa"]

    return _values(context, incomplete, found)


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Names that are fixed."""

    def offered(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return offered


def _vm(context: typer.Context) -> str:
    # An option that is being completed leaves the arguments before it where they are.
    return str(context.params.get("vm") or next(iter(context.args), ""))
