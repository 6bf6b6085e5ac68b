"""Memory images: what a machine's memory was, as a stream of bytes that says where they belong. Nothing seeks.

A reader checks what is of the format: that the stream is long enough, that its ranges do not overlap and that it is an
image of such a machine. Whether the machine has memory there is for the machine to say.
"""

from __future__ import annotations

from engine.errors import InvalidValue
from engine.images.base import Image, ImageStream, Source
from engine.images.elf_core import ElfCore
from engine.images.lime import Lime
from engine.images.raw import Raw

__all__ = ["FORMATS", "Image", "Source", "open_image"]

RAW, ELF, LIME, AUTO = "raw", "elf", "lime", "auto"
FORMATS = (AUTO, RAW, ELF, LIME)

# How files begin, and what they are; of those that are not read, what to do about it.
_BEGINNINGS = ((b"\x7fELF", ELF), (b"EMiL", LIME))
_OTHERS = (
    (b"KDUMP   ", "is a kdump-compressed dump: `dump-guest-memory` without -z, -l, -s and -R writes an ELF core"),
    (b"makedumpfile", "is a flattened dump: `makedumpfile -R` and -E make an ELF core of it"),
    (b"PAGEDU", "is a Windows crash dump: `dump-guest-memory` without -w writes an ELF core"),
    (b"AVML", "is a compressed AVML image: `avml-convert --format lime` makes a LiME image of it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: send it with Content-Encoding: zstd"),
    (b"\x1f\x8b", "is compressed by gzip: send it with Content-Encoding: gzip"),
    (b"\xfd7zXZ\0", "is compressed by xz: decompress it first, or send it as zstd"),
    (b"QEVM", "is the state of a machine as QEMU migrates it: `dump-guest-memory` writes an ELF core"),
)
_LONGEST = max(len(beginning) for beginning, _ in _OTHERS)


def open_image(format: str, source: Source, gpa: int | None = None) -> Image:
    """A reader of ``source``, of which nothing but its beginning is read before the reader is iterated.

    ``format`` is one of ``FORMATS``; with ``auto`` the beginning tells, and what is nothing else is raw. ``gpa`` is
    where a raw image belongs, 0 if it is None; the others say so themselves. Raises InvalidValue.
    """
    if format not in FORMATS:
        raise InvalidValue(f"must be one of {', '.join(FORMATS)}", field="format", value=format)
    stream = ImageStream(source)
    if format == AUTO:
        format = _told(stream.peek(_LONGEST))
    if format == RAW:
        return Raw(stream, gpa or 0)
    if gpa is not None:
        raise InvalidValue(f"goes with {RAW} images; those of {format} say it themselves", field="gpa", value=gpa)
    return ElfCore(stream) if format == ELF else Lime(stream)


def _told(beginning: bytes) -> str:
    for magic, what in _OTHERS:
        if beginning.startswith(magic):
            raise InvalidValue(f"must be raw memory, an ELF core or LiME; it {what}", field="body")
    return next((format for magic, format in _BEGINNINGS if beginning.startswith(magic)), RAW)
