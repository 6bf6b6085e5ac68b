"""``subpage access`` and ``walk``: one access, carried out or explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from service.cli import complete, show
from service.cli.commands import AsJson
from service.cli.connection import Service, remote
from service.cli.numbers import parse_number
from service.cli.vms import VmArgument, machine

ACCESSES = ("read", "write", "execute")
_ON_VIOLATION = ("skip", "allow", "grant", "ask")

Kind = Annotated[str, typer.Option(help="read, write or execute.", autocompletion=complete.one_of(*ACCESSES))]
Size = Annotated[int, typer.Option(min=1, help="Bytes.")]
Vcpu = Annotated[int, typer.Option(min=0, help="Of which vCPU.")]


@remote
def walk(
    service: Service,
    vm: VmArgument,
    gpa: Annotated[int, typer.Argument(parser=parse_number, metavar="GPA", help="Guest-physical address.")],
    access: Kind = "write",
    size: Size = 8,
    vcpu: Vcpu = 0,
    as_json: AsJson = False,
) -> None:
    """Explain an access, entry by entry, without carrying it out."""
    with service.client() as client:
        found = machine(client, vm).walk(gpa, access, size, vcpu=vcpu)
    if as_json:
        show.document(found)
        return
    _entries(found)
    typer.echo(found["sentence"])
    if then := found.get("then"):
        typer.echo()
        typer.echo("then:")
        _entries(then)
        typer.echo(then["sentence"])


@remote
def access(
    service: Service,
    vm: VmArgument,
    gpa: Annotated[
        int | None, typer.Argument(parser=parse_number, metavar="GPA", help="Guest-physical address; or give --gva.")
    ] = None,
    access: Kind = "write",
    size: Size = 8,
    vcpu: Vcpu = 0,
    gva: Annotated[
        int | None,
        typer.Option(parser=parse_number, metavar="ADDRESS", help="Virtual address, through the guest's page tables."),
    ] = None,
    on_violation: Annotated[
        str,
        typer.Option(
            help="skip, allow, grant or ask, if it is refused.", autocompletion=complete.one_of(*_ON_VIOLATION)
        ),
    ] = "skip",
    data: Annotated[str | None, typer.Option(metavar="HEX", help="The bytes that a write stores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Carry out one access of the guest, and say how it ended."""
    if (gpa is None) == (gva is None):
        raise typer.BadParameter("give an address: GPA, or --gva", param_hint="gpa")
    members: dict[str, Any] = {"vcpu": vcpu} | ({} if gva is None else {"gva": hex(gva)})
    stored = _bytes(data)
    with service.client() as client:
        found = machine(client, vm).access(
            gpa, len(stored) if stored else size, access, on_violation=on_violation, data=stored, **members
        )
    if as_json:
        show.document(found)
        return
    told = {"allowed": found["allowed"], "landed": found["landed"], "resolution": found["resolution"]}
    told |= {name: found[name] for name in ("gpa", "exception", "error_code", "data") if found.get(name) is not None}
    if found["run"] is not None:
        told["KVM_RUN"] = found["run"]["name"]
    show.members(told)
    if found["exits"]:
        exits_table(found["exits"])


def exits_table(records: Sequence[Mapping[str, Any]]) -> None:
    """Exit records as rows."""
    names = ("record", "vcpu", "exit", "access", "gpa", "size", "denied", "objects", "resolution")
    show.table(names, map(exit_row, records), right=("record", "vcpu", "size"))


def exit_row(record: Mapping[str, Any]) -> tuple[object, ...]:
    """One exit record as cells."""
    kind = record["access"]
    named = ACCESSES[kind] if isinstance(kind, int) and kind < len(ACCESSES) else kind
    objects = ", ".join(record["objects"]) or "-"
    numbers = (record["index"], record["vcpu"])
    return (
        *numbers,
        record["name"],
        named,
        record["gpa"],
        record["size"],
        record["denied"],
        objects,
        record["resolution"],
    )


def _entries(found: Mapping[str, Any]) -> None:
    rows = list(_rows(found))
    if rows:
        show.table(("entry", "table", "index", "value", "says"), rows, right=("index",))


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for entry in [*found["ept"], *found["sppt"]]:
        fields = {name: int(value, 16) for name, value in entry["fields"].items()}
        address = f" → {fields['address']:#x}" if fields.get("address") else ""
        said = " ".join(name for name in ("read", "write", "execute", "spp", "valid", "page") if fields.get(name))
        if (writable := entry["fields"].get("writable_subpages")) is not None:
            said = f"may be written: {writable}"
        absent = "there is none" if entry["absent"] else said or "nothing set"
        yield entry["structure"], entry["table"], entry["index"], entry["raw"], f"{absent}{address}"


def _bytes(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        found = bytes.fromhex(text)
    except ValueError:
        raise typer.BadParameter(f"must be bytes in hex, such as 00ff, not {text}", param_hint="--data") from None
    if not found:
        raise typer.BadParameter("must have a byte at least", param_hint="--data")
    return found
