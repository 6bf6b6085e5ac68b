"""Where an x86-64 Linux guest has its kernel: from addresses of symbols to guest-physical ones, and back.

``arch/x86/include/asm/page_64.h`` and ``Documentation/arch/x86/x86_64/mm.rst``: the kernel image is mapped from
``__START_KERNEL_map`` on, ``pa = va - __START_KERNEL_map + phys_base``; all memory from ``page_offset_base`` on. KASLR
moves the image in virtual and in physical memory by amounts that have nothing to do with each other, each a multiple
of 2 MiB; ``phys_base`` is their difference and may be negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidValue
from engine.symbols.formats import SymbolFile
from engine.symbols.table import SymbolTable

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
# Modules come behind the image: MODULES_VADDR with KASLR.
IMAGE_END = START_KERNEL_MAP + (1 << 30)
# Where it is linked unless CONFIG_PHYSICAL_START says otherwise, which no distribution's does.
LINKED_TEXT = START_KERNEL_MAP + 0x100_0000
# The direct map of a kernel without KASLR, with four levels of tables.
PAGE_OFFSET = 0xFFFF_8880_0000_0000
ALIGNMENT = 1 << 21
KERNEL_HALF = 1 << 63
# What a GPA may be at most: addresses above are virtual.
GPA_END = 1 << 52

WHAT_TO_PASS = (
    "pass phys_base (with slide, if the file has the addresses of the linked kernel): `NUMBER(phys_base)` and "
    "`KERNELOFFSET` in the guest's vmcoreinfo (QEMU: -device vmcoreinfo; crash, drgn and Volatility show both), boot "
    "the guest with nokaslr, or load its memory first so that both are found there"
)


@dataclass(frozen=True, slots=True)
class Placement:
    """``slide`` is what was added to the addresses of the file, ``phys_base`` the kernel's own (None: not known),
    ``page_offset`` where the direct map begins (None: not known); ``found_by`` says how."""

    slide: int = 0
    phys_base: int | None = None
    page_offset: int | None = None
    found_by: str = "given"

    def gpa(self, address: int) -> int | None:
        """Guest-physical address of a virtual one of the image or the direct map; None where that does not say."""
        if START_KERNEL_MAP <= address < IMAGE_END:
            if self.phys_base is None:
                return None
            found = address - START_KERNEL_MAP + self.phys_base
        elif self.page_offset is not None and 0 <= address - self.page_offset < 1 << 46:
            found = address - self.page_offset
        else:
            return None
        return found if 0 <= found < GPA_END else None

    def image_address(self, address: int) -> int:
        """The address in the image of what lies at a guest-physical or virtual one; others as they are."""
        (found,) = self.image_addresses(np.array([address], dtype=np.uint64)).tolist()
        return int(found)

    def image_addresses(self, addresses: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The same of many, uint64[n]."""
        physical = addresses < GPA_END
        gpa = addresses
        if self.page_offset is not None:
            direct = (addresses >= self.page_offset) & (addresses < self.page_offset + (1 << 46))
            physical, gpa = physical | direct, np.where(direct, addresses - np.uint64(self.page_offset), addresses)
        if self.phys_base is None:
            return addresses
        image = gpa + np.uint64((START_KERNEL_MAP - self.phys_base) % (1 << 64))
        inside = physical & (image >= START_KERNEL_MAP) & (image < IMAGE_END)
        return np.where(inside, image, addresses)


def check(slide: int | None, phys_base: int | None) -> None:
    """Refuse what no kernel has. Raises InvalidValue."""
    if slide is not None and not 0 <= slide < 1 << 30:
        raise InvalidValue(
            "must be 0 to 2^30 - 1: the kernel's image moves up within 1 GiB", field="slide", value=slide
        )
    if phys_base is not None and not -(1 << 30) <= phys_base < GPA_END:
        raise InvalidValue("must be -2^30 to 2^52 - 1", field="phys_base", value=phys_base)
    for name, value in (("slide", slide), ("phys_base", phys_base)):
        if value is not None and value % ALIGNMENT:
            raise InvalidValue(f"must be a multiple of {ALIGNMENT:#x}", field=name, value=value)


