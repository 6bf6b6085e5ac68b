"""``subpage protect`` and ``unprotect``: named objects of a machine that may not be written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli import complete, show
from service.cli.commands import AsJson
from service.cli.connection import Service, Unanswered, remote
from service.cli.numbers import number_of, size_of
from service.cli.statuses import Status
from service.cli.vms import VmArgument, machine

_OBJECT = re.compile(r"(?P<name>[^=]+)=(?P<gpa>0x[0-9a-fA-F]+|[0-9]+):(?P<size>[^:]+)")


def parse_object(text: str) -> dict[str, Any]:
    """``NAME=GPA:SIZE`` as an object of a policy. Raises BadParameter."""
    found = _OBJECT.fullmatch(text)
    gpa, size = (number_of(found["gpa"]), size_of(found["size"])) if found else (None, None)
    if found is None or gpa is None or not size:
        raise typer.BadParameter(f"must be NAME=GPA:SIZE, such as idt=0x3313000:4096, not {text}")
    return {"name": found["name"], "gpa": hex(gpa), "size": size}


@remote
def protect(
    service: Service,
    vm: VmArgument,
    policy: Annotated[
        Path | None, typer.Argument(help="JSON or TOML: name, objects, pages (docs/policies.md).")
    ] = None,
    objects: Annotated[
        list[Any] | None,
        typer.Option("--object", parser=parse_object, metavar="NAME=GPA:SIZE", help="One more; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the protection; the policy's unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Protect the objects of a policy: writes to them exit, by 128 bytes."""
    from service.cli.policy_files import policy_document

    if policy is None and not objects:
        raise typer.BadParameter("give a file, or objects with --object NAME=GPA:SIZE", param_hint="policy")
    document = policy_document(policy) if policy is not None else {}
    document = {**document, "objects": [*document.get("objects", ()), *(objects or ())]}
    document.pop("subpage_bytes", None)
    with service.client() as client:
        found = machine(client, vm).protect(document, name=name or document.get("name") or _name_of(policy))
    if as_json:
        show.document(found)
        return
    show.table(
        ("object", "gpa", "bytes", "granularity"),
        ((item["name"], item["gpa"], item["size"], item["granularity"]) for item in found["objects"]),
        right=("bytes",),
    )
    ranges = f", {len(found['page_ranges']):,} ranges of pages" if found["page_ranges"] else ""
    typer.echo(f"{found['name']}: {found['subpages']:,} sub-pages in {found['pages']:,} pages{ranges}")


@remote
def unprotect(
    service: Service,
    vm: VmArgument,
    name: Annotated[list[str], typer.Argument(help="Names of protections.", autocompletion=complete.protections)],
    as_json: AsJson = False,
) -> None:
    """End protections; what others cover stays covered."""
    done: list[str] = []
    with service.client() as client:
        asked = machine(client, vm)
        known = {item["name"] for item in asked.protections()}
        if missing := [each for each in name if each not in known]:
            there = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise Unanswered(f"{asked.id} has no protection {missing[0]!r}: {there}", Status.NOT_FOUND)
        for each in name:
            asked.unprotect(each)
            done.append(each)
            if not as_json:
                typer.echo(f"ended {each}")
    if as_json:
        show.document({"vm": asked.id, "ended": done})


def _name_of(policy: Path | None) -> str:
    from service.cli.policy_files import name_of_file

    return "protection" if policy is None else name_of_file(policy)
