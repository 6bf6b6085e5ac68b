"""``subpage replay``: what the command line of it takes, and the bar that it shows meanwhile."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.commands import Given
from service.cli.progress import ProgressOption, bar, interruptible
from service.cli.trace_options import FILE_HELP, Columns, Format, FormatOption, Record, RecordOption, SkipUnknown

if TYPE_CHECKING:
    from service.runtime.job import Job


# Those of ``engine.trace.option_names``, which are not imported for a help text; a test compares them.


class OnViolation(StrEnum):
    """What becomes of a write that is refused."""

    SKIP = "skip"
    STOP = "stop"
    ALLOW = "allow"
    GRANT = "grant"


class Include(StrEnum):
    """Which exits become exit records."""

    VIOLATIONS = "violations"
    ALL = "all"


def replay(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help=FILE_HELP)],
    policy: Annotated[
        Path,
        typer.Option(
            help='JSON or TOML: {"name", "objects", "pages"} as `POST …/protections` takes it, or a whole machine: '
            '{"vm", "protections", "subpages"}.'
        ),
    ],
    format: FormatOption = Format.AUTO,
    record: RecordOption = Record.RECORD16,
    columns: Columns = None,
    skip_unknown: SkipUnknown = False,
    on_violation: Annotated[
        OnViolation, typer.Option(help="What becomes of a write that is refused.")
    ] = OnViolation.SKIP,
    start: Annotated[int, typer.Option(min=0, help="Skip the records before this one; indices stay absolute.")] = 0,
    include: Annotated[Include, typer.Option(help="Which exits become exit records.")] = Include.VIOLATIONS,
    carry: Annotated[str | None, typer.Option(help="Columns to copy into exit records, with commas.")] = None,
    max_exit_records: Annotated[int | None, typer.Option(min=0, help="Exit records to keep.")] = None,
    exits: Annotated[int, typer.Option(min=0, help="With --json: exit records to print.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as the service answers it.")] = False,
    progress: ProgressOption = None,
    given: Given = None,
) -> None:
    """Replay a trace against a policy here, without a service: which writes would have exited, and what whole pages
    would cost.
    """
    from service.cli import local
    from service.cli.common import common_flags, load_settings

    settings = load_settings(**common_flags(context))
    with interruptible("replay"):
        wanted = local.read_policy(policy)
        options = local.Options(
            format, record, on_violation, start, include, carry, max_exit_records, columns, skip_unknown
        )
        request = options.request(file, settings)
        machine = local.create(wanted, settings)
        with bar("replaying", progress) as move:
            trace = local.run(file, machine, request, lambda job: move(job.share, done=_told(job)))
    if as_json:
        typer.echo(json.dumps(local.document_of(trace, exits), indent=2))
        return
    from service.cli.report import print_report
    from service.cli.trace_files import lines_about

    for line in lines_about(file, request.format, None, trace.result.taken, trace.ignored_columns):
        typer.echo(line)
    print_report(local.report(file, wanted, machine, trace), how="in this process", further=())


def _told(job: Job) -> str:
    rate = job.rate or 0.0
    return f"{job.records_done:,} records, {rate / 1e6:.1f} M/s"
