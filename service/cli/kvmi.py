"""``subpage kvmi``: attach machines of a running service to introspection tools that speak KVMI."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import typer

from service.cli.commands import Command
from service.cli.vms import HERE, AsJson, Authorities, Client, Token, Url, complete

kvmi = typer.Typer(help="Attach machines to introspection tools that speak KVMI.", no_args_is_help=True)

Vm = Annotated[str, typer.Argument(help="Id of the machine.", autocompletion=complete)]


class Dialect(StrEnum):
    """What is spoken."""

    V7 = "v7"
    V6 = "v6"


def _shown(vm: str, found: dict[str, Any]) -> str:
    """An attachment in a line or two."""
    told = f"{vm}: {found['state']} to {found['connect']} as {found['name']} ({found['uuid']}), {found['dialect']}"
    if found["state"] == "connected":
        told += (
            f"\n{found['commands']} commands, {found['events']} events, {found['restricted_pages']} pages restricted"
        )
        if found["silent_because"]:
            told += f"; no violation can come: {found['silent_because']}"
    elif found["last_error"]:
        told += f"\nlast: {found['last_error']}"
    return told


def _print(vm: str, found: dict[str, Any], as_json: bool) -> None:
    typer.echo(json.dumps(found, indent=1) if as_json else _shown(vm, found))


def _path(vm: str) -> str:
    return f"/v1/vms/{quote(vm, safe='')}/kvmi"


@kvmi.command(cls=Command)
def connect(
    vm: Vm,
    path: Annotated[str, typer.Argument(help="Where the tool listens: a path, or vsock:CID:PORT.")],
    dialect: Annotated[Dialect, typer.Option(help="v7 for libkvmi 1.0 and later and LibVMI; v6.")] = Dialect.V7,
    name: Annotated[str | None, typer.Option(help="What the tool calls the machine; its own name by default.")] = None,
    cookie: Annotated[
        str | None, typer.Option(envvar="SUBPAGE_KVMI_COOKIE", help="What the tool has to know.", show_envvar=True)
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that the tool has for an answer.")] = None,
    url: Url = HERE,
    token: Token = None,
    authorities: Authorities = None,
    as_json: AsJson = False,
) -> None:
    """Attach a machine to the tool that listens on a socket, or will.

    The path is one of the service's host, in a directory that its setting kvmi_sockets allows.
    """
    given = {"dialect": dialect.value, "name": name, "cookie": cookie, "timeout": timeout}
    document = {"connect": path if path.startswith(("unix:", "vsock:")) else f"unix:{path}"}
    document |= {key: value for key, value in given.items() if value is not None}
    with Client(url, token, authorities) as client:
        _print(vm, client.call("PUT", _path(vm), document), as_json)


@kvmi.command(cls=Command)
def show(
    vm: Vm, url: Url = HERE, token: Token = None, authorities: Authorities = None, as_json: AsJson = False
) -> None:
    """Show how a machine is attached: whether its tool is there, what it has done, why it is not asked."""
    with Client(url, token, authorities) as client:
        _print(vm, client.get(_path(vm)), as_json)


@kvmi.command(cls=Command)
def disconnect(vm: Vm, url: Url = HERE, token: Token = None, authorities: Authorities = None) -> None:
    """Detach a machine from its tool; pages that it has restricted get their rights back."""
    with Client(url, token, authorities) as client:
        client.call("DELETE", _path(vm))
    typer.echo(f"{vm}: detached")
