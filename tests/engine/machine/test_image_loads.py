"""Memory images into a machine: whole or not at all, and no frame for what is zero."""

from __future__ import annotations

from io import BytesIO

import pytest

from engine.errors import InvalidValue, LimitExceeded
from engine.images import open_image
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from tests.engine.builders import MIB, PAGE, assert_sound, machine, unchanged
from tests.support.images import lime


def load(vm: VirtualMachine, data: bytes, gpa: int | None = None) -> int:
    return vm.load_image(open_image("auto", BytesIO(data), gpa)).pages_kept


def kept(vm: VirtualMachine) -> int:
    return vm.counters()["frames_memory"]


def restored(vm: VirtualMachine) -> VirtualMachine:
    return VirtualMachine.restore(vm.head(), {(kind, block): data for kind, block, data in vm.changed_blocks()})


def test_pages_of_zeros_are_left_out_and_replace_what_was_there() -> None:
    vm = machine()
    vm.write_memory(0x1000, b"old" * 1000)
    vm.write_memory(0x9000, b"stays")
    image = b"a" * PAGE + bytes(5 * PAGE) + bytes(PAGE - 1) + b"z"
    assert load(vm, image) == 2
    assert vm.read_memory(0, len(image)) == image
    assert vm.read_memory(0x9000, 5) == b"stays"
    assert kept(vm) == 3
    assert_sound(vm)
    assert load(vm, bytes(len(image))) == 0
    assert vm.read_memory(0, len(image)) == bytes(len(image)) and kept(vm) == 1
    assert_sound(vm)


def test_bytes_beside_a_range_stay() -> None:
    vm = machine()
    vm.write_memory(0, b"x" * 4 * PAGE)
    load(vm, b"a" * 10 + bytes(PAGE) + b"b" * 5, PAGE - 10)
    assert vm.read_memory(0, 4 * PAGE) == (
        b"x" * (PAGE - 10) + b"a" * 10 + bytes(PAGE) + b"b" * 5 + b"x" * (2 * PAGE - 5)
    )
    load(vm, bytes(3), 4 * PAGE + 100)
    assert kept(vm) == 3, "bytes of zero take no page either"
    load(vm, bytes(3), 100)
    assert vm.read_memory(98, 7) == b"xx\0\0\0xx"


def test_memory_grows_with_what_is_not_zero() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 30)])
    before = vm.frames_in_use
    with_holes = bytearray(3 * MIB)
    with_holes[MIB] = with_holes[-1] = 1
    assert load(vm, bytes(with_holes), 0x1000_0000) == 2
    assert vm.frames_in_use - before <= 2 + 6
    assert vm.read_memory(0x1000_0000, len(with_holes)) == bytes(with_holes)
    again = restored(vm)
    assert again.read_memory(0x1000_0000, len(with_holes)) == bytes(with_holes)
    assert again.image_frames == vm.image_frames == vm.frames_in_use - before


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            lime((0, b"a" * PAGE), (4 * MIB - PAGE, b"b" * PAGE + b"c")),
            f"byte {32 + PAGE + 32 + PAGE} of it is for GPA 0x400000",
        ),
        (lime((0, b"a" * PAGE), (0x10000, b"b" * PAGE))[:-1], "must be complete"),
        (lime((0, b"a" * PAGE)) + lime((0, b"b")), "must not overlap"),
    ],
)
def test_what_cannot_be_loaded_whole_changes_nothing(data: bytes, says: str) -> None:
    vm = machine()
    vm.write_memory(0, b"before")
    with unchanged(vm), pytest.raises(InvalidValue, match="must") as caught:
        load(vm, data)
    assert says in str(caught.value)


def test_who_watches_it_grow_may_end_it() -> None:
    vm = machine()

    def grown(frames: int) -> None:
        assert frames > vm.frames_in_use
        raise LimitExceeded("enough", field="max_memory_bytes", value=frames)

    with unchanged(vm), pytest.raises(LimitExceeded, match="enough"):
        vm.load_image(open_image("raw", BytesIO(b"a" * PAGE)), grown)


def test_limit_on_frames_holds() -> None:
    vm = machine(max_table_frames=200)
    with unchanged(vm), pytest.raises(LimitExceeded):
        load(vm, b"a" * (300 * PAGE))


def test_frames_that_images_bring_are_counted_once() -> None:
    vm = machine()
    load(vm, b"a" * (10 * PAGE))
    brought = vm.image_frames
    assert 10 <= brought <= 16
    load(vm, b"b" * (10 * PAGE))
    assert vm.image_frames == brought, "they replace each other"


def test_dirty_logs_are_told() -> None:
    vm = machine()
    vm.set_slot(SlotSpec(0, 0, 4 * MIB, log_dirty=True))
    load(vm, bytes(2 * PAGE) + b"a", 0x3000)
    assert vm.dirty.take_log(0)[:1] == bytes([0b00111000])


def test_a_large_image_does_not_copy_the_machine_as_it_grows() -> None:
    """Rows are reserved at once, which costs nothing, and what was not needed is given back."""
    vm = machine(slots=[SlotSpec(0, 0, 1 << 30)])
    vm.write_memory(0, b"before")
    vm.bound_frames(20_000)
    data = b"a" * (3000 * PAGE)
    vm.load_image(open_image("raw", BytesIO(data), 0x100000))
    rows = vm.state.store.published.machine.rows
    assert 3000 < len(rows) < 3000 + 2 * 700, "what was reserved beyond is given back"
    assert vm.read_memory(0, 6) == b"before" and vm.read_memory(0x100000, len(data)) == data
    assert_sound(vm)
    for _ in range(5):
        vm.load_image(open_image("raw", BytesIO(b"b" * PAGE)))
    assert len(vm.state.store.published.machine.rows) < 3000 + 4 * 700
    assert vm.read_memory(0, PAGE) == b"b" * PAGE
    assert_sound(vm)
