"""Symbols that a machine keeps, and its kernel found in its memory."""

from __future__ import annotations

import random

import pytest

from engine.errors import InvalidValue, LimitExceeded, NotFound
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.symbols import formats
from engine.symbols.placement import located
from engine.symbols.table import each
from tests.engine.builders import MIB, machine
from tests.support import symbol_files
from tests.support.symbol_files import BANNER, MAP

KERNEL = {name: address for address, _, name, _ in symbol_files.KERNEL}
LINKED = formats.read(symbol_files.elf(), "elf")
SLIDE, PHYSICAL = 0x1A000000, 0x3000000  # how far KASLR moves the image: in virtual memory, in physical memory
ISF_ROWS = [row for row in symbol_files.KERNEL if row[2] != "twice"]


def guest(
    *, slide: int = SLIDE, physical: int = PHYSICAL, banner: bytes = BANNER, phys_base: bool = True
) -> VirtualMachine:
    """A machine with what of a kernel is looked for in memory."""
    vm = machine(slots=[SlotSpec(0, 0, 128 * MIB)])
    put(vm, "linux_banner", BANNER, physical)
    if phys_base:
        put(vm, "phys_base", ((physical - slide) % (1 << 64)).to_bytes(8, "little"), physical)
        put(vm, "page_offset_base", (0xFFFF9A4D40000000).to_bytes(8, "little"), physical)
    return vm


def put(vm: VirtualMachine, name: str, data: bytes, physical: int) -> None:
    vm.write_memory(KERNEL[name] - MAP + physical, data)


def test_symbols_are_kept_with_the_machine() -> None:
    vm = machine()
    file = formats.read(symbol_files.kallsyms())
    assert vm.symbols.all() is None and not vm.symbols.loaded
    vm.symbols.load(file)
    again = VirtualMachine.restore(vm.head(), {(a, b): data for a, b, data in vm.changed_blocks()})
    kept = again.symbols.all()
    assert kept is not None and list(each(kept.table)) == list(each(file.table))
    assert vm.counters()["frames_symbols"] == again.counters()["frames_symbols"] > 0


def test_loading_again_replaces_and_dropping_frees() -> None:
    vm = machine()
    before = vm.frames_in_use
    rows = [(MAP + 0x1000000 + 16 * i, "D", f"symbol_of_some_length_{i}", 8) for i in range(60_000)]
    vm.symbols.load(formats.read(symbol_files.elf(rows)))
    large = vm.frames_in_use
    assert large > before + 511  # more than one index lists
    vm.symbols.load(LINKED)
    assert before < vm.frames_in_use < large
    (found,) = vm.symbols.all().table.find("modprobe_path")  # type: ignore[union-attr]
    assert found.address == KERNEL["modprobe_path"]
    vm.symbols.drop()
    assert vm.frames_in_use == before and vm.symbols.all() is None
    with pytest.raises(NotFound):
        vm.symbols.drop()


def test_what_a_machine_has_no_room_for_is_refused_and_changes_nothing() -> None:
    vm = machine()
    vm.symbols.load(LINKED)
    vm.bound_frames(vm.frames_in_use + 2)
    rows = [(MAP + 0x1000000 + 16 * i, "D", f"symbol_of_some_length_{i}", 8) for i in range(2000)]
    with pytest.raises(LimitExceeded):
        vm.symbols.load(formats.read(symbol_files.elf(rows)))
    assert len(vm.symbols.all().table) == len(LINKED.table)  # type: ignore[union-attr, arg-type]


def test_the_kernel_is_found_in_memory() -> None:
    vm = guest()
    symbols = vm.symbols.load(LINKED)
    place = symbols.placement
    assert (place.slide, place.phys_base, place.page_offset) == (SLIDE, PHYSICAL - SLIDE, 0xFFFF9A4D40000000)
    at = KERNEL["linux_banner"] - MAP + PHYSICAL
    assert place.found_by == f"memory: linux_banner at {at:#x} and phys_base"
    address = KERNEL["modprobe_path"]
    assert located(symbols.table, place, "modprobe_path") == (address + SLIDE, address - MAP + PHYSICAL, 256)


