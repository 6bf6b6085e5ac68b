"""``subpage vm load``: a machine of a running service gets the memory and the registers of an image."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, show
from service.cli.commands import AsJson
from service.cli.connection import Service, failure_of, remote
from service.cli.numbers import parse_number
from service.cli.progress import ProgressOption, bar
from service.cli.vms import machine

if TYPE_CHECKING:
    import subpage
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


@remote
def load(
    service: Service,
    file: Annotated[
        Path, typer.Argument(help="Raw memory, an ELF core of QEMU's dump-guest-memory, or LiME; as .gz, .zst or .xz.")
    ],
    vm: Annotated[
        str | None,
        typer.Option("--vm", help="Id of a machine; without it one is created.", autocompletion=complete.vms),
    ] = None,
    name: Annotated[str, typer.Option(help="Of the machine that is created; by default the file's.")] = "",
    format: Annotated[ImageFormat, typer.Option(help="Of the image; auto: its beginning tells.")] = ImageFormat.AUTO,
    gpa: Annotated[
        int | None,
        typer.Option(parser=parse_number, metavar="ADDRESS", help="Where a raw image begins; 0 unless given."),
    ] = None,
    profile: Annotated[str, typer.Option(help="Which KVM, for the machine that is created.")] = "kvm-2019",
    spp: Annotated[
        bool, typer.Option("--spp", help="Enable sub-page protection on the machine that is created.")
    ] = False,
    registers: Annotated[
        bool, typer.Option("--registers/--no-registers", help="Set CR0, CR3, CR4 and EFER of the vCPUs from the image.")
    ] = True,
    progress: ProgressOption = None,
    as_json: AsJson = False,
) -> None:
    """Load a memory image: make slots for its ranges, its contents, and the registers that it tells of.

    All of it or nothing: what was made for an image that cannot be loaded is deleted again.
    """
    from service.cli import image_files

    surveyed = image_files.survey(file, format.value, gpa)
    slots = image_files.slots_of(surveyed.ranges)
    created = {"name": name or file.name, "profile": profile, "spp": spp, "vcpus": max(surveyed.vcpus, 1)}
    with service.client() as client:
        loaded, undo = _make(client, created, slots) if vm is None else _extend(machine(client, vm), slots)
        try:
            began = time.perf_counter()
            found = _upload(loaded, file, surveyed, gpa, progress)
            seconds = time.perf_counter() - began
            _set_registers(loaded, found["vcpus"] if registers else [])
        except BaseException:
            _undone(client, undo)
            raise
        document = loaded.refresh()
    if as_json:
        show.document({"vm": document["id"], "memory_slots": document["memory_slots"], **found})
        return
    _print(document, found, seconds)


Undo = list[tuple[str, dict[str, Any]]]
"""Calls that delete what was made, if nothing comes of it: operations with their paths, in order of making."""


def _make(client: subpage.Client, created: dict[str, Any], slots: list[tuple[int, int]]) -> tuple[subpage.Vm, Undo]:
    bits = max(_ADDRESS_BITS, *(sum(slot).bit_length() for slot in slots))
    rows = [{"slot": n, "gpa": hex(gpa), "size": hex(size)} for n, (gpa, size) in enumerate(slots)]
    made = client.create_vm(**created, maxphyaddr=min(bits, 52), memory_slots=rows)
    return made, [("deleteVm", {"vm": made.id})]


def _extend(vm: subpage.Vm, slots: list[tuple[int, int]]) -> tuple[subpage.Vm, Undo]:
    """Slots for what a machine has none for."""
    import subpage
    from service.cli.image_files import beside

    known = [slot for slot in vm.slots() if not slot["address_space"]]
    missing = beside(slots, [(int(slot["gpa"], 16), int(slot["size"], 16)) for slot in known])
    taken = {slot["slot"] for slot in known}
    numbers = (n for n in range(1 << 16) if n not in taken)
    done: Undo = []
    try:
        for number, (gpa, size) in zip(numbers, missing, strict=False):
            vm.set_slot(number, gpa, size)
            done.append(("deleteMemorySlot", {"vm": vm.id, "slot": number}))
    except (subpage.Error, KeyboardInterrupt):
        _undone(vm, done)
        raise
    return vm, done


def _undone(client: subpage.Client | subpage.Vm, places: Undo) -> None:
    import subpage

    for operation, path in reversed(places):
        try:
            client.call(operation, path=path)
        except subpage.Error as error:
            made = " ".join(f"{name} {value}" for name, value in path.items())
            typer.echo(f"{made} was made and could not be deleted again: {failure_of(error)}", err=True)


def _upload(vm: subpage.Vm, file: Path, surveyed: Surveyed, gpa: int | None, progress: bool | None) -> dict[str, Any]:
    from service.cli import image_files

    query = {"format": surveyed.format, "gpa": None if gpa is None else hex(gpa)}
    size = file.stat().st_size
    with image_files.reading(file) as (source, raw), bar("loading", progress, size) as move:

        def advanced() -> None:
            done = raw.tell()
            move(done, description="committing" if done >= size else "loading")

        content = image_files.coded(source, advanced)
        headers = {"Content-Type": "application/octet-stream", "Content-Encoding": image_files.CODING}
        return dict(vm.call("writeMemory", query=query, content=lambda: content, headers=headers).json())


def _set_registers(vm: subpage.Vm, vcpus: list[dict[str, Any]]) -> None:
    if not vcpus:
        return
    ids = [vcpu["id"] for vcpu in vm.refresh()["vcpus"]]
    for number, vcpu in zip(ids, vcpus, strict=False):
        vm.call("putVmcs", path={"n": number}, json={name: vcpu[name] for name in _REGISTERS})
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
