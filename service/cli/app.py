"""The command ``subpage``. What a command needs is imported when it runs, so that ``--version`` answers at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from service import __version__
from service.cli import show
from service.cli.accesses import access, walk
from service.cli.attach import attach
from service.cli.bitmaps import bitmaps
from service.cli.browser import open_
from service.cli.commands import AsJson, Given, Root, command
from service.cli.events import events
from service.cli.footprint import footprint
from service.cli.images import load
from service.cli.kvmi import kvmi
from service.cli.live import live
from service.cli.policies import policies
from service.cli.protect import protect, unprotect
from service.cli.record import record
from service.cli.replay import replay
from service.cli.results import exits, jobs, traces
from service.cli.tokens import tokens
from service.cli.trace import trace
from service.cli.vms import vms
from service.storage.urls import StoreUrl

_MACHINES, _REPLAYS, _FILES, _SERVICE = "Machines of a service", "Replays", "Files", "The service"
_GUEST = "vm_3f9c2a1be07d4c55"

app = typer.Typer(
    name="subpage",
    cls=Root,
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
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings, named as in `subpage config`; SUBPAGE_CONFIG.")
    ] = None,
    given: Given = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    import os

    if config is not None:
        os.environ["SUBPAGE_CONFIG"] = str(config)


@command(app, "subpage serve --port 8080 --store memory", panel=_SERVICE)
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
    given: Given = None,
) -> None:
    """Run the service until it is told to stop. `subpage config` shows all settings and where they come from."""
    import gc

    if workers != 1:
        raise typer.BadParameter(
            "must be 1. One process owns a store and holds its machines in memory; a second one would only wait for "
            "the first to end. Replays already use several cores.",
            param_hint="--workers",
        )

    # What is imported stays for good; looking for garbage in it over and over takes an eighth of the start.
    gc.disable()

    from service.cli.common import common_flags, load_settings
    from service.server import run

    flags = {"host": host, "port": port, "store": store, "access_log": access_log, "log_level": log_level}
    named = {name: value for name, value in flags.items() if value is not None}
    raise typer.Exit(run(load_settings(**common_flags(context) | named)))


@command(app, "subpage config", "subpage --set max_vms=7 config --json", panel=_SERVICE)
def config(context: typer.Context, as_json: AsJson = False, given: Given = None) -> None:
    """Print the effective settings as TOML, each with where it comes from. Secrets are hidden."""
    from service.cli.common import common_flags, effective, load_settings

    flags = common_flags(context)
    if as_json:
        found = effective(load_settings(**flags), flags)
        show.document([{"name": name, "value": value, "origin": origin} for name, value, origin in found])
        return
    for name, value, origin in effective(load_settings(**flags), flags):
        comment = "# " if value == "none" else ""
        typer.echo(f"{comment}{name} = {value}" + (f"  # {origin}" if origin != "default" else ""))


@command(app, "subpage demo", panel=_SERVICE)
def demo(
    context: typer.Context,
    trace: Annotated[
        Path | None, typer.Option(help="A trace: .parquet, .arrow, .arrows, .ndjson, .json or .bin.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help='A policy, JSON or TOML: {"name", "objects", "pages"} as `POST …/protections` takes it.'),
    ] = None,
    record: Annotated[str, typer.Option(help="Layout of a .bin trace: record16 or gpa8.")] = "record16",
    memory: Annotated[
        str | None, typer.Option(help="Guest RAM from address 0, such as 4GiB; enough for the policy by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    given: Given = None,
) -> None:
    """Run the main job over HTTP on a recorded trace: which writes would have exited, and what whole pages would cost.

    Starts a service on a free loopback port and stops it at the end. Without --trace and --policy it replays a real
    Linux kernel boot against a policy that protects the kernel's control data.
    """
    from service.cli.common import common_flags, flag_texts
    from service.cli.demo import DEFAULT_POLICY, DEFAULT_TRACE, run_demo

    settings = flag_texts(common_flags(context))
    files = (trace or DEFAULT_TRACE, policy or DEFAULT_POLICY)
    run_demo(*files, record=record, memory=memory, as_json=as_json, settings=settings)


_STORE = typer.Option(help="The store; SUBPAGE_STORE, or the file that `serve` uses by default.")
_ONE_VM = typer.Option("--vm", help="Only the VM of that id.")


def _store_url(context: typer.Context, store: str | None) -> StoreUrl:
    from service.cli.common import common_flags, load_settings

    given = common_flags(context) | ({} if store is None else {"store": store})
    return StoreUrl.parse(load_settings(**given).store)


@command(app, "subpage backup all.backup", panel=_SERVICE)
def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    vm: Annotated[str | None, _ONE_VM] = None,
    store: Annotated[str | None, _STORE] = None,
    as_json: AsJson = False,
    given: Given = None,
) -> None:
    """Write the VMs of a store to a file. A service may be running on it; the file has one state of the store."""
    from service.backups import offline

    count = offline.backup(_store_url(context, store), file, vm)
    if as_json:
        show.document({"file": str(file), "vms": count})
        return
    typer.echo(f"{count} VMs written to {file}")
    typer.echo(offline.LEFT)


@command(app, "subpage restore all.backup --replace", panel=_SERVICE)
def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A file that `subpage backup` wrote.")],
    vm: Annotated[str | None, _ONE_VM] = None,
    store: Annotated[str | None, _STORE] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite VMs of the same id.")] = False,
    as_json: AsJson = False,
    given: Given = None,
) -> None:
    """Put the VMs of a backup into a store, under their own ids: all of them or, if one cannot be, none."""
    from service.backups import offline

    ids = offline.restore(_store_url(context, store), file, vm, replace=replace, told=partial(typer.echo, err=True))
    if as_json:
        show.document({"vms": ids})
        return
    typer.echo(f"{len(ids)} VMs restored")
    typer.echo(offline.LEFT)


app.add_typer(vms, name="vm", rich_help_panel=_MACHINES)
command(vms, "subpage vm load ram.bin --gpa 0x100000 --name guest")(load)
command(
    app,
    f"subpage protect {_GUEST} policy.json",
    f"subpage protect {_GUEST} --object idt=0x3000:256",
    panel=_MACHINES,
)(protect)
command(app, f"subpage unprotect {_GUEST} kernel", panel=_MACHINES)(unprotect)
app.add_typer(bitmaps, name="bitmap", rich_help_panel=_MACHINES)
command(app, f"subpage walk {_GUEST} 0x2080", panel=_MACHINES)(walk)
command(app, f"subpage access {_GUEST} 0x2080 --on-violation grant", panel=_MACHINES)(access)
command(
    app,
    f"subpage events {_GUEST}",
    f"subpage events {_GUEST} --follow --kinds violation",
    panel=_MACHINES,
)(events)
command(app, f"subpage attach {_GUEST} --rules rules.toml", panel=_MACHINES)(attach)
command(
    app,
    "subpage replay boot.parquet --policy policy.json",
    f"subpage replay boot.parquet --vm {_GUEST} --no-progress",
    panel=_REPLAYS,
)(replay)
command(app, "subpage record -o boot.parquet -- qemu-system-x86_64 -m 512 -kernel vmlinuz", panel=_REPLAYS)(record)
command(app, "subpage live --policy policy.json -- qemu-system-x86_64 -m 512 -kernel vmlinuz", panel=_REPLAYS)(live)
command(app, f"subpage traces {_GUEST}", panel=_REPLAYS)(traces)
command(app, f"subpage exits {_GUEST} -n 20", f"subpage exits {_GUEST} --json", panel=_REPLAYS)(exits)
command(app, "subpage jobs", "subpage jobs job_5d2f80a96c1be743 --wait", panel=_REPLAYS)(jobs)
app.add_typer(kvmi, name="kvmi", rich_help_panel=_MACHINES)
app.add_typer(policies, name="policy", rich_help_panel=_FILES)
app.add_typer(trace, name="trace", rich_help_panel=_FILES)
app.add_typer(footprint, name="footprint", rich_help_panel=_FILES)
command(app, "subpage open --print", name="open", panel=_SERVICE)(open_)
app.add_typer(tokens, name="token", rich_help_panel=_SERVICE)


def main() -> None:
    """Entry point of the console script."""
    app()