@pytest.mark.parametrize("seed", range(8))
def test_any_slide_is_found(seed: int) -> None:
    chance = random.Random(seed)
    slide, physical = chance.randrange(512) << 21, chance.randrange(16) << 21
    for file in (LINKED, formats.read(symbol_files.kallsyms(slide=slide))):
        running = file is not LINKED
        place = guest(slide=slide, physical=physical).symbols.load(file).placement
        assert (place.slide, place.phys_base) == (0 if running else slide, physical - slide)


def test_a_kallsyms_of_the_guest_needs_the_banner_alone() -> None:
    symbols = guest(phys_base=False).symbols.load(formats.read(symbol_files.kallsyms(slide=SLIDE)))
    assert (symbols.placement.slide, symbols.placement.phys_base) == (0, PHYSICAL - SLIDE)
    assert located(symbols.table, symbols.placement, "modprobe_path")[1] == KERNEL["modprobe_path"] - MAP + PHYSICAL


def test_without_phys_base_the_physical_place_is_known_all_the_same() -> None:
    symbols = guest(phys_base=False).symbols.load(LINKED)
    assert "the slide is not known" in symbols.placement.found_by
    assert located(symbols.table, symbols.placement, "modprobe_path")[1] == KERNEL["modprobe_path"] - MAP + PHYSICAL


def test_the_log_of_the_kernel_is_not_its_banner() -> None:
    vm = guest()
    put(vm, "linux_banner", BANNER, 0x5000000)  # a copy where the image could be, too
    assert vm.symbols.load(LINKED).placement.slide == SLIDE


def test_a_banner_across_two_pages_is_found() -> None:
    rows = [
        (a + 0xE78 if name == "linux_banner" else a, kind, name, size) for a, kind, name, size in symbol_files.KERNEL
    ]
    vm = guest()
    put(vm, "linux_banner", bytes(len(BANNER)), PHYSICAL)
    vm.write_memory(KERNEL["linux_banner"] + 0xE78 - MAP + PHYSICAL, BANNER)
    assert (KERNEL["linux_banner"] + 0xE78) % 4096 == 0xFF8
    assert vm.symbols.load(formats.read(symbol_files.elf(rows))).placement.slide == SLIDE


def test_symbols_of_another_kernel_are_refused() -> None:
    vm = guest()
    isf = formats.read(symbol_files.isf(ISF_ROWS, BANNER.replace(b"6.1", b"6.2")))
    with pytest.raises(InvalidValue, match="another kernel") as caught:
        vm.symbols.load(isf)
    assert "Linux version 6.1.0-9-amd64" in caught.value.rule
    assert vm.symbols.all() is None
    assert vm.symbols.load(formats.read(symbol_files.isf(ISF_ROWS, BANNER))).placement.slide == SLIDE


def test_two_kernels_of_one_make_are_not_chosen_between() -> None:
    vm = guest(phys_base=False)
    put(vm, "linux_banner", BANNER, 0x5000000)
    with pytest.raises(InvalidValue, match="2 times in memory"):
        vm.symbols.load(LINKED)


def test_what_is_given_is_not_looked_for() -> None:
    place = guest().symbols.load(LINKED, slide=0, phys_base=0).placement
    assert (place.slide, place.phys_base, place.found_by) == (0, 0, "given")


def test_an_empty_memory_leaves_what_the_addresses_say() -> None:
    assert machine().symbols.load(LINKED).placement.found_by.startswith("assumed")
    moved = machine().symbols.load(formats.read(symbol_files.kallsyms(slide=SLIDE))).placement
    assert moved.phys_base is None and "KASLR" in moved.found_by
