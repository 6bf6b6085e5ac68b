"""``subpage vm load``: a machine of a running service gets the memory and the registers of an image."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.progress import ProgressOption, bar
from service.cli.vms import HERE, AsJson, Authorities, Client, Token, Url, complete
from service.platform.failures import Failure

if TYPE_CHECKING:
    from service.cli.image_files import Surveyed


# Those of ``engine.images``, which is not imported for a help text; a test compares them.


class ImageFormat(StrEnum):
    """Of the image."""

    AUTO = "auto"
    RAW = "raw"
    ELF = "elf"
    LIME = "lime"


# As a VM has them unless it is told otherwise.
_ADDRESS_BITS = 46
_REGISTERS = ("cr0", "cr3", "cr4", "efer")


def _address(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise typer.BadParameter(f"must be a number such as 0x100000, not {text}") from None


def load(
    file: Annotated[
        Path, typer.Argument(help="Raw memory, an ELF core of QEMU's dump-guest-memory, or LiME; as .gz, .zst or .xz.")
    ],
    vm: Annotated[
        str | None, typer.Option("--vm", help="Id of a machine; without it one is created.", autocompletion=complete)
    ] = None,
    name: Annotated[str, typer.Option(help="Of the machine that is created; by default the file's.")] = "",
    format: Annotated[ImageFormat, typer.Option(help="Of the image; auto: its beginning tells.")] = ImageFormat.AUTO,
    gpa: Annotated[
        int | None, typer.Option(parser=_address, metavar="ADDRESS", help="Where a raw image begins; 0 unless given.")
    ] = None,
    profile: Annotated[str, typer.Option(help="Which KVM, for the machine that is created.")] = "kvm-2019",
    spp: Annotated[
        bool, typer.Option("--spp", help="Enable sub-page protection on the machine that is created.")
    ] = False,
    registers: Annotated[
        bool, typer.Option("--registers/--no-registers", help="Set CR0, CR3, CR4 and EFER of the vCPUs from the image.")
    ] = True,
    progress: ProgressOption = None,
    url: Url = HERE,
    token: Token = None,
    authorities: Authorities = None,
    as_json: AsJson = False,
) -> None:
    """Load a memory image: make slots for its ranges, its contents, and the registers that it tells of.

    All of it or nothing: what was made for an image that cannot be loaded is deleted again.
    """
    from service.cli import image_files

    surveyed = image_files.survey(file, format.value, gpa)
    slots = image_files.slots_of(surveyed.ranges)
    created = {"name": name or file.name, "profile": profile, "spp": spp, "vcpus": max(surveyed.vcpus, 1)}
    with Client(url, token, authorities) as client:
        made = _make(client, created, slots) if vm is None else _extend(client, vm, slots)
        home, undo = made
        try:
            began = time.perf_counter()
            found = _upload(client, home, file, surveyed, gpa, progress)
            seconds = time.perf_counter() - began
            _set_registers(client, home, found["vcpus"] if registers else [])
        except BaseException:
            _undone(client, undo)
            raise
        machine = client.get(home)
    if as_json:
        typer.echo(json.dumps({"vm": machine["id"], "memory_slots": machine["memory_slots"], **found}, indent=1))
        return
    _print(machine, found, seconds)


Made = tuple[str, list[str]]
"""Where a machine is, and what is to be deleted if nothing comes of it."""


def _make(client: Client, created: dict[str, Any], slots: list[tuple[int, int]]) -> Made:
    bits = max(_ADDRESS_BITS, *(sum(slot).bit_length() for slot in slots))
    rows = [{"slot": n, "gpa": hex(gpa), "size": hex(size)} for n, (gpa, size) in enumerate(slots)]
    document = {**created, "maxphyaddr": min(bits, 52), "memory_slots": rows}
    home = f"/v1/vms/{client.call('POST', '/v1/vms', document)['id']}"
    return home, [home]


def _extend(client: Client, vm: str, slots: list[tuple[int, int]]) -> Made:
    """Slots for what a machine has none for."""
    from urllib.parse import quote

    from service.cli.image_files import beside

    home = f"/v1/vms/{quote(vm, safe='')}"
    known = [slot for slot in client.get(f"{home}/memory-slots")["memory_slots"] if not slot["address_space"]]
    missing = beside(slots, [(int(slot["gpa"], 16), int(slot["size"], 16)) for slot in known])
    taken = {slot["slot"] for slot in known}
    numbers = (n for n in range(1 << 16) if n not in taken)
    done: list[str] = []
    try:
        for number, (gpa, size) in zip(numbers, missing, strict=False):
            place = f"{home}/memory-slots/{number}"
            client.call("PUT", place, {"gpa": hex(gpa), "size": hex(size)})
            done.append(place)
    except BaseException:
        _undone(client, done)
        raise
    return home, done


def _undone(client: Client, places: list[str]) -> None:
    for place in reversed(places):
        try:
            client.call("DELETE", place)
        except Failure as failure:
            typer.echo(f"{place} was made and could not be deleted again: {failure}", err=True)


def _upload(
    client: Client, home: str, file: Path, surveyed: Surveyed, gpa: int | None, progress: bool | None
) -> dict[str, Any]:
    from service.cli import image_files

    query = {"format": surveyed.format} | ({"gpa": hex(gpa)} if gpa is not None else {})
    size = file.stat().st_size
    with image_files.reading(file) as (source, raw), bar("loading", progress, size) as move:

        def advanced() -> None:
            done = raw.tell()
            move(done, description="committing" if done >= size else "loading")

        content = image_files.coded(source, advanced)
        return client.upload(f"{home}/memory", query, content, image_files.CODING)


def _set_registers(client: Client, home: str, vcpus: list[dict[str, Any]]) -> None:
    if not vcpus:
        return
    ids = [vcpu["id"] for vcpu in client.get(home)["vcpus"]]
    for number, vcpu in zip(ids, vcpus, strict=False):
        client.call("PUT", f"{home}/vcpus/{number}/vmcs", {name: vcpu[name] for name in _REGISTERS})
    if len(vcpus) > len(ids):
        typer.echo(f"the image tells of {len(vcpus)} vCPUs, the machine has {len(ids)}", err=True)


def _print(machine: dict[str, Any], found: dict[str, Any], seconds: float) -> None:
    mib = 1 << 20
    typer.echo(f"{machine['id']}  {machine['name']}")
    for slot in machine["memory_slots"]:
        begin, size = int(slot["gpa"], 16), int(slot["size"], 16)
        typer.echo(f"  slot {slot['slot']}: {begin:#x} to {begin + size - 1:#x}")
    kept = found["pages_kept"]
    rate = found["bytes"] / mib / seconds if seconds else 0.0
    typer.echo(
        f"  {found['bytes'] / mib:,.1f} MiB of {found['format']} in {seconds:.1f} s ({rate:,.0f} MiB/s); "
        f"{kept:,} pages are not zero ({kept * 4096 / mib:,.1f} MiB)"
    )
    for vcpu in found["vcpus"]:
        told = ", ".join(f"{name.upper()} {vcpu[name]}" for name in _REGISTERS)
        typer.echo(f"  vCPU {vcpu['vcpu']} in the image: {told}")
