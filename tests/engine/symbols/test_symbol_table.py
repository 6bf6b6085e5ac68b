"""Looking symbols up: by name, by address, and in guest-physical memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidValue
from engine.symbols import formats, placement, stored
from engine.symbols.placement import Placement, by_tables, located, placed, stated
from engine.symbols.table import each, table_of
from tests.support import symbol_files

KALLSYMS = formats.read(symbol_files.kallsyms())
TABLE = KALLSYMS.table
MODPROBE = 0xFFFFFFFF82A5C6A0


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (MODPROBE, "modprobe_path"),
        (MODPROBE + 0x10, "modprobe_path+0x10"),
        (MODPROBE + 255, "modprobe_path+0xff"),
        (MODPROBE + 256, "poweroff_cmd"),
        (0xFFFFFFFF81000000, "startup_64"),  # begins with fewer underscores than _text
        (0xFFFFFFFFC0201000, "e1000_probe [e1000]"),
        (0xFFFFFFFFC0201001, None),
        (0, None),
        ((1 << 64) - 1, None),
    ],
)
def test_an_address_has_the_name_of_what_it_lies_in(address: int, told: str | None) -> None:
    assert TABLE.label(address) == told


def test_an_offset_into_a_module_comes_before_its_name() -> None:
    table = formats.read(b"ffffffffc0201000 t probe\t[e1000]\nffffffffc0202000 t next\t[e1000]\n").table
    assert table.label(0xFFFFFFFFC0201010) == "probe+0x10 [e1000]"


def test_beyond_a_size_of_the_file_there_is_no_name() -> None:
    table = formats.read(symbol_files.elf()).table
    assert table.label(0xFFFFFFFF82A1A010 + 7) == "phys_base+0x7"
    assert table.label(0xFFFFFFFF82001180 + 0x80) is None


def test_every_symbol_of_a_name_is_found() -> None:
    assert [item.address for item in TABLE.find("twice")] == [0xFFFFFFFF82C00000, 0xFFFFFFFF82C00010]
    assert TABLE.find("e1000_probe") == []
    assert TABLE.find("") == TABLE.find("\ud800") == []


@settings(deadline=None)  # machines that are busy
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("abcdef"), st.integers(0, 5)), min_size=1, max_size=12))
def test_lookups_agree_with_a_plain_search(rows: list[tuple[int, str, int]]) -> None:
    table = table_of([name.encode() for _, name, _ in rows], [at for at, _, _ in rows], [size for _, _, size in rows])
    symbols = list(each(table))
    assert sorted((item.address, item.name) for item in symbols) == sorted((at, name) for at, name, _ in rows)
    for name in "abcdefg":
        assert [item.address for item in table.find(name)] == sorted(at for at, other, _ in rows if other == name)
    addresses = np.arange(50, dtype=np.uint64)
    where, texts = table.labels(addresses)
    for address in range(50):
        below = [item for item in symbols if item.address <= address]
        nearest = next((item for item in below if item.address == below[-1].address), None)
        inside = nearest is not None and address - nearest.address < max(nearest.size, 1)
        told = (
            nearest.name + (f"+{address - nearest.address:#x}" if address > nearest.address else "") if inside else ""
        )
        assert texts[where[address]] == told
        assert (table.label(address) or "") == told


def test_the_kept_bytes_say_the_same() -> None:
    symbols = stored.Symbols("kallsyms", TABLE, Placement(0, -0x200000, None, "given"))
    again = stored.unpacked(stored.packed(symbols))
    assert list(each(again.table)) == list(each(TABLE))
    assert again.placement == symbols.placement and again.table.find("twice") == TABLE.find("twice")


def test_a_kernel_where_it_is_linked_is_where_its_addresses_say() -> None:
    found = stated(KALLSYMS, None, None)
    assert (found.slide, found.phys_base, found.found_by.split(":")[0]) == (0, 0, "assumed")
    assert located(TABLE, found, "modprobe_path") == (MODPROBE, 0x2A5C6A0, 256)
    assert found.gpa(0xFFFF888000001000) == 0x1000  # the direct map
    assert found.image_address(0x2A5C6B0) == found.image_address(0xFFFF888002A5C6B0) == MODPROBE + 0x10


def test_what_only_tables_say_is_neither_image_nor_direct_map() -> None:
    still = Placement(0, 0, 0xFFFF888000000000, "given")
    assert by_tables(still, 0xFFFFFFFFC0201000) and by_tables(still, 0xFFFFC90000000000)  # a module, vmalloc
    assert not by_tables(still, MODPROBE) and not by_tables(still, 0xFFFF888000001000)
    assert not by_tables(Placement(), MODPROBE)  # phys_base is what is missing
    assert not by_tables(still, 0x1F000)  # an offset into memory per CPU


def test_a_name_that_modules_alone_have() -> None:
    table = formats.read(b"ffffffffc0001000 t one_a [b]\nffffffffc0002000 t a [b]\nffffffffc0003000 t a [c]\n").table
    assert [table.module_of(name) for name in ("a", "one_a", "one", "b")] == ["a [b]", "one_a [b]", None, None]


def test_slide_and_phys_base_move_the_image_apart() -> None:
    file = formats.read(symbol_files.elf(), "elf")
    found = stated(file, 0x1A000000, -0x19000000)
    table = placed(file.table, found)
    assert located(table, found, "modprobe_path") == (MODPROBE + 0x1A000000, 0x3A5C6A0, 256)
    assert table.find("cpu_info")[0].address == 0x1F000  # an offset into memory per CPU: it does not move
    assert found.gpa(0xFFFF888000001000) is None
    assert found.image_address(0x3A5C6A0) == MODPROBE + 0x1A000000


@pytest.mark.parametrize(
    ("data", "slide", "told"),
    [
        (symbol_files.kallsyms(slide=0x1A000000), None, "moved by 0x1a000000 (KASLR)"),
        (symbol_files.elf(), 0x1A000000, "phys_base is not given"),
        (b"0000000000401000 T main\n", None, "no _text"),
    ],
)
def test_what_is_not_known_is_said_and_what_to_pass(data: bytes, slide: int | None, told: str) -> None:
    file = formats.read(data)
    found = stated(file, slide, None)
    assert found.phys_base is None and told in found.found_by
    if slide or b"modprobe" in data:
        with pytest.raises(InvalidValue, match="pass phys_base"):
            located(placed(file.table, found), found, "modprobe_path")


@pytest.mark.parametrize(
    ("slide", "phys_base", "field"),
    [
        (0x1000, None, "slide"), (1 << 30, 0, "slide"), (-0x200000, 0, "slide"),
        (None, 0x1000, "phys_base"), (None, 1 << 52, "phys_base"), (None, -(1 << 31), "phys_base"),
    ],
)  # fmt: skip
def test_what_no_kernel_has_is_refused(slide: int | None, phys_base: int | None, field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        stated(KALLSYMS, slide, phys_base)
    assert caught.value.field == field


def test_a_slide_is_not_added_twice() -> None:
    with pytest.raises(InvalidValue, match="must be left out"):
        stated(formats.read(symbol_files.kallsyms(slide=0x1A000000)), 0x1A000000, 0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "is not the name"),
        ("twice", "is the name of 2 symbols, at 0xffffffff82c00000, 0xffffffff82c00010"),
        ("cpu_info", "outside the kernel's image"),
        ("e1000_probe [e1000]", "outside the kernel's image"),
    ],
)
def test_a_name_without_one_place_is_refused(name: str, told: str) -> None:
    with pytest.raises(InvalidValue, match=r"symbol|kernel") as caught:
        located(TABLE, stated(KALLSYMS, None, None), name)
    assert told in caught.value.rule


def test_modules_lie_behind_the_image() -> None:
    assert placement.IMAGE_END == 0xFFFFFFFFC0000000
