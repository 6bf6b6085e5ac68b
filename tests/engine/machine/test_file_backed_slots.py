"""Slots with a file behind them: what was never written is the file's, what is written is the machine's."""

from __future__ import annotations

import gc
import os
import weakref
from io import BytesIO
from pathlib import Path

import pytest

from engine.arch import paging as guest
from engine.errors import Conflict, InvalidValue
from engine.images import open_image
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.symbols import formats
from engine.trace.single import AccessRequest
from tests.engine.builders import MIB, PAGE, READ, WRITE, Opened, assert_sound, behind, machine, unchanged
from tests.support import symbol_files
from tests.support.symbol_files import BANNER, MAP

LONG_MODE = {"cr0": 0x80050033, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
PRESENT = guest.PRESENT | guest.WRITABLE


class NotThere:
    descriptor = -1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """1 MiB, each page of which begins with its number and ends with its complement."""
    path = tmp_path / "ram"
    pages = (n.to_bytes(8, "little") + bytes(PAGE - 16) + (~n).to_bytes(8, "little", signed=True) for n in range(256))
    path.write_bytes(b"".join(pages))
    return path


def backed(path: Path, offset: int = 0, size: int = MIB, gpa: int = 0, slot: int = 0) -> SlotSpec:
    return SlotSpec(slot, gpa, size, backing=behind(path, offset))


def restored(vm: VirtualMachine) -> VirtualMachine:
    blocks = {(kind, block): data for kind, block, data in vm.changed_blocks()}
    return VirtualMachine.restore(vm.head(), blocks, lambda known: Opened(Path(known.path)))


def kept(vm: VirtualMachine) -> int:
    return vm.counters()["frames_memory"]


def test_what_was_never_written_is_the_files(file: Path) -> None:
    vm = machine(slots=[backed(file, offset=0x10000, size=0x20000, gpa=0x100000), SlotSpec(1, 0, 0x10000)])
    data = file.read_bytes()
    assert vm.read_memory(0x100000, 0x20000) == data[0x10000:0x30000]
    assert vm.read_memory(0x101FF9, 20) == data[0x11FF9 : 0x11FF9 + 20], "over two pages"
    assert vm.read_memory(0, 0x10000) == bytes(0x10000), "other slots are zero"
    assert kept(vm) == 0, "reading keeps nothing"


def test_what_is_written_is_the_machines_alone(file: Path) -> None:
    vm, before = machine(slots=[backed(file)]), file.read_bytes()
    vm.write_memory(0x3FFE, b"four")
    expected = bytearray(before)
    expected[0x3FFE:0x4002] = b"four"
    assert vm.read_memory(0, MIB) == expected
    assert kept(vm) == 2 and file.read_bytes() == before
    assert_sound(vm)
    vm.write_memory(0x8000, bytes(PAGE))
    assert vm.read_memory(0x8000, PAGE) == bytes(PAGE), "zeros are written, too"


def test_a_file_is_read_as_it_is_now(file: Path) -> None:
    vm = machine(slots=[backed(file)])
    vm.write_memory(0x5000, b"ours")
    with file.open("r+b") as stream:
        for at in (0x5000, 0x6000):
            stream.seek(at)
            stream.write(b"theirs")
    assert vm.read_memory(0x6000, 6) == b"theirs"
    assert vm.read_memory(0x5000, 6) == b"ours\0\0", "a page that was written is the machine's from then on"


def test_images_go_over_the_file(file: Path) -> None:
    vm = machine(slots=[backed(file)])
    image = b"a" * PAGE + bytes(PAGE) + bytes(10)
    vm.load_image(open_image("raw", BytesIO(image), 0x7000))
    assert vm.read_memory(0x7000, len(image)) == image, "pages and bytes of zeros, too"
    assert vm.read_memory(0x9000 + 10, PAGE - 10) == file.read_bytes()[0x9000 + 10 : 0xA000]


def test_a_slot_moves_with_its_file_and_forgets_what_was_written_when_it_goes(file: Path) -> None:
    spec = backed(file)
    vm, data = machine(slots=[spec]), file.read_bytes()
    vm.write_memory(0, b"ours")
    vm.set_slot(SlotSpec(0, 16 * MIB, MIB, backing=spec.backing))
    assert vm.read_memory(16 * MIB, MIB) == b"ours" + data[4:]
    vm.delete_slot(0)
    assert kept(vm) == 0
    vm.set_slot(spec)
    assert vm.read_memory(0, MIB) == data
    assert_sound(vm)


def test_a_slot_keeps_its_file(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    vm = machine(slots=[backed(file), SlotSpec(1, MIB, MIB)])
    for spec in (backed(other), backed(file, size=MIB // 2, offset=MIB // 2), SlotSpec(0, 0, MIB)):
        with unchanged(vm), pytest.raises(InvalidValue, match="keeps"):
            vm.set_slot(spec)
    with unchanged(vm), pytest.raises(InvalidValue, match="keeps the file behind it"):
        vm.set_slot(backed(file, gpa=MIB, slot=1))


@pytest.mark.parametrize(
    ("offset", "size", "says"),
    [(0x800, PAGE, "multiple of 4096"), (-PAGE, PAGE, "multiple"), (MIB, PAGE, "0x101000"), (PAGE, MIB, "0x101000")],
)
def test_a_file_has_every_byte_of_its_slot(file: Path, offset: int, size: int, says: str) -> None:
    vm = machine(slots=[])
    with unchanged(vm), pytest.raises(InvalidValue, match=says):
        vm.set_slot(backed(file, offset, size))


def test_page_tables_in_the_file_are_walked(file: Path) -> None:
    """Four levels at 0x1000 on; linear 0x7000 leads to 0x9000. The walk marks what it used, in the machine's pages."""
    with file.open("r+b") as stream:
        for table, index, entry in ((1, 0, 0x2000), (2, 0, 0x3000), (3, 0, 0x4000), (4, 7, 0x9000)):
            stream.seek(table * PAGE + index * 8)
            stream.write((entry | PRESENT).to_bytes(8, "little"))
    vm, before = machine(slots=[backed(file)]), file.read_bytes()
    vm.vcpus.set_vmcs(0, LONG_MODE)
    read = vm.access(AccessRequest(None, 8, READ, gva=0x7FF8))
    assert read.data == before[0x9FF8:0xA000]
    assert kept(vm) == 4, "the tables got their accessed flags"
    vm.access(AccessRequest(None, 8, WRITE, gva=0x7000, data=b"written!"))
    assert vm.read_memory(0x9000, PAGE) == b"written!" + before[0x9008:0xA000]
    assert vm.read_memory(0x4000, PAGE)[64:] == before[0x4040:0x5000], "beside its entry a table is the file's"
    assert file.read_bytes() == before
    assert_sound(vm)


def test_a_file_that_became_shorter_is_an_error(file: Path) -> None:
    vm = machine(slots=[backed(file)])
    vm.write_memory(0xF0000, b"ours")
    vm.vcpus.set_vmcs(0, {**LONG_MODE, "cr3": 0x90000})
    os.truncate(file, 0x80800)
    with unchanged(vm):
        for gpa, size in ((0x90000, 8), (0x80000, PAGE), (0xEFFFF, 2)):
            with pytest.raises(Conflict, match="must be in the file behind its memory slot") as caught:
                vm.read_memory(gpa, size)
            assert caught.value.value == gpa & ~0xFFF
        with pytest.raises(Conflict, match="must be in the file"):
            vm.write_memory(0x80000, b"one page cannot be copied")
        with pytest.raises(Conflict, match="must be in the file"):
            vm.access(AccessRequest(None, 8, READ, gva=0x7000))
    assert vm.read_memory(0x80000, 0x800) == file.read_bytes()[0x80000:]
    assert vm.read_memory(0xF0000, 4) == b"ours"
    os.truncate(file, MIB)
    assert vm.read_memory(0x90000, 8) == bytes(8), "and none any more once it is as long as before"


def test_a_file_that_is_not_there_when_the_machine_comes_back(file: Path) -> None:
    vm = machine(slots=[backed(file)])
    vm.write_memory(0, b"ours")
    blocks = {(kind, block): data for kind, block, data in vm.changed_blocks()}
    again = VirtualMachine.restore(vm.head(), blocks, lambda known: NotThere())
    assert again.slots() == vm.slots()
    assert again.read_memory(0, 4) == b"ours"
    with pytest.raises(Conflict, match="PUT the slot again"):
        again.read_memory(0x2000, 4)
    again.set_slot(backed(file))
    assert again.read_memory(0x2000, 8) == (2).to_bytes(8, "little")


def test_the_durable_form_says_where_the_bytes_are(file: Path) -> None:
    vm = machine(slots=[backed(file, offset=PAGE, size=MIB - PAGE), SlotSpec(1, MIB, MIB)])
    assert vm.head()["slots"][0][8:] == [[str(file), PAGE, MIB, file.stat().st_mtime_ns]]
    assert len(vm.head()["slots"][1]) == 8, "earlier releases read machines that have none"
    vm.write_memory(0x1000, b"ours")
    again = restored(vm)
    assert again.head() == vm.head() and again.slots() == vm.slots()
    assert again.read_memory(0, MIB - PAGE) == vm.read_memory(0, MIB - PAGE)


@pytest.mark.parametrize(
    "row",
    [[1, 0, 0, 0], ["x", "0", 0, 0], ["x", 0, 0], ["x" * 5000, 0, 0, 0], ["x", 1 << 70, 0, 0], ["x", -4096, 0, 0]],
)
def test_hostile_heads_are_refused(row: list[object]) -> None:
    vm = machine()
    head = vm.head()
    head["slots"][0].append(row)
    blocks = {(kind, block): data for kind, block, data in vm.changed_blocks()}
    with pytest.raises(InvalidValue, match="file behind a slot"):
        VirtualMachine.restore(head, blocks)


def test_a_file_is_closed_when_nobody_can_read_it_any_more(file: Path) -> None:
    spec = backed(file)
    assert spec.backing is not None
    opened = weakref.ref(spec.backing.opened)
    vm = machine(slots=[spec])
    earlier = vm.state.current.snapshot.machine
    del spec
    vm.set_slot(SlotSpec(1, 16 * MIB, MIB))
    vm.delete_slot(0)
    gc.collect()
    assert opened() is not None, "a reader of an earlier state still has it"
    del earlier
    vm.set_slot(SlotSpec(2, 32 * MIB, MIB))
    gc.collect()
    assert opened() is None


def test_a_kernel_is_found_in_a_file(tmp_path: Path) -> None:
    slide, physical = 0x1A000000, 0x3000000
    path = tmp_path / "guest"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
        words = {"phys_base": (physical - slide) % (1 << 64), "page_offset_base": 0xFFFF9A4D40000000}
        data = {"linux_banner": BANNER, **{name: word.to_bytes(8, "little") for name, word in words.items()}}
        for address, _, name, _ in symbol_files.KERNEL:
            if name in data:
                stream.seek(0x10000000 + address - MAP + physical)
                stream.write(data[name])
    vm = machine(slots=[backed(path, offset=0x10000000, size=512 * MIB)])
    found = vm.symbols.load(formats.read(symbol_files.elf(), "elf"))
    assert (found.placement.slide, found.placement.phys_base) == (slide, physical - slide)
    assert kept(vm) == 0


def test_attaching_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate(64 << 30)
        stream.seek((64 << 30) - 3)
        stream.write(b"end")
    vm = machine(slots=[])
    before = vm.frames_in_use
    vm.set_slot(backed(path, size=64 << 30))
    assert vm.frames_in_use == before
    assert vm.read_memory((64 << 30) - 4, 4) == b"\0end"
    assert path.stat().st_blocks * 512 < MIB
