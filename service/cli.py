"""The command ``subpage``. What a command needs is imported when it runs, so that ``--version`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service import __version__
from service.storage.urls import StoreUrl

app = typer.Typer(
    name="subpage",
    help="Sub-page write protection of virtual-machine memory, as a network service.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"subpage {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; SUBPAGE_HOST or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one. SUBPAGE_PORT or 8000.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="sqlite:///path, postgresql://user:password@host/database or memory; SUBPAGE_STORE."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Always 1: one process owns a store.")] = 1,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info or debug.")] = "warning",
) -> None:
    """Run the service until it is told to stop. All other settings come from SUBPAGE_… variables."""
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

    from pydantic import ValidationError

    from service.server import run
    from service.settings import Settings

    given = {name: value for name, value in (("host", host), ("port", port), ("store", store)) if value is not None}
    try:
        settings = Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        for fault in error.errors():
            typer.echo(f"SUBPAGE_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(run(settings, access_log=access_log, log_level=log_level))


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


_STORE = typer.Option(help="The store; SUBPAGE_STORE, or the file that `serve` uses by default.")
_ONE_VM = typer.Option("--vm", help="Only the VM of that id.")


def _store_url(store: str | None) -> StoreUrl:
    from service.settings import Settings

    try:
        return StoreUrl.parse(Settings().store if store is None else store)
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
