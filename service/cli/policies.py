"""``subpage policy``: policies made from symbols, and looked at before they are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, show
from service.cli.commands import AsJson, Group, command
from service.cli.connection import Service, remote
from service.cli.numbers import parse_range, parse_signed
from service.cli.vms import machine
from service.platform.failures import Failure

if TYPE_CHECKING:
    from service.cli.policy_check import Ram

policies = typer.Typer(
    cls=Group, help="Make policies from a kernel's symbols, show and check them.", no_args_is_help=True
)


@command(
    policies,
    "subpage policy from-symbols kallsyms --object modprobe_path:256 --phys-base 0 --slide 0 -o policy.json",
    name="from-symbols",
)
def from_symbols(
    file: Annotated[
        Path, typer.Argument(help="kallsyms, System.map, a Volatility 3 symbol file (.json, .json.xz) or vmlinux.")
    ],
    objects: Annotated[
        list[str], typer.Option("--object", help="NAME, NAME:SIZE or NAME+OFFSET:SIZE; once for each object.")
    ],
    slide: Annotated[
        int | None,
        typer.Option(parser=parse_signed, metavar="N", help="What KASLR added to the addresses of the file."),
    ] = None,
    phys_base: Annotated[
        int | None,
        typer.Option(parser=parse_signed, metavar="N", help="The guest kernel's phys_base; 0 without KASLR."),
    ] = None,
    cr3: Annotated[
        int | None,
        typer.Option(parser=parse_signed, metavar="N", help="CR3 of the kernel itself, instead of phys_base."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the protection.")] = "kernel",
    format: Annotated[
        str | None, typer.Option(help="kallsyms, system-map, isf or elf; by the content otherwise.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; else standard output.")] = None,
) -> None:
    """Write the policy that protects objects of a kernel, named as its symbols are."""
    from service.cli.symbol_policies import ASSUMED, Wanted, policy_from, read_symbols, text_of

    wanted = [Wanted.of(text) for text in objects]
    symbols = read_symbols(file, format, slide, phys_base, cr3)
    policy = policy_from(symbols, wanted, name)
    text = text_of(policy)
    if output is None:
        typer.echo(text, nl=False)
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise Failure(f"{output}: cannot be written: {error.strerror}") from None
    place = symbols.placement
    typer.echo(
        f"{len(wanted)} objects; slide {place.slide:#x}, phys_base {place.phys_base:#x}: {place.found_by}", err=True
    )
    assumed = [item["name"] for item in policy["objects"] if item.get("about") == ASSUMED]
    if assumed:
        typer.echo(f"sizes up to the next symbol, as the file has none: {', '.join(assumed)}", err=True)


@command(policies, "subpage policy check policy.json --memory-slots 0:1GiB")
@remote
def check(
    service: Service,
    file: Annotated[Path, typer.Argument(help="A policy, JSON or TOML.")],
    memory_slots: Annotated[
        list[Any] | None,
        typer.Option(
            "--memory-slots", parser=parse_range, metavar="GPA:SIZE", help="Guest RAM, such as 0:3GiB; may repeat."
        ),
    ] = None,
    vm: Annotated[
        str | None,
        typer.Option("--vm", help="Take the memory slots of this machine of a service.", autocompletion=complete.vms),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a policy drags in: sub-pages, neighbours' bytes, overlaps, what straddles pages or lies outside RAM.

    Exits with 1 if something that it protects has no memory.
    """
    from service.cli.policy_check import merged, report
    from service.cli.policy_files import read_policy

    protection = read_policy(file).protection()
    ram: Ram | None = None
    if memory_slots:
        ram = merged(memory_slots)
    elif vm is not None:
        ram = merged(_slots_of(service, vm))
    found = report(protection, ram)
    if as_json:
        show.document(found)
    else:
        _print(found)
    raise typer.Exit(1 if found["outside_ram"] else 0)


@command(policies, "subpage policy show policy.json", "subpage policy show --vm guest", name="show")
@remote
def show_(
    service: Service,
    file: Annotated[Path | None, typer.Argument(help="A policy, JSON or TOML.")] = None,
    vm: Annotated[
        str | None,
        typer.Option("--vm", help="Show what is protected in this machine instead.", autocompletion=complete.vms),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the objects and ranges of a policy, or all that is protected in a machine."""
    from service.api.protection.protections import Protection
    from service.cli.policy_files import read_policy

    if (file is None) == (vm is None):
        raise typer.BadParameter("give a file, or a machine with --vm", param_hint="file")
    if file is not None:
        found = [Protection.of(read_policy(file).protection()).model_dump(mode="json")]
    else:
        with service.client() as client:
            found = [dict(item) for item in machine(client, str(vm)).protections()]
    if as_json:
        show.document(found[0] if file is not None else found)
        return
    rows = [
        (item["name"], each["name"], each["gpa"], each["size"], each["granularity"], each["about"] or "")
        for item in found
        for each in item["objects"]
    ]
    show.table(("policy", "object", "gpa", "bytes", "granularity", "about"), rows, right=("bytes",))
    for item in found:
        for gfn, npages, access in item["page_ranges"]:
            typer.echo(f"{item['name']}: {npages:,} pages from {gfn} on, bitmap {access}")
        typer.echo(f"{item['name']}: {item['subpages']:,} sub-pages in {item['pages']:,} pages")


def _slots_of(service: Service, vm: str) -> list[tuple[int, int]]:
    with service.client() as client:
        slots = machine(client, vm)["memory_slots"]
    rows = [(int(slot["gpa"], 16), int(slot["size"], 16)) for slot in slots if not slot["address_space"]]
    return [(gpa, gpa + size) for gpa, size in rows]


def _print(found: dict[str, Any]) -> None:
    numbers = ("size", "subpages", "pages", "neighbours")
    rows = (
        (item["name"], item["gpa"], *(item[name] for name in numbers), "; ".join(_notes(item)))
        for item in found["objects"]
    )
    names = ("object", "gpa", "bytes", "sub-pages", "pages", "neighbours", "notes")
    show.table(names, rows, right=names[1:6])
    for at in found["pages_outside_ram"]:
        typer.echo(f"pages[{at}]: outside RAM")
    outside = found["outside_ram"]
    told = "RAM not given (--memory-slots, --vm)" if outside is None else f"{outside} outside RAM"
    typer.echo(
        f"{found['name']}: {len(found['objects'])} objects, {found['subpages']:,} sub-pages in {found['pages']:,} "
        f"pages, {found['neighbours']:,} bytes of neighbours; {told}"
    )


def _notes(item: dict[str, Any]) -> list[str]:
    notes = [f"overlaps {', '.join(item['overlaps'])}"] if item["overlaps"] else []
    notes += [f"shares a sub-page with {', '.join(item['shares'])}"] if item["shares"] else []
    notes += ["straddles pages"] if item["straddles"] else []
    return notes + (["outside RAM"] if item["outside"] else [])
