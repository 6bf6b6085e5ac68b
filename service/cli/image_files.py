"""Files of memory images: compressed or not, what is in them, and the slots that hold it."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import zstandard

from engine.errors import InvalidValue
from engine.images import open_image
from engine.images.base import PAGE, Source
from engine.trace.compressed import compression_of
from service.platform.failures import FileError, opened

_PIECE = 1 << 20
# `zstd --long=31` makes the largest window that there is.
_WINDOW = 1 << 31
# What is sent: pages of zeros cost next to nothing in this coding, and others less than on most networks.
CODING, _LEVEL = "zstd", 1


def _zstandard(file: BinaryIO) -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(file, read_across_frames=True)


def _gzip(file: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=file)


def _plain(file: BinaryIO) -> Any:
    return file


_READERS: dict[str | None, Callable[[BinaryIO], Any]] = {
    "zstd": _zstandard,
    "gzip": _gzip,
    "xz": lzma.LZMAFile,
    None: _plain,
}
_FAULTS = (zstandard.ZstdError, zlib.error, lzma.LZMAError, EOFError, OSError)


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What is in a file: its format, ranges of memory (first address, size), how many vCPUs it tells of."""

    format: str
    ranges: list[tuple[int, int]]
    vcpus: int


@contextmanager
def reading(path: Path) -> Iterator[tuple[Any, BinaryIO]]:
    """What a file has, decompressed where it begins as a compressed one, and the file itself. Raises FileError, also
    for what its compression says of it meanwhile."""
    with opened(path) as file:
        beginning = file.read(6)
        file.seek(0)
        try:
            yield _READERS[compression_of(beginning)](file), file
        except InvalidValue as error:
            raise FileError(f"{path}: {error}") from None
        except _FAULTS as error:
            raise FileError(f"{path}: cannot be read, is it complete? {error}") from None


def survey(path: Path, format: str, gpa: int | None) -> Surveyed:
    """Look through a file. Raises FileError."""
    with reading(path) as (source, _):
        seen: Source = source
        image = open_image(format, seen, gpa)
        image.survey()
        return Surveyed(image.format, image.ranges.all(), len(image.vcpus))


def coded(source: IO[bytes], advanced: Callable[[], None]) -> Iterator[bytes]:
    """What is sent of a file, in the coding ``CODING``; ``advanced`` is called now and then."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
    while piece := source.read(_PIECE):
        if coded_piece := compressor.compress(piece):
            yield coded_piece
        advanced()
    yield compressor.flush()


def slots_of(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Whole pages that hold ranges in order of their addresses, neighbours as one: first address and size of each."""
    found: list[tuple[int, int]] = []
    for gpa, size in ranges:
        begin, end = gpa // PAGE * PAGE, -(-(gpa + size) // PAGE) * PAGE
        if found and begin <= sum(found[-1]):
            begin = found.pop()[0]
        found.append((begin, end - begin))
    return found


def beside(wanted: Iterable[tuple[int, int]], known: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of some ranges is in none of others, which are in order of their addresses."""
    taken = sorted(known)
    found = []
    for gpa, size in wanted:
        at, end = gpa, gpa + size
        for begin, length in taken:
            if begin >= end:
                break
            if begin > at:
                found.append((at, begin - at))
            at = max(at, begin + length)
        if at < end:
            found.append((at, end - at))
    return found
