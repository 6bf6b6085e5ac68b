"""Memory images over HTTP: what a load of one is answered with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.machine import VirtualMachine
from service.api.common import guard, held_tag, json_response, replaying_of, settings_of
from service.http.idempotency import hooks_of
from service.http.negotiation import JSON, preferred
from service.http.wire_types import Document, Hex64, examples
from service.runtime.entry import Entry
from service.runtime.images import LoadedImage, load_image
from service.runtime.offload import maybe_in_thread

# Ranges and vCPUs of one image: more than this are rendered off the event loop.
_INLINE_PARTS = 100

ImageFormat = Literal["auto", "raw", "elf", "lime"]

_REGISTERS = {
    "vcpu": 0,
    "rip": "0xffffffff81c3f2eb",
    "rsp": "0xffffffff82603e80",
    "rflags": "0x246",
    "cr0": "0x80050033",
    "cr2": "0x7f1c3b0c1000",
    "cr3": "0x2a10000",
    "cr4": "0x6f0",
    "efer": "0xd00",
}
_IMAGE = {
    "format": "elf",
    "bytes": 1073741824,
    "pages_kept": 71203,
    "ranges": [{"gpa": "0x0", "size": "0x40000000"}],
    "vcpus": [_REGISTERS],
}


class ImageRange(Document):
    """Bytes of guest memory that an image has."""

    model_config = ConfigDict(json_schema_extra=examples({"gpa": "0x0", "size": "0x40000000"}))

    gpa: Hex64 = Field(description="Guest-physical address of the first byte.")
    size: Hex64 = Field(description="In bytes.")


class ImageVcpu(Document):
    """Registers of a vCPU in a core of QEMU. The load sets none: `PUT …/vcpus/{n}/vmcs` does."""

    model_config = ConfigDict(json_schema_extra=examples(_REGISTERS))

    vcpu: int = Field(description="Its place among the vCPUs of the image.")
    rip: Hex64 = Field(description="RIP.")
    rsp: Hex64 = Field(description="RSP.")
    rflags: Hex64 = Field(description="RFLAGS.")
    cr0: Hex64 = Field(description="CR0.")
    cr2: Hex64 = Field(description="CR2.")
    cr3: Hex64 = Field(description="CR3.")
    cr4: Hex64 = Field(description="CR4.")
    efer: Hex64 = Field(
        description="Not in the image: long mode and no-execute, where it and the other registers say so."
    )


class MemoryImage(Document):
    """A memory image that was loaded."""

    model_config = ConfigDict(json_schema_extra=examples(_IMAGE))

    format: Literal["raw", "elf", "lime"] = Field(description="What it is.")
    bytes: int = Field(description="Bytes of guest memory in it.")
    pages_kept: int = Field(description="Pages that are not all zeros; they alone take memory.")
    ranges: list[ImageRange] = Field(description="Where they are, by address; neighbours are one.")
    vcpus: list[ImageVcpu] = Field(description="From the notes of an ELF core.")


async def put_image(request: Request, entry: Entry, format: ImageFormat, gpa: int | None) -> Response:
    """Load the body of ``request``, a memory image."""

    preferred(request, (JSON,))

    def check(machine: VirtualMachine) -> None:
        guard(request, entry, lambda: [held_tag(entry)])

    replaying, settings = replaying_of(request), settings_of(request)
    found = await load_image(entry, request, format, gpa, replaying, settings, hooks_of(request), check)
    few = len(found.ranges) + len(found.vcpus) <= _INLINE_PARTS
    return await maybe_in_thread(few, lambda: json_response(_document(found)))


def _document(found: LoadedImage) -> dict[str, Any]:
    """The JSON of a ``MemoryImage``."""
    vcpus = [
        {"vcpu": n} | {name: hex(value) for name, value in asdict(vcpu).items()} for n, vcpu in enumerate(found.vcpus)
    ]
    ranges = [{"gpa": hex(begin), "size": hex(size)} for begin, size in found.ranges]
    told = {"format": found.format, "bytes": found.size, "pages_kept": found.pages_kept}
    return {**told, "ranges": ranges, "vcpus": vcpus}
