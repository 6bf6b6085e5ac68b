"""``subpage policy``: policies made from symbols, and looked at before they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.commands import Command
from service.cli.vms import HERE, AsJson, Authorities, Client, Token, Url
from service.platform.failures import Failure

if TYPE_CHECKING:
    from service.cli.policy_check import Ram

policies = typer.Typer(help="Make policies from a kernel's symbols, and check them.", no_args_is_help=True)

_UNITS = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


def _number(text: str) -> int:
    """An address or an amount of the command line: decimal or 0x, with a sign; two's complement is negative."""
    try:
        found = int(text, 0)
    except ValueError:
        raise typer.BadParameter("must be a number, decimal or 0x…") from None
    return found - (1 << 64) if 1 << 63 <= found < 1 << 64 else found


def _slot(text: str) -> tuple[int, int]:
    """``GPA:SIZE`` as a range of memory."""
    gpa, _, size = text.partition(":")
    unit = next((unit for unit in _UNITS if size.endswith(unit)), None)
    try:
        begin = int(gpa, 0)
        length = int(size.removesuffix(unit or ""), 0) << _UNITS.get(unit or "", 0)
    except ValueError:
        begin = length = -1
    if begin < 0 or length <= 0:
        raise typer.BadParameter("must be GPA:SIZE, such as 0:3GiB or 0x100000000:0x40000000")
    return begin, begin + length


@policies.command("from-symbols", cls=Command)
def from_symbols(
    file: Annotated[
        Path, typer.Argument(help="kallsyms, System.map, a Volatility 3 symbol file (.json, .json.xz) or vmlinux.")
    ],
    objects: Annotated[
        list[str], typer.Option("--object", help="NAME, NAME:SIZE or NAME+OFFSET:SIZE; once for each object.")
    ],
    slide: Annotated[
        int | None, typer.Option(parser=_number, metavar="N", help="What KASLR added to the addresses of the file.")
    ] = None,
    phys_base: Annotated[
        int | None, typer.Option(parser=_number, metavar="N", help="The guest kernel's phys_base; 0 without KASLR.")
    ] = None,
    cr3: Annotated[
        int | None, typer.Option(parser=_number, metavar="N", help="CR3 of the kernel itself, instead of phys_base.")
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


@policies.command(cls=Command)
def check(
    file: Annotated[Path, typer.Argument(help="A policy, JSON or TOML.")],
    memory_slots: Annotated[
        list[Any] | None,
        typer.Option("--memory-slots", parser=_slot, metavar="GPA:SIZE", help="Guest RAM, such as 0:3GiB; may repeat."),
    ] = None,
    vm: Annotated[str | None, typer.Option("--vm", help="Take the memory slots of this machine of a service.")] = None,
    url: Url = HERE,
    token: Token = None,
    authorities: Authorities = None,
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
        ram = merged(_slots_of(vm, url, token, authorities))
    found = report(protection, ram)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print(found)
    raise typer.Exit(1 if found["outside_ram"] else 0)


def _slots_of(vm: str, url: str, token: str | None, authorities: Path | None) -> list[tuple[int, int]]:
    from urllib.parse import quote

    with Client(url, token, authorities) as client:
        slots = client.get(f"/v1/vms/{quote(vm, safe='')}")["memory_slots"]
    rows = [(int(slot["gpa"], 16), int(slot["size"], 16)) for slot in slots if not slot["address_space"]]
    return [(gpa, gpa + size) for gpa, size in rows]


def _print(found: dict[str, Any]) -> None:
    row = "{:<32}  {:>16}  {:>10}  {:>9}  {:>5}  {:>10}  {}"
    typer.echo(row.format("OBJECT", "GPA", "BYTES", "SUB-PAGES", "PAGES", "NEIGHBOURS", "NOTES"))
    for item in found["objects"]:
        numbers = (f"{item[name]:,}" for name in ("size", "subpages", "pages", "neighbours"))
        typer.echo(row.format(item["name"][:32], item["gpa"], *numbers, "; ".join(_notes(item))).rstrip())
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
