"""``subpage replay``: a trace against a policy, here or by a service, and the bar that is shown meanwhile."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, show
from service.cli.commands import AsJson, Given, is_typed
from service.cli.connection import Service, remote
from service.cli.progress import ProgressOption, bar
from service.cli.trace_options import (
    FILE_HELP,
    Address,
    Columns,
    Format,
    FormatOption,
    Ray,
    Record,
    RecordOption,
    SkipUnknown,
)
from service.cli.vms import machine

if TYPE_CHECKING:
    import subpage
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


_MEDIA = {
    Format.JSON: "application/json",
    Format.NDJSON: "application/x-ndjson",
    Format.ARROW: "application/vnd.apache.arrow.stream",
    Format.PARQUET: "application/vnd.apache.parquet",
    Format.PACKED: "application/octet-stream",
}


@remote
def replay(
    context: typer.Context,
    service: Service,
    traces: Annotated[
        list[str],
        typer.Argument(
            help=FILE_HELP + " With --policies several of them, addresses of objects (s3://, gs://), and patterns in "
            "quotes.",
        ),
    ],
    policy: Annotated[
        Path | None,
        typer.Option(
            help='JSON or TOML: {"name", "objects", "pages"} as `POST …/protections` takes it, or, without a service, '
            'a whole machine: {"vm", "protections", "subpages"}.'
        ),
    ] = None,
    policies: Annotated[
        list[Path] | None,
        typer.Option(
            "--policies",
            help="A policy, or a folder of them; may repeat. Every trace is replayed against every policy, each on a "
            "machine of its own.",
        ),
    ] = None,
    vm: Annotated[
        str | None,
        typer.Option("--vm", help="Replay on this machine of a service, as it is.", autocompletion=complete.vms),
    ] = None,
    format: FormatOption = Format.AUTO,
    record: RecordOption = Record.RECORD16,
    columns: Columns = None,
    skip_unknown: SkipUnknown = False,
    address: Annotated[
        Address,
        typer.Option(
            help="Whose its addresses are. gpa: a guest's physical ones. gva: linear ones of the guest, through its "
            "own page tables, with --vm. flat: linear ones of a process, taken for physical ones."
        ),
    ] = Address.GPA,
    on_violation: Annotated[
        OnViolation, typer.Option(help="What becomes of a write that is refused.")
    ] = OnViolation.SKIP,
    start: Annotated[int, typer.Option(min=0, help="Skip the records before this one; indices stay absolute.")] = 0,
    include: Annotated[Include, typer.Option(help="Which exits become exit records.")] = Include.VIOLATIONS,
    carry: Annotated[str | None, typer.Option(help="Columns to copy into exit records, with commas.")] = None,
    max_exit_records: Annotated[int | None, typer.Option(min=0, help="Exit records to keep.")] = None,
    exits: Annotated[
        int | None,
        typer.Option(min=0, help="With --json: exit records to print; 1000, and of each with --policies none."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="With --server and --policy: leave the machine there.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="With --policies: write all results there, as JSON.")
    ] = None,
    ray: Ray = None,
    partials: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="With --policies: where results are kept, a path or an address; the next run takes them from there. "
            "By default beside the output until that is there.",
        ),
    ] = None,
    as_json: AsJson = False,
    progress: ProgressOption = None,
    given: Given = None,
) -> None:
    """Replay a trace against a policy: which writes would have exited, and what whole pages would cost.

    Without --vm and --server it runs in this process. With --server a machine is made there for the policy, and deleted
    in the end. With --policies it is a table of traces and policies, by the workers of a cluster with --ray.
    """
    by_service = vm is not None or is_typed(context, "server")
    options = (format, record, on_violation, start, include, carry, max_exit_records, columns, skip_unknown, address)
    if policies:
        _check_many(policy, by_service, keep, address)
        _many(context, traces, policies, options, exits or 0, (ray, partials, output, as_json, progress))
        return
    _check_one(traces, ray, partials, output)
    file, exits = Path(traces[0]), 1000 if exits is None else exits
    if policy is None and vm is None:
        raise typer.BadParameter("give the policy to replay against, or with --vm a machine", param_hint="--policy")
    if policy is not None and vm is not None:
        raise typer.BadParameter(
            f"{vm} is replayed on as it is: `subpage protect {vm} {policy}` comes before", param_hint="--policy"
        )
    if keep and (policy is None or not by_service):
        raise typer.BadParameter("is for a machine that --server is told to make", param_hint="--keep")
    if address is Address.GVA and vm is None:
        raise typer.BadParameter(
            "gva needs the guest's page tables: load its memory (`subpage vm load IMAGE`), and give that --vm",
            param_hint="--address",
        )
    if by_service:
        query = {
            **_sent_as(file, format, columns, record),
            "columns": columns,
            "skip_unknown": skip_unknown or None,
            "address": None if address is Address.GPA else address.value,
            "on_violation": on_violation.value,
            "start": start or None,
            "include": include.value,
            "carry": carry,
            "max_exit_records": max_exit_records,
        }
        _by_service(service, file, policy, vm, query, exits if as_json else None, keep, progress)
        return
    _here(context, file, policy, options, exits if as_json else None, progress)


def _check_many(policy: Path | None, by_service: bool, keep: bool, address: Address) -> None:
    """Refuse what does not go with --policies. Raises BadParameter."""
    if policy is not None:
        raise typer.BadParameter("goes alone: with --policies give it as one of these", param_hint="--policy")
    if by_service or keep:
        raise typer.BadParameter("is done here or by --ray, not by a service", param_hint="--policies")
    if address is Address.GVA:
        raise typer.BadParameter("gva needs a machine with the guest's page tables (--vm)", param_hint="--address")


def _check_one(traces: list[str], *others: object) -> None:
    """Refuse what goes with --policies alone. Raises BadParameter."""
    if len(traces) > 1:
        raise typer.BadParameter("several traces go with --policies", param_hint="TRACES")
    for name, value in zip(("--ray", "--partials", "--output"), others, strict=True):
        if value is not None:
            raise typer.BadParameter("goes with --policies", param_hint=name)


def _many(
    context: typer.Context,
    traces: list[str],
    policies: list[Path],
    given: tuple[Any, ...],
    exits: int,
    wanted: tuple[Any, ...],
) -> None:
    """All traces against all policies."""
    from service.cli import local, replay_many
    from service.cli.common import common_flags, load_settings

    bounds = local.Bounds.of(load_settings(**common_flags(context)))
    replaying = replay_many.Replaying(local.Options(*given), bounds, exits)
    replay_many.replay(traces, policies, replaying, replay_many.Wanted(*wanted))


def _sent_as(file: Path, format: Format, columns: str | None, record: Record) -> dict[str, str | None]:
    """How a file is sent: its media type, and what else says what it is. Raises Failure for a file that is no trace."""
    from service.cli.trace_files import look

    found = Format(look(file, format.value, columns))
    if found not in _MEDIA:
        return {"media": "application/octet-stream", "format": found.value}
    return {"media": _MEDIA[found], "record": record.value if found is Format.PACKED else None}


def _here(
    context: typer.Context,
    file: Path,
    policy: Path | None,
    given: tuple[Any, ...],
    exits: int | None,
    progress: bool | None,
) -> None:
    """In this process."""
    from service.cli import local
    from service.cli.common import common_flags, load_settings

    assert policy is not None
    settings = load_settings(**common_flags(context))
    wanted = local.read_policy(policy)
    request = local.Options(*given).request(file, settings)
    machine = local.create(wanted, settings)
    with bar("replaying", progress) as move:
        trace = local.run(file, machine, request, lambda job: move(job.share, done=_told(job)))
    if exits is not None:
        show.document(local.document_of(trace, exits))
        return
    from service.cli.report import print_report
    from service.cli.trace_files import lines_about

    for line in lines_about(file, request.format, None, trace.result.taken, trace.ignored_columns):
        typer.echo(line)
    print_report(local.report(file, wanted, machine, trace), how="in this process", further=())


def _by_service(
    service: Service,
    file: Path,
    policy: Path | None,
    vm: str | None,
    query: dict[str, Any],
    exits: int | None,
    keep: bool,
    progress: bool | None,
) -> None:
    """On a machine of a service: one that there is, or one that is made for the policy."""
    import subpage
    from service.cli.demo import memory_for
    from service.cli.interrupts import held
    from service.cli.policy_files import read_policy
    from service.platform.failures import opened

    opened(file).close()
    with service.client() as client:
        if policy is None:
            assert vm is not None
            _replayed(machine(client, vm), file, query, exits, progress)
            return
        wanted = read_policy(policy)
        memory = memory_for(wanted)
        made: subpage.Vm | None = None
        try:
            with held():
                made = client.create_vm(f"replay {wanted.name}", memory=memory)
            made.protect(wanted.model_dump(mode="json", exclude_unset=True), name=wanted.name)
            _replayed(made, file, query, exits, progress, policy=wanted.name, memory=memory)
        except BaseException:
            if made is not None and keep:
                typer.echo(f"the machine is {made.id}", err=True)
            elif made is not None:
                with suppress(subpage.Error):  # of the two, the first failure says more
                    made.delete()
            raise
        if keep:
            typer.echo(f"the machine is {made.id}", err=True)
        else:
            made.delete()


def _replayed(
    vm: subpage.Vm,
    file: Path,
    query: dict[str, Any],
    exits: int | None,
    progress: bool | None,
    *,
    policy: str | None = None,
    memory: int | None = None,
) -> None:
    """Replay as a job, so that Ctrl-C cancels it, and print what came of it."""
    import itertools
    import time

    from service.cli.demo import report_of
    from service.cli.recorded_files import lines_of_sample
    from service.cli.report import print_report

    began = time.perf_counter()
    size = file.stat().st_size or None
    trace = _result(vm, file, query, progress, size)
    seconds = time.perf_counter() - began
    if exits is not None:
        records = [dict(one) for one in itertools.islice(trace.exits(), exits)]
        show.document({**trace.document, "exit_records": records, "next": None})
        return
    protections = list(vm.protections())
    covered = {name: sum(item[name] for item in protections) for name in ("pages", "subpages")}
    memory = memory or sum(int(slot["size"], 16) for slot in vm["memory_slots"])
    name = policy or f"{vm.id} {vm.name}".strip()
    report = report_of(str(file), name, memory, covered, trace.document, seconds)
    kind = next((format for format, media in _MEDIA.items() if media == query["media"]), Format.AUTO)
    for line in lines_of_sample(file, kind):
        typer.echo(line)
    further = (f"subpage exits {vm.id} {trace.id}", f"subpage traces {vm.id}") if policy is None else ()
    print_report(report, how="over HTTP", further=further)


def _result(
    vm: subpage.Vm, file: Path, query: dict[str, Any], progress: bool | None, size: int | None
) -> subpage.Trace:
    """What comes of a job. Until all is sent Ctrl-C ends it with the connection; then it is cancelled by its id."""
    from contextlib import ExitStack

    import subpage
    from service.cli.interrupts import held

    job: subpage.Job | None = None
    try:
        with bar("sending", progress, size) as move, ExitStack() as answer:

            def sent(done: int, total: int | None) -> None:
                move(done)
                if done == size:
                    answer.enter_context(held())

            job = vm.submit(file, progress=sent, **query)
        with bar("replaying", progress) as move:
            return job.wait(progress=lambda done, total: move(0.0, done=f"{done:,} records"))
    except KeyboardInterrupt:
        if job is not None:
            with suppress(subpage.Error):  # there is nobody left to tell
                job.cancel()
        raise


def _told(job: Job) -> str:
    rate = job.rate or 0.0
    return f"{job.records_done:,} records, {rate / 1e6:.1f} M/s"
