"""``subpage kvmi``: attach machines of a running service to introspection tools that speak KVMI."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from service.cli import show as shows
from service.cli.commands import AsJson, Group, command
from service.cli.connection import Service, remote
from service.cli.vms import VmArgument

kvmi = typer.Typer(cls=Group, help="Attach machines to introspection tools that speak KVMI.", no_args_is_help=True)

_GUEST = "vm_3f9c2a1be07d4c55"


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
    if as_json:
        shows.document(found)
    else:
        typer.echo(_shown(vm, found))


@command(kvmi, f"subpage kvmi connect {_GUEST} /run/kvmi/tool.sock")
@remote
def connect(
    service: Service,
    vm: VmArgument,
    path: Annotated[str, typer.Argument(help="Where the tool listens: a path, or vsock:CID:PORT.")],
    dialect: Annotated[Dialect, typer.Option(help="v7 for libkvmi 1.0 and later and LibVMI; v6.")] = Dialect.V7,
    name: Annotated[str | None, typer.Option(help="What the tool calls the machine; its own name by default.")] = None,
    cookie: Annotated[
        str | None, typer.Option(envvar="SUBPAGE_KVMI_COOKIE", help="What the tool has to know.", show_envvar=True)
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that the tool has for an answer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Attach a machine to the tool that listens on a socket, or will.

    The path is one of the service's host, in a directory that its setting kvmi_sockets allows.
    """
    given = {"dialect": dialect.value, "name": name, "cookie": cookie, "timeout": timeout}
    document: dict[str, Any] = {"connect": path if path.startswith(("unix:", "vsock:")) else f"unix:{path}"}
    document |= {key: value for key, value in given.items() if value is not None}
    with service.client() as client:
        _print(vm, client.call("putKvmi", path={"vm": vm}, json=document).json(), as_json)


@command(kvmi, f"subpage kvmi show {_GUEST}")
@remote
def show(service: Service, vm: VmArgument, as_json: AsJson = False) -> None:
    """Show how a machine is attached: whether its tool is there, what it has done, why it is not asked."""
    with service.client() as client:
        _print(vm, client.call("getKvmi", path={"vm": vm}).json(), as_json)


@command(kvmi, f"subpage kvmi disconnect {_GUEST}")
@remote
def disconnect(service: Service, vm: VmArgument, as_json: AsJson = False) -> None:
    """Detach a machine from its tool; pages that it has restricted get their rights back."""
    with service.client() as client:
        client.call("deleteKvmi", path={"vm": vm})
    if as_json:
        shows.document({"detached": vm})
    else:
        typer.echo(f"{vm}: detached")
