"""``subpage traces``, ``exits`` and ``jobs``: what came of replays, and those that are under way."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, show
from service.cli.accesses import exits_table
from service.cli.commands import AsJson
from service.cli.connection import Service, Unanswered, remote
from service.cli.progress import ProgressOption, bar
from service.cli.statuses import Status
from service.cli.vms import VmArgument, machine

if TYPE_CHECKING:
    import subpage

_TOTALS = ("records", "writes", "violations", "page_granular_violations", "mmio", "exit_records_dropped", "stopped_at")
_UNDER_WAY = ("queued", "running")

TraceId = Annotated[
    str | None, typer.Argument(help="Id of a result; the last one unless given.", autocompletion=complete.traces)
]


def trace_of(asked: subpage.Vm, trace: str | None) -> subpage.Trace:
    """A result of a machine, the last unless its id is given. Raises Problem, Unanswered."""
    if trace is not None:
        return asked.trace(trace)
    found = list(asked.traces())
    if not found:
        raise Unanswered(
            f"{asked.id} has no results: `subpage replay FILE --vm {asked.id}` makes one", Status.NOT_FOUND
        )
    return found[-1]


@remote
def traces(
    service: Service,
    vm: VmArgument,
    trace: Annotated[
        str | None, typer.Argument(help="Id of a result, to see all of it.", autocompletion=complete.traces)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the results of replays that are kept for a machine, or show one."""
    with service.client() as client:
        asked = machine(client, vm)
        found = [asked.trace(trace).document] if trace else [one.document for one in asked.traces()]
    if as_json:
        show.document(found[0] if trace else found)
    elif trace:
        print_trace(found[0])
    else:
        rows = (
            (one["id"], show.moment(one["created"]), one["records"], one["violations"], one["page_granular_violations"])
            for one in found
        )
        names = ("id", "created", "records", "violations", "by whole pages")
        show.table(names, rows, right=names[2:])


def print_trace(found: Mapping[str, Any]) -> None:
    """A result: its totals, and what each object cost."""
    lines = {"id": found["id"], "vm": found["vm"], "created": show.moment(found["created"])}
    lines |= {name.replace("_", " "): found[name] for name in _TOTALS if found.get(name) is not None}
    lines |= {f"exits: {name.replace('_', ' ')}": count for name, count in found["exits"].items() if count}
    show.members(lines)
    rows = [
        (name, hits["subpages"], hits["violations"], hits["collateral"], hits["first_index"])
        for name, hits in sorted(found["by_object"].items(), key=lambda item: -item[1]["violations"])
    ]
    if rows:
        names = ("object", "sub-pages", "violations", "collateral", "first record")
        show.table(names, rows, right=names[1:])


@remote
def exits(
    service: Service,
    vm: VmArgument,
    trace: TraceId = None,
    object_: Annotated[
        str | None, typer.Option("--object", help="Only those of one object.", autocompletion=complete.objects)
    ] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=0, help="How many; 0: all of them.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print each as a line of JSON.")] = False,
) -> None:
    """Print the exit records of a replay: each access that was refused, where, and of which object."""
    with service.client() as client:
        chosen = trace_of(machine(client, vm), trace)
        found = (one for one in chosen.exits() if object_ is None or object_ in one["objects"])
        records = found if limit == 0 else itertools.islice(found, limit)
        if as_json:
            for record in records:
                show.line(record)
            return
        exits_table(list(records))
        more = next(found, None) is not None
    if more:
        typer.echo(f"the first {limit:,} of {chosen.id}; --limit 0 prints all of them", err=True)


@remote
def jobs(
    service: Service,
    job: Annotated[
        str | None, typer.Argument(help="Id of a job, to see all of it.", autocompletion=complete.jobs)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended; Ctrl-C leaves it.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End it; its machine is then as it was before.")] = False,
    as_json: AsJson = False,
    progress: ProgressOption = None,
) -> None:
    """List the jobs, show one, wait for it or cancel it."""
    if job is None and (wait or cancel):
        raise typer.BadParameter("is for one job: give its id", param_hint="--wait" if wait else "--cancel")
    with service.client() as client:
        if job is None:
            found = [one.document for one in client.jobs()]
        else:
            asked = client.job(job)
            if cancel:
                asked.cancel()
            elif wait:
                _wait(asked, progress)
            found = [asked.document]
    if as_json:
        show.document(found if job is None else found[0])
    elif job is None:
        rows = ((one["id"], one["state"], one["vm"], one["records_done"], show.moment(one["created"])) for one in found)
        show.table(("id", "state", "vm", "records done", "created"), rows, right=("records done",))
    else:
        _print_job(found[0])
    if wait and found[0]["state"] != "succeeded":
        raise typer.Exit(Status.FAILED)


def _wait(job: subpage.Job, progress: bool | None) -> None:
    import time

    with bar("replaying", progress) as move:
        pause = 0.05
        while job.refresh()["state"] in _UNDER_WAY:
            move(0.0, done=f"{job['state']}, {job['records_done']:,} records")
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)


def _print_job(job: Mapping[str, Any]) -> None:
    lines = {name.replace("_", " "): job[name] for name in ("id", "state", "vm", "records_done")}
    lines |= {name: show.moment(job[name]) for name in ("created", "started", "finished") if job[name]}
    lines |= {"result": job["result"]} if job["result"] else {}
    if job["error"] is not None:
        lines["error"] = f"{job['error']['status']}: {job['error']['detail']}"
    show.members(lines)
