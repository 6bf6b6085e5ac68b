"""``subpage footprint``: traces reduced to the places that they access, and what policies cost there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import show as shows
from service.cli.commands import AsJson, Group, command
from service.cli.connection import Service, remote
from service.cli.progress import ProgressOption, bar
from service.cli.trace import AddressOption
from service.cli.trace_options import Columns, Format, FormatOption, Ray, Record, RecordOption, SkipUnknown

if TYPE_CHECKING:
    from engine.footprint.places import Footprint
    from engine.footprint.question import Question

footprint = typer.Typer(
    cls=Group,
    help="Reduce traces to the places that they access, and cost policies there without a replay.",
    no_args_is_help=True,
)


class Level(StrEnum):
    """What places are made of."""

    SPANS = "spans"
    BYTES = "bytes"


class Profile(StrEnum):
    """Which KVM."""

    KVM_2019 = "kvm-2019"
    KVM_LATEST = "kvm-latest"


_SERVICE = "On a service"
File = Annotated[Path, typer.Argument(help="A footprint, as `footprint build` writes it.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The file to write.")]
Slots = Annotated[
    list[str] | None,
    typer.Option(
        "--memory-slots",
        metavar="GPA:SIZE[:ro][:2MiB]",
        help="Guest RAM, such as 0:3GiB; read-only with :ro, on host pages of 2 MiB or 1 GiB with :2MiB or :1GiB. May "
        "repeat. Without it there is writable memory everywhere.",
    ),
]
ProfileOption = Annotated[Profile, typer.Option(help="Which KVM the guest runs under.")]


@command(
    footprint,
    "subpage footprint build boot.parquet -o boot.footprint",
    "subpage footprint build '*.parquet' -o all.footprint",
)
def build(
    traces: Annotated[
        list[str],
        typer.Argument(
            help="Traces: text of a tool, Parquet, Arrow, NDJSON, JSON or packed; .gz, .zst, .xz. Paths, addresses of "
            "objects (s3://, gs://), or patterns of either in quotes: * for a part of a name, ** for folders.",
        ),
    ],
    output: Output,
    level: Annotated[
        Level, typer.Option(help="spans: runs of sub-pages. bytes: runs of bytes, which tell objects from neighbours.")
    ] = Level.SPANS,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep places apart also by time:N (nanoseconds, or 10ms, 1s), by records:N (equal runs), by pc. May "
            "repeat."
        ),
    ] = None,
    format: FormatOption = Format.AUTO,
    address: AddressOption = None,
    record: RecordOption = Record.RECORD16,
    columns: Columns = None,
    skip_unknown: SkipUnknown = False,
    ray: Ray = None,
    partials: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the footprints of single files are kept, a path or an address; the next run takes them from "
            "there. By default beside the output until that is there.",
        ),
    ] = None,
    progress: ProgressOption = None,
    as_json: AsJson = False,
) -> None:
    """Reduce traces to a footprint; of several, it is that of all. With --ray by the workers of a cluster."""
    from service.cli import footprint_files as files
    from service.cli import footprint_scale as scaled

    reading = files.Reading(format, record, columns, skip_unknown, address)
    reducing = files.Reducing(level.value, files.by_of(by or ()), reading)
    found = scaled.build(traces, output, reducing, ray, partials, progress)
    if _written(found, output, as_json):
        typer.echo(f"subpage footprint cost {output} --policies FOLDER")


@command(footprint, "subpage footprint show boot.footprint")
def show(
    file: File,
    top: Annotated[int, typer.Option(min=0, help="How many pages, writers and buckets to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Say what is in a footprint: its traces, its pages, and its writers and its time where it has them."""
    from service.cli import footprint_files as files
    from service.cli import footprint_report as report

    found = report.contents(files.loaded(file), top)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for line in report.contents_lines(str(file), found):
        typer.echo(line)


