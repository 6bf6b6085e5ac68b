"""The command ``subpage``. What a command needs is imported when it runs, so that ``--version`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service import __version__
from service.events_cli import events
from service.replay_cli import replay
from service.storage.urls import StoreUrl
from service.tokens_cli import tokens
from service.vms_cli import vms

app = typer.Typer(
    name="subpage",
    help="Sub-page write protection of virtual-machine memory, as a network service.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.add_typer(tokens, name="token")
app.add_typer(vms, name="vm")
app.command()(events)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"subpage {__version__}")
        raise typer.Exit


def _names(incomplete: str) -> list[str]:
    """Settings, for the shell."""
    from service.settings import Settings

    return [f"{name}=" for name in Settings.model_fields if name.startswith(incomplete)]


@app.callback()
def _common(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings, named as in `subpage config`; SUBPAGE_CONFIG.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting; may be repeated.", autocompletion=_names),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    import os

    if config is not None:
        os.environ["SUBPAGE_CONFIG"] = str(config)
    if given:
        from service.cli_common import parse_flags

        context.obj = parse_flags(given)


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen on; SUBPAGE_HOST or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one. SUBPAGE_PORT or 8000.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="sqlite:///path, postgresql://user:password@host/database or memory; SUBPAGE_STORE."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Always 1: one process owns a store.")] = 1,
    access_log: Annotated[bool | None, typer.Option("--access-log", help="Log every request.")] = None,
    log_level: Annotated[str | None, typer.Option(help="critical, error, warning, info or debug.")] = None,
) -> None:
    """Run the service until it is told to stop. `subpage config` shows all settings and where they come from."""
    import gc

    if workers != 1:
        typer.echo(
            "subpage serve: --workers must be 1. One process owns a store and holds its machines in memory; a second "
            "one would only wait for the first to end. Replays already use several cores.",
            err=True,
        )
        raise typer.Exit(2)

    # What is imported stays for good; looking for garbage in it over and over takes an eighth of the start.
    gc.disable()

    from service.cli_common import common_flags, load_settings
    from service.server import Refused, run

    flags = {"host": host, "port": port, "store": store, "access_log": access_log, "log_level": log_level}
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        status = run(load_settings(**common_flags(context) | given))
    except Refused as refused:
        typer.echo(f"subpage serve: {refused}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


@app.command()
def config(context: typer.Context) -> None:
    """Print the effective settings as TOML, each with where it comes from. Secrets are hidden."""
    from service.cli_common import common_flags, effective, load_settings

    given = common_flags(context)
    for name, value, origin in effective(load_settings(**given), given):
        comment = "# " if value == "none" else ""
        typer.echo(f"{comment}{name} = {value}" + (f"  # {origin}" if origin != "default" else ""))


@app.command()
def demo(
    trace: Annotated[
        Path | None, typer.Option(help="A trace: .parquet, .arrow, .arrows, .ndjson, .json or .bin.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help='A policy: {"name", "objects": [{"name", "gpa", "size"}]}.')
    ] = None,
    record: Annotated[str, typer.Option(help="Layout of a .bin trace: record16 or gpa8.")] = "record16",
    memory: Annotated[
        str | None, typer.Option(help="Guest RAM from address 0, such as 4GiB; enough for the policy by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run the main job over HTTP on a recorded trace: which writes would have exited, and what whole pages would cost.

    Starts a service on a free loopback port and stops it at the end. Without --trace and --policy it replays a real
    Linux kernel boot against a policy that protects the kernel's control data.
    """
    from service.demo import DemoError, run_demo

    try:
        run_demo(trace, policy, record=record, memory=memory, as_json=as_json)
    except DemoError as error:
        typer.echo(f"subpage demo: {error}", err=True)
        raise typer.Exit(1) from None


app.command()(replay)


_STORE = typer.Option(help="The store; SUBPAGE_STORE, or the file that `serve` uses by default.")
_ONE_VM = typer.Option("--vm", help="Only the VM of that id.")


def _store_url(store: str | None) -> StoreUrl:
    from service.cli_common import load_settings

    try:
        return StoreUrl.parse(load_settings().store if store is None else store)
    except ValueError as error:
        typer.echo(f"--store: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    vm: Annotated[str | None, _ONE_VM] = None,
    store: Annotated[str | None, _STORE] = None,
) -> None:
    """Write the VMs of a store to a file. A service may be running on it; the file has one state of the store."""
    from service.storage import offline

    try:
        count = offline.backup(_store_url(store), file, vm)
    except offline.OfflineError as error:
        typer.echo(f"subpage backup: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{count} VMs written to {file}")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A file that `subpage backup` wrote.")],
    vm: Annotated[str | None, _ONE_VM] = None,
    store: Annotated[str | None, _STORE] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite VMs of the same id.")] = False,
) -> None:
    """Put the VMs of a backup into a store, under their own ids: all of them or, if one cannot be, none."""
    from service.storage import offline

    try:
        ids = offline.restore(_store_url(store), file, vm, replace=replace)
    except offline.OfflineError as error:
        typer.echo(f"subpage restore: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{len(ids)} VMs restored")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
