"""``subpage open``: the console of a service, in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli import show
from service.cli.commands import AsJson
from service.cli.connection import Service, remote

_PAGE = "/"


@remote
def open_(
    service: Service,
    print_only: Annotated[bool, typer.Option("--print", help="Print the address, and open nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Open the console of the service in a browser, and print its address."""
    with service.client() as client:
        client.version()
        url = f"{client.url}{_PAGE}"
    if as_json:
        show.document({"url": url})
    else:
        typer.echo(url)
    if not print_only and not as_json and typer.launch(url) != 0:
        typer.echo("no browser could be started here: open that address in yours", err=True)
