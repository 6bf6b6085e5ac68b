"""``subpage live``: a guest in QEMU, each store of which goes through a machine of a service while it runs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import complete, show
from service.cli.commands import AsJson, Given, is_typed
from service.cli.connection import Service, remote
from service.cli.progress import ProgressOption
from service.cli.record import GuestCommand, Most, Only, Start, SymbolFile, Until, ended, left_out, wanted_of

if TYPE_CHECKING:
    from capture.qemu import Guest
    from service.cli.rules import Rules

ON_VIOLATION = ("allow", "ask")


@remote
def live(
    context: typer.Context,
    service: Service,
    command: GuestCommand,
    policy: Annotated[
        Path, typer.Option(help='JSON or TOML: {"name", "objects", "pages"} as `POST …/protections` takes it.')
    ],
    start: Start = None,
    until: Until = None,
    symbols: SymbolFile = None,
    kallsyms_from_guest: Annotated[
        bool,
        typer.Option("--kallsyms-from-guest", help="The guest shows its symbols on a serial line of its own."),
    ] = False,
    only: Only = None,
    most: Most = None,
    publish_every: Annotated[
        str | None, typer.Option(help="How often what the guest did is committed: 200ms, with ask 50ms.")
    ] = None,
    on_violation: Annotated[
        str,
        typer.Option(
            help="`ask`: the vCPU waits after a store that is refused until a tool has answered.",
            autocompletion=complete.one_of(*ON_VIOLATION),
        ),
    ] = "allow",
    rules: Annotated[
        Path | None, typer.Option(help="With ask: rules that answer (docs/command-line.md); others may attach too.")
    ] = None,
    sample: Annotated[int, typer.Option(hidden=True)] = 1,
    progress: ProgressOption = None,
    as_json: AsJson = False,
    given: Given = None,
) -> None:
    """Watch a guest that runs in QEMU as if its processor had sub-page protection: violations of the policy as they
    happen, and the report at the end. The stores land: what is refused is told, and the guest goes on, with ask once a
    tool has said so. Ctrl-C ends it.

    Without --server there is a service for the time of it.
    """
    import signal

    from capture.errors import CaptureError
    from capture.recording import LATER, NOT_SEEN, Recording
    from service.cli import live_stream
    from service.cli.demo import service as service_of_our_own
    from service.cli.guests import stopping, watched
    from service.cli.live_symbols import GuestSymbols
    from service.cli.policy_files import read_policy
    from service.cli.report import print_report
    from service.platform.failures import Failure

    if on_violation not in ON_VIOLATION:
        rule = "TCG tells of a store when it has landed: it can be let be (allow) or asked about (ask), not undone"
        raise Failure(f"--on-violation {on_violation}: {rule}")
    if sample != 1:
        rule = "a store that is passed over is judged by nobody: totals would be wrong, and violations missing"
        raise Failure(f"--sample {sample}: {rule}; `subpage record --sample` makes a file that says what it is")
    asks = on_violation == "ask"
    answers = read_live_rules(rules, asks)
    if kallsyms_from_guest and symbols is not None:
        raise Failure("--symbols does not go with --kallsyms-from-guest: the guest has one kernel")
    wanted = wanted_of(start, until, symbols, only, most, later=kallsyms_from_guest)
    protected = read_policy(policy, named=kallsyms_from_guest or symbols is not None)
    try:
        with ExitStack() as stack:
            recording = stack.enter_context(Recording(command, wanted, has_line=kallsyms_from_guest))
            if not is_typed(context, "server"):
                # A service of our own ends when we say so, not by the Ctrl-C that ends the guest.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                started = stack.enter_context(service_of_our_own(settings_of_our_own(context, recording.guest)))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                service = Service(started.url())
                started.wait_until_ready(stack.enter_context(live_stream.bare_client(service.url)))
            client = stack.enter_context(service.client())
            machine = live_stream.Machine.make(client, recording.guest, protected)
            for line in machine.memory:
                typer.echo(f"subpage live: {line}", err=True)
            if not kallsyms_from_guest:
                machine.name_and_protect(client, symbols)
            stack.enter_context(stopping(recording))
            watch = stack.enter_context(watched("watching", recording, progress))
            stack.enter_context(machine.telling(service, watch))
            if asks:
                stack.enter_context(machine.verdicts(service, recording).given())
                where = f"subpage attach {machine.id} --server {service.url}"
                typer.echo(f"subpage live: asks about what is refused: {where}", err=True)
            if answers is not None:
                stack.enter_context(machine.answering(answers))
            if kallsyms_from_guest:
                named = wanted.start_pc == LATER
                shown = GuestSymbols(service, machine, recording, start if named else None)
                stack.enter_context(shown.expected())
            result = machine.stream(recording, watch, publish_every or ("50ms" if asks else "200ms"), on_violation)
            writers = machine.writers(result)
    except CaptureError as error:
        raise Failure(str(error)) from None
    if as_json:
        show.document(result)
    else:
        print_report(machine.report(command[0], result, watch.seconds), how="while the guest ran", further=())
        for line in writers:
            typer.echo(line)
        typer.echo(f"{watch.told()}")
        typer.echo(left_out(recording))
        typer.echo(NOT_SEEN)
    ended(recording, "live")


def settings_of_our_own(context: typer.Context, guest: Guest) -> list[str]:
    """Those of a service for the time of the guest, as NAME=VALUE: it may read the file that has the guest's RAM."""
    from service.cli.common import common_flags, flag_texts, load_settings
    from service.cli.live_memory import files_of

    given = common_flags(context)
    if files := files_of(guest):
        given = {**given, "memory_files": [*map(str, load_settings(**given).memory_files), *files]}
    return flag_texts(given)


def read_live_rules(path: Path | None, asks: bool) -> Rules | None:
    """The rules of ``--rules``, if they answer what a guest that runs can honour. Raises Failure."""
    from service.cli.rules import read_rules
    from service.platform.failures import Failure

    if path is None:
        return None
    if not asks:
        raise Failure(f"--rules {path}: goes with --on-violation ask")
    rules = read_rules(path)
    if "skip" in (rules.otherwise, *(rule.answer for rule in rules.rules)):
        rule = (
            "skip cannot be honoured, since stores have landed when they are asked about (`answer` is skip by default)"
        )
        raise Failure(f"--rules {path}: {rule}")
    return rules
