"""``subpage vm``: the machines of a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, show
from service.cli.commands import AsJson, Group, command
from service.cli.connection import Service, Unanswered, remote
from service.cli.numbers import parse_range, parse_size
from service.cli.statuses import Status

if TYPE_CHECKING:
    import subpage

vms = typer.Typer(
    cls=Group, help="Machines of a service: make, list, clone, load and delete them.", no_args_is_help=True
)

VmArgument = Annotated[str, typer.Argument(help="Id of the machine, or its name.", autocompletion=complete.vms)]

_PROFILES = complete.one_of("kvm-2019", "kvm-latest")


def machine(client: subpage.Client, vm: str) -> subpage.Vm:
    """The machine of an id, or of a name that no other has. Raises Problem, Unanswered."""
    if vm.startswith("vm_"):
        return client.vm(vm)
    found = [item for item in client.vms() if item.name == vm]
    if not found:
        raise Unanswered(
            f"there is no machine called {vm!r}: `subpage vm list` shows those there are", Status.NOT_FOUND
        )
    if len(found) > 1:
        raise Unanswered(f"{len(found)} machines are called {vm!r}: name one by its id, such as {found[0].id}")
    return found[0]


@command(
    vms,
    "subpage vm create guest --memory 64MiB",
    "subpage vm create --slot 0:1MiB --slot 0x100000000:1MiB --vcpus 2 --profile kvm-latest",
)
@remote
def create(
    service: Service,
    name: Annotated[str, typer.Argument(help="A label.")] = "",
    memory: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="RAM from address 0 on; 1GiB unless slots are given."),
    ] = None,
    slot: Annotated[
        list[Any] | None,
        typer.Option(parser=parse_range, metavar="GPA:SIZE", help="RAM elsewhere; may be repeated."),
    ] = None,
    vcpus: Annotated[int, typer.Option(min=1, max=1024, help="How many.")] = 1,
    profile: Annotated[str, typer.Option(help="Which KVM.", autocompletion=_PROFILES)] = "kvm-2019",
    maxphyaddr: Annotated[int | None, typer.Option(help="Width of guest-physical addresses in bits.")] = None,
    spp: Annotated[bool, typer.Option("--spp/--no-spp", help="Enable sub-page protection.")] = True,
    document: Annotated[
        Path | None, typer.Option("--from", help="JSON or TOML: other members, as `POST /v1/vms` takes them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a machine, and print its id."""
    from service.platform.failures import read_document

    ranges = [] if memory is None else [(0, memory)]
    ranges += [(begin, end - begin) for begin, end in slot or ()]
    wanted: dict[str, Any] = {"vcpus": vcpus, "profile": profile, "spp": spp}
    wanted |= {} if maxphyaddr is None else {"maxphyaddr": maxphyaddr}
    wanted |= {} if document is None else read_document(document)
    if ranges or "memory_slots" not in wanted:
        rows = enumerate(ranges or [(0, 1 << 30)])
        wanted["memory_slots"] = [{"slot": n, "gpa": hex(gpa), "size": hex(size)} for n, (gpa, size) in rows]
    wanted["name"] = name or wanted.get("name", "")
    with service.client() as client:
        made = client.call("createVm", json=wanted).json()
    _print_id(made, as_json)


@command(vms, "subpage vm list", "subpage vm list --json", name="list")
@remote
def list_(service: Service, as_json: AsJson = False) -> None:
    """List the machines: id, creation, memory, whether SPP is enabled, profile, name."""
    with service.client() as client:
        found = [vm.document for vm in client.vms()]
    if as_json:
        show.document(found)
        return
    rows = ((vm["id"], show.moment(vm["created"]), _memory(vm), vm["spp"], vm["profile"], vm["name"]) for vm in found)
    show.table(("id", "created", "memory", "spp", "profile", "name"), rows, right=("memory",))


@command(vms, "subpage vm show vm_3f9c2a1be07d4c55", name="show")
@remote
def show_(service: Service, vm: VmArgument, as_json: AsJson = False) -> None:
    """Show one machine, what is protected in it, and its counters."""
    with service.client() as client:
        asked = machine(client, vm)
        found, counters = asked.document, asked.counters()
        protections = [f"{item['name']} ({item['subpages']:,} sub-pages)" for item in asked.protections()]
    if as_json:
        show.document({**found, "counters": counters})
        return
    lines = {name: found[name] for name in ("id", "name", "profile", "maxphyaddr", "spp")}
    lines |= {"created": show.moment(found["created"]), "revision": found["revision"], "vcpus": len(found["vcpus"])}
    lines["memory"] = (
        ", ".join(f"{show.size(int(slot['size'], 16))} at {slot['gpa']}" for slot in found["memory_slots"]) or "none"
    )
    lines["protections"] = ", ".join(protections) or "none"
    lines |= {name: count for name, count in counters.items() if count}
    show.members(lines)


@command(vms, "subpage vm clone guest --name second", "subpage vm clone vm_3f9c2a1be07d4c55")
@remote
def clone(
    service: Service,
    vm: VmArgument,
    name: Annotated[str | None, typer.Option(help="Its label; the same unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make another machine that begins as this one is, and print its id: a second policy is tried beside the first."""
    with service.client() as client:
        made = client.call("cloneVm", path={"vm": machine(client, vm).id}, json={"name": name}).json()
    _print_id(made, as_json)


@command(vms, "subpage vm delete vm_3f9c2a1be07d4c55")
@remote
def delete(
    service: Service,
    vm: Annotated[list[str], typer.Argument(help="Ids or names of machines.", autocompletion=complete.vms)],
    as_json: AsJson = False,
) -> None:
    """Delete machines, and all that is kept of them."""
    done: list[str] = []
    with service.client() as client:
        for wanted in [machine(client, each) for each in vm]:
            headers = {"If-Match": "*"}  # whatever its state is
            client.call("deleteVm", path={"vm": wanted.id}, headers=headers)
            done.append(wanted.id)
            if not as_json:
                typer.echo(f"deleted {wanted.id}")
    if as_json:
        show.document({"deleted": done})


def _print_id(made: dict[str, Any], as_json: bool) -> None:
    """What was made: its id alone, so that a shell can keep it."""
    if as_json:
        show.document(made)
    else:
        typer.echo(made["id"])


def _memory(vm: Any) -> str:
    return show.size(sum(int(slot["size"], 16) for slot in vm["memory_slots"]))