def moved_by(table: SymbolTable) -> int | None:
    """How far the file's own addresses are from where a kernel is linked; None where it is none of x86-64 Linux."""
    text = table.find("_text") or table.find("_stext")
    if not text or not START_KERNEL_MAP <= text[0].address < IMAGE_END:
        return None
    return text[0].address - LINKED_TEXT


def stated(file: SymbolFile, slide: int | None, phys_base: int | None) -> Placement:
    """What the caller and the addresses alone say; its ``phys_base`` is None where that is not enough.

    Raises InvalidValue for what cannot be, and for a slide of addresses that have it already.
    """
    check(slide, phys_base)
    moved = moved_by(file.table)
    if slide and moved and file.format == "kallsyms":
        rule = f"must be left out: a kallsyms has the addresses of the running guest, here moved by {moved:#x} already"
        raise InvalidValue(rule, field="slide", value=slide)
    if phys_base is not None:
        still = not slide and not phys_base
        return Placement(slide or 0, phys_base, PAGE_OFFSET if still else None, "given")
    if slide:
        return Placement(slide, found_by="nothing: phys_base is not given")
    if moved == 0:
        return Placement(0, 0, PAGE_OFFSET, "assumed: the kernel is where it is linked, so there is no KASLR (nokaslr)")
    if moved is None:
        return Placement(found_by="nothing: the file has no _text in a kernel image of x86-64 Linux")
    return Placement(found_by=f"nothing: the kernel is moved by {moved:#x} (KASLR), and phys_base is not given")


def phys_base_of(table: SymbolTable, cr3: int) -> int:
    """``phys_base`` of a kernel whose own tables CR3 points to: those of ``init_top_pgt``, which no process has.

    ``table`` has the addresses of the running guest. Raises InvalidValue.
    """
    found = table.find("init_top_pgt") or table.find("swapper_pg_dir") or table.find("init_level4_pgt")
    if not found:
        raise InvalidValue("needs init_top_pgt among the symbols: pass phys_base", field="cr3", value=cr3)
    base = (cr3 & ~0xFFF & GPA_END - 1) - (found[0].address - START_KERNEL_MAP)
    if base % ALIGNMENT:
        rule = f"is not that of the kernel's own {found[0].name}, but of a process perhaps: {WHAT_TO_PASS}"
        raise InvalidValue(rule, field="cr3", value=cr3)
    return base


def placed(table: SymbolTable, placement: Placement) -> SymbolTable:
    """The table with the addresses that the running guest has."""
    return table.moved(START_KERNEL_MAP, placement.slide)


def only(table: SymbolTable, name: str) -> tuple[int, int]:
    """(address, size or 0) of the one symbol of a name. Raises InvalidValue."""
    found = table.find(name)
    if not found:
        module = table.module_of(name)
        others = f"; a module has one: {module}" if module else ""
        raise InvalidValue(f"is not the name of a symbol{others}", field="symbol", value=name)
    distinct = {item.address: item for item in found}
    if len(distinct) > 1:
        places = ", ".join(f"{address:#x}" for address in list(distinct)[:4])
        more = f" and {len(distinct) - 4} more" if len(distinct) > 4 else ""
        rule = f"is the name of {len(distinct)} symbols, at {places}{more}: give the address of the one that is meant"
        raise InvalidValue(rule, field="symbol", value=name)
    return found[0].address, max(item.size for item in found)


def by_tables(placement: Placement, address: int) -> bool:
    """Whether only the guest's page tables say where an address is: modules, and what vmalloc gives."""
    in_image = START_KERNEL_MAP <= address < IMAGE_END
    return address >= KERNEL_HALF and not in_image and placement.gpa(address) is None


def located(table: SymbolTable, placement: Placement, name: str) -> tuple[int, int, int]:
    """(gva, gpa, size or 0) of the one symbol of a name. Raises InvalidValue, which says what to pass instead."""
    address, size = only(table, name)
    gpa = placement.gpa(address)
    if gpa is not None:
        return address, gpa, size
    if START_KERNEL_MAP <= address < IMAGE_END:
        rule = f"is at {address:#x}, and where the kernel lies in memory is not known: {WHAT_TO_PASS}"
    else:
        rule = f"is at {address:#x}, outside the kernel's image (a module, or per CPU): give its guest-physical address"
        if by_tables(placement, address):
            rule += ", or load the guest's memory and let the machine look (an object with `symbol`, or by `gva`)"
    raise InvalidValue(rule, field="symbol", value=name)
