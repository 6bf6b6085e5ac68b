"""Make a core of QEMU's ``dump-guest-memory`` small enough to keep: ``python -m tests.guest.smaller IN OUT GPA…``.

All but some pages become zeros: those named, those with the text of ``linux_banner``, and the tables that translate the
kernel's half of the address space. What is left is byte for byte where it was.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PAGE = 1 << 12
_PRESENT, _LARGE = 1, 1 << 7
_FRAME = (1 << 52) - PAGE
_BANNER = b"Linux version "
# Of QEMU's note: CR3 is behind 18 registers, ten segments of 24 bytes, CR0 to CR2 and eight bytes of version and size.
_CR3 = 8 + 18 * 8 + 10 * 24 + 3 * 8


def loads(core: bytes) -> dict[int, tuple[int, int]]:
    """Of an ELF core of 64 bits: GPA of each range of memory, its offset in the file and its size."""
    (table,) = struct.unpack_from("<Q", core, 32)
    (count,) = struct.unpack_from("<H", core, 56)
    rows = (struct.unpack_from("<II6Q", core, table + 56 * n) for n in range(count))
    return {row[4]: (row[2], row[5]) for row in rows if row[0] == 1}


def cr3_of(core: bytes) -> int:
    """That of the first vCPU, from the note of the name QEMU."""
    name = core.index(b"QEMU\0\0\0\0")
    return int(struct.unpack_from("<Q", core, name + 8 + _CR3)[0]) & _FRAME


def tables(core: bytes, ranges: Mapping[int, tuple[int, int]], table: int, level: int = 4) -> Iterator[int]:
    """The GPAs of the tables that translate the upper half, from that of the highest one."""
    at = place(ranges, table)
    if at is None:
        return
    yield table
    for slot in range(256 if level == 4 else 0, 512):
        (entry,) = struct.unpack_from("<Q", core, at + 8 * slot)
        if entry & _PRESENT and level > 1 and not (level < 4 and entry & _LARGE):
            yield from tables(core, ranges, entry & _FRAME, level - 1)


def place(ranges: Mapping[int, tuple[int, int]], gpa: int) -> int | None:
    """Where in the file a page is; None if it is not."""
    return next((at + gpa - first for first, (at, size) in ranges.items() if first <= gpa < first + size), None)


def smaller(core: bytes, wanted: set[int]) -> bytes:
    """The core with zeros in place of all other pages."""
    ranges = loads(core)
    keep = {place(ranges, gpa // PAGE * PAGE) for gpa in wanted}
    keep |= {place(ranges, table) for table in tables(core, ranges, cr3_of(core))}
    made = bytearray(len(core))
    first = min(at for at, _ in ranges.values())
    made[:first] = core[:first]
    for begin, size in ranges.values():
        for at in range(begin, begin + size, PAGE):
            page = core[at : at + PAGE]
            if at in keep or _BANNER in page:
                made[at : at + PAGE] = page
    return bytes(made)


def main() -> None:
    source, target, *pages = sys.argv[1:]
    made = smaller(Path(source).read_bytes(), {int(text, 0) for text in pages})
    Path(target).write_bytes(made)
    kept = sum(any(made[at : at + PAGE]) for at in range(0, len(made), PAGE))
    sys.stdout.write(f"{target}: {kept} pages are not zero\n")


if __name__ == "__main__":
    main()