@command(footprint, "subpage footprint merge boot.footprint user.footprint -o all.footprint")
def merge(
    footprints: Annotated[list[Path], typer.Argument(help="Footprints of one level, in any order.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Add footprints up. The file is the same in whatever order they are given."""
    from engine.footprint.combine import merge as merged
    from service.cli import footprint_files as files

    files.check_output(output, [])
    with files.told():
        found = merged([files.loaded(path) for path in footprints])
    files.saved(found, output)
    _written(found, output, as_json)


@command(footprint, "subpage footprint subtract all.footprint user.footprint -o rest.footprint")
def subtract(
    whole: Annotated[Path, typer.Argument(help="A footprint.")],
    part: Annotated[Path, typer.Argument(help="One that was added to it.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Take a footprint out of another that it was added to."""
    from engine.footprint.combine import subtract as subtracted
    from service.cli import footprint_files as files

    files.check_output(output, [])
    with files.told():
        found = subtracted(files.loaded(whole), files.loaded(part))
    files.saved(found, output)
    unknown = int((found.trace < 0).sum())
    if _written(found, output, as_json) and unknown:
        typer.echo(f"{unknown:,} places whose first access is not known any more: it was of a trace that is gone")


@command(footprint, "subpage footprint cost boot.footprint --policies policy.json")
def cost(
    file: File,
    policies: Annotated[
        list[Path], typer.Option("--policies", help="A policy, JSON or TOML, or a folder of them. May repeat.")
    ],
    memory_slots: Slots = None,
    profile: ProfileOption = Profile.KVM_2019,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows of the table.")] = 50,
    ray: Ray = None,
    as_json: AsJson = False,
    progress: ProgressOption = None,
) -> None:
    """Rank policies by what they cost: what replays of the traces would count, without one."""
    from engine.footprint.costs import Costs
    from service.cli import footprint_files as files
    from service.cli import footprint_report as report
    from service.cli import footprint_scale as scaled

    question = _question(memory_slots, profile)
    with bar("reading policies", progress) as move:
        named = files.policies_of(policies, lambda share: move(share, done=""))
        found = files.loaded(file)
        if ray is None:
            with files.told():
                costs = Costs(found, question).of(list(named.values()))
        else:
            costs = scaled.costs(found, question, list(named.values()), ray, move)
    answers = dict(zip(named, costs, strict=True))
    if as_json:
        typer.echo(json.dumps(report.cost_document(found, question, answers), indent=1))
        return
    for line in report.cost_lines(str(file), found, question, answers, limit):
        typer.echo(line)


@command(footprint, "subpage footprint advise bytes.footprint --policy policy.json --per-million 100")
def advise(
    file: File,
    policy: Annotated[Path, typer.Option("--policy", help="A policy, JSON or TOML.")],
    per_second: Annotated[
        float | None, typer.Option(min=0, help="Exits a second that the policy may cost; the traces must have times.")
    ] = None,
    per_million: Annotated[
        float | None, typer.Option(min=0, help="Exits that the policy may cost in a million writes.")
    ] = None,
    memory_slots: Slots = None,
    profile: ProfileOption = Profile.KVM_2019,
    as_json: AsJson = False,
) -> None:
    """Say which neighbours a policy pays for, what moving objects away from them would save, and with a budget of exits
    which objects are not worth it. Every number is what the edited policy costs. Needs a footprint of bytes.
    """
    from engine.footprint.advice import advise as advised
    from service.cli import footprint_files as files
    from service.cli import footprint_report as report
    from service.runtime import footprint_documents as documents

    question = _question(memory_slots, profile)
    found = files.loaded(file)
    wanted = files.one_policy(policy)
    budget = files.budget_of(found, per_second, per_million)
    with files.told():
        advice = advised(found, wanted, question, budget)
    if as_json:
        typer.echo(json.dumps(documents.advice_document(found, question, advice), indent=1))
        return
    for line in report.advice_lines(found, wanted, question, advice):
        typer.echo(line)


def _written(found: Footprint, output: Path, as_json: bool) -> bool:
    """Say what a file has; whether it was said to people."""
    traces, places = len(found.origins), len(found)
    if as_json:
        told = {"file": str(output), "traces": traces, "records": int(found.records), "places": places}
        shows.document(told)
    else:
        of = "" if traces == 1 else f"{traces} traces, "
        typer.echo(f"{of}{found.records:,} accesses in {places:,} places written to {output}")
    return not as_json


def _question(slots: list[str] | None, profile: Profile) -> Question:
    from engine.footprint.question import Question
    from service.cli import footprint_files as files

    found = Question(None if slots is None else tuple(files.slots_of(slots)), profile.value)
    with files.told():
        found.validate()
    return found


@command(footprint, "subpage footprint push boot.footprint", panel=_SERVICE)
@remote
def push(
    service: Service,
    file: Annotated[Path, typer.Argument(help="A footprint, or a trace, which the service reduces.")],
    level: Annotated[Level | None, typer.Option(help="spans or bytes; of a footprint what it has.")] = None,
    by: Annotated[str | None, typer.Option(help="time:N (nanoseconds) or records:N, and pc, with a comma.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the trace; by default the file's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put a footprint, or that of a trace, on a service; says its id."""
    from service.cli import footprint_files as files

    # Traces of a footprint have their names.
    called = name or (None if file.is_file() and files.is_one(file) else file.name)
    with service.client() as client:
        query = {"level": None if level is None else level.value, "by": by, "name": called}
        found = client.create_footprint(file, **query)
    if as_json:
        shows.document(found.document)
        return
    typer.echo(f"{found.id}: {found['records']:,} accesses in {found['places']:,} places")


@command(footprint, "subpage footprint list", name="list", panel=_SERVICE)
@remote
def list_(service: Service, as_json: AsJson = False) -> None:
    """List the footprints that a service keeps, oldest first."""
    with service.client() as client:
        found = [item.document for item in client.footprints()]
    if as_json:
        shows.document(found)
        return
    rows = [
        (item["id"], shows.moment(item["created"]), item["level"], item["records"], item["places"], _label(item))
        for item in found
    ]
    shows.table(("id", "created", "level", "records", "places", "trace"), rows, right=("records", "places"))


@command(footprint, "subpage footprint pull fp_1b7e0c55d2a94f63 -o boot.footprint", panel=_SERVICE)
@remote
def pull(
    service: Service,
    footprint: Annotated[str, typer.Argument(help="Id of the footprint.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Get a footprint from a service, to be asked here."""
    from service.cli.trace_parquet import replacing

    with service.client() as client:
        found = client.footprint(footprint)
        content = found.parquet()
    with replacing(output) as beside:
        beside.write_bytes(content)
    if as_json:
        shows.document({"file": str(output), **found.document})
        return
    typer.echo(f"{found['records']:,} accesses in {found['places']:,} places written to {output}")


@command(footprint, "subpage footprint delete fp_1b7e0c55d2a94f63", panel=_SERVICE)
@remote
def delete(
    service: Service,
    footprint: Annotated[str, typer.Argument(help="Id of the footprint.")],
    as_json: AsJson = False,
) -> None:
    """Delete a footprint on a service."""
    with service.client() as client:
        client.call("deleteFootprint", path={"footprint": footprint})
    if as_json:
        shows.document({"id": footprint, "deleted": True})
        return
    typer.echo(f"{footprint} deleted")


def _label(found: Mapping[str, Any]) -> str:
    """What its traces are called."""
    first = found["traces"][0]
    more = f" and {found['traces_total'] - 1} more" if found["traces_total"] > 1 else ""
    return str(first["name"] or first["digest"][:16]) + more
