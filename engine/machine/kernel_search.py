"""Where the kernel of a guest lies, found in its memory by the symbols of the kernel.

``linux_banner`` (init/version.c) is a text that begins with "Linux version ". KASLR moves the image by multiples of
2 MiB, so only one page in 512 can hold it. Where it lies says where everything else of the image does; the kernel's own
variable ``phys_base`` then says how much of that the virtual addresses moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from engine.cpu.frames import FRAME_SIZE, Machine
from engine.cpu.guest_memory import locate
from engine.cpu.memory_files import NO_FILE
from engine.cpu.memory_slots import SLOT_FILE, SLOT_GFN, SLOT_PAGES, SMM_PAGE
from engine.errors import InvalidValue
from engine.kvm.page_contents import read_bytes, stored_pages
from engine.symbols.formats import SymbolFile
from engine.symbols.placement import (
    ALIGNMENT,
    GPA_END,
    IMAGE_END,
    PAGE_OFFSET,
    START_KERNEL_MAP,
    WHAT_TO_PASS,
    Placement,
    moved_by,
)
from engine.symbols.table import SymbolTable

_BANNER = b"Linux version "
_PAGES_AT_ONCE = 1024
# How much of the memory is looked through for the banner of another kernel, in pages; and how many pages of files for
# that of this one, which may be in one of 512.
_LOOKED_THROUGH = 1 << 18


@dataclass(frozen=True, slots=True)
class _Found:
    shift: int
    slide: int
    confirmed: bool


def find(m: Machine, file: SymbolFile) -> Placement | None:
    """Where the memory says that the kernel is; None where it holds none, or the file cannot tell.

    Raises InvalidValue where it holds another kernel than the symbols are of, or this one more than once.
    """
    banner = _linked(file.table, "linux_banner")
    if banner is None:
        return None
    found = [item for shift in _shifts(m, banner) if (item := _confirmed(m, file, banner, shift)) is not None]
    found = [item for item in found if item.confirmed] or found
    if not found:
        _check_other(m, banner)
        return None
    if len(found) > 1:
        places = ", ".join(f"{banner - START_KERNEL_MAP + item.shift:#x}" for item in found[:4])
        rule = (
            f"the kernel of these symbols is {len(found)} times in memory, its linux_banner at {places}: {WHAT_TO_PASS}"
        )
        raise InvalidValue(rule, field="phys_base")
    return _placement(m, file, banner, found[0])


def _placement(m: Machine, file: SymbolFile, banner: int, found: _Found) -> Placement:
    told = f"memory: linux_banner at {banner - START_KERNEL_MAP + found.shift:#x}"
    if found.confirmed:
        told += " and phys_base"
    elif not _running(file):
        told += "; the slide is not known, and virtual addresses are those of the linked kernel"
    phys_base = found.shift - found.slide
    still = found.shift == 0 and found.slide == 0
    offset = _word(m, file.table, "page_offset_base", found.shift)
    known = offset is not None and offset >= 1 << 63 and offset < START_KERNEL_MAP and not offset % (1 << 30)
    return Placement(found.slide, phys_base, offset if known else PAGE_OFFSET if still else None, told)


def _shifts(m: Machine, banner: int) -> Iterator[int]:
    """By how much the banner is off in memory, for each place where it can be and is."""
    linked = banner - START_KERNEL_MAP
    gfns, rows = stored_pages(m)
    aligned = ((gfns << 12) - (linked & ~(FRAME_SIZE - 1))) % ALIGNMENT == 0
    aligned &= gfns < GPA_END >> 12
    offset = linked % FRAME_SIZE
    first = _BANNER[: FRAME_SIZE - offset]
    begin = np.frombuffer(first, dtype=np.uint8)
    for start in range(0, int(aligned.sum()), _PAGES_AT_ONCE):
        part = slice(start, start + _PAGES_AT_ONCE)
        content = m.rows[rows[aligned][part]].view(np.uint8)[:, offset : offset + len(begin)]
        for gfn in gfns[aligned][part][(content == begin).all(axis=1)].tolist():
            yield (gfn << 12) + offset - linked
    for gfn in islice(_pages_of_files(m, linked >> 12), _LOOKED_THROUGH):
        if read_bytes(m, (gfn << 12) + offset, len(first)) == first:
            yield (gfn << 12) + offset - linked


def _pages_of_files(m: Machine, linked: int) -> Iterator[int]:
    """Of the pages that files behind slots have, those where page ``linked`` of the image can be."""
    step = ALIGNMENT // FRAME_SIZE
    for slot in m.slots[(m.slots[:, SLOT_FILE] != NO_FILE) & (m.slots[:, SLOT_GFN] < SMM_PAGE)]:
        start, end = int(slot[SLOT_GFN]), int(slot[SLOT_GFN] + slot[SLOT_PAGES])
        for gfn in range(start + (linked - start) % step, end, step):
            if locate(m, gfn)[0] < 0:
                yield gfn


def _confirmed(m: Machine, file: SymbolFile, banner: int, shift: int) -> _Found | None:
    """What a place of the banner means, None if it is none."""
    text = file.banner or _BANNER
    if read_bytes(m, banner - START_KERNEL_MAP + shift, len(text)) != text:
        return None
    said = _word(m, file.table, "phys_base", shift)
    if said is not None:
        slide = shift - (said - (1 << 64) if said >= 1 << 63 else said)
        fits = slide == 0 if _running(file) else 0 <= slide < 1 << 30 and slide % ALIGNMENT == 0
        if fits:
            return _Found(shift, slide, confirmed=True)
    return _Found(shift, 0, confirmed=False)


def _running(file: SymbolFile) -> bool:
    """Whether the addresses are those of a running guest that has moved."""
    return file.format == "kallsyms" and bool(moved_by(file.table))


def _word(m: Machine, table: SymbolTable, name: str, shift: int) -> int | None:
    """The 64-bit variable of a name, None where the memory does not have it."""
    address = _linked(table, name)
    if address is None or not 0 <= (gpa := address - START_KERNEL_MAP + shift) < GPA_END:
        return None
    row, file, _ = locate(m, gpa >> 12)
    return int.from_bytes(read_bytes(m, gpa, 8), "little") if row >= 0 or file != NO_FILE else None


def _linked(table: SymbolTable, name: str) -> int | None:
    """Address of a symbol of the image."""
    found = [item.address for item in table.find(name) if START_KERNEL_MAP <= item.address < IMAGE_END]
    return found[0] if found else None


def _check_other(m: Machine, banner: int) -> None:
    """Raise InvalidValue if the memory has a banner where these symbols have none."""
    gfns, rows = stored_pages(m)
    for start in range(0, min(len(rows), _LOOKED_THROUGH), _PAGES_AT_ONCE):
        content = m.rows[rows[start : start + _PAGES_AT_ONCE]].tobytes()
        at = content.find(_BANNER)
        if at >= 0:
            gpa = (int(gfns[start + at // FRAME_SIZE]) << 12) + at % FRAME_SIZE
            text = content[at : at + 60].split(b"\n")[0].split(b"\0")[0].decode(errors="replace")
            rule = (
                f'these symbols are of another kernel than the one in memory: "{text}" is at {gpa:#x}, where '
                f"linux_banner, at {banner:#x}, cannot be; take the symbols of that kernel, or pass slide and phys_base"
            )
            raise InvalidValue(rule, field="body")
