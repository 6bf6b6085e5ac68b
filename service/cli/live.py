"""``subpage live``: a guest in QEMU, each store of which goes through a machine of a service while it runs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from service.cli import show
from service.cli.commands import AsJson, Given, is_typed
from service.cli.connection import Service, remote
from service.cli.progress import ProgressOption
from service.cli.record import GuestCommand, Most, Only, Start, SymbolFile, ended, left_out, wanted_of


@remote
def live(
    context: typer.Context,
    service: Service,
    command: GuestCommand,
    policy: Annotated[
        Path, typer.Option(help='JSON or TOML: {"name", "objects", "pages"} as `POST …/protections` takes it.')
    ],
    start: Start = None,
    symbols: SymbolFile = None,
    only: Only = None,
    most: Most = None,
    publish_every: Annotated[str, typer.Option(help="How often what the guest did is committed.")] = "200ms",
    progress: ProgressOption = None,
    as_json: AsJson = False,
    given: Given = None,
) -> None:
    """Watch a guest that runs in QEMU as if its processor had sub-page protection: violations of the policy as they
    happen, and the report at the end. The stores land: what is refused is told, and the guest goes on. Ctrl-C ends it.

    Without --server there is a service for the time of it.
    """
    import signal

    from capture.errors import CaptureError
    from capture.recording import NOT_SEEN, Recording
    from service.cli import live_stream
    from service.cli.common import common_flags, flag_texts
    from service.cli.demo import service as service_of_our_own
    from service.cli.guests import stopping, watched
    from service.cli.policy_files import read_policy
    from service.cli.report import print_report
    from service.platform.failures import Failure

    wanted = wanted_of(start, symbols, only, most)
    protected = read_policy(policy)
    try:
        with ExitStack() as stack:
            recording = stack.enter_context(Recording(command, wanted))
            if not is_typed(context, "server"):
                # A service of our own ends when we say so, not by the Ctrl-C that ends the guest.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                started = stack.enter_context(service_of_our_own(flag_texts(common_flags(context))))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                service = Service(started.url())
                started.wait_until_ready(stack.enter_context(live_stream.bare_client(service.url)))
            client = stack.enter_context(service.client())
            machine = live_stream.Machine.make(client, recording.guest, protected, symbols)
            stack.enter_context(stopping(recording))
            watch = stack.enter_context(watched("watching", recording, progress))
            stack.enter_context(machine.telling(service, watch))
            result = machine.stream(recording, watch, publish_every)
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
