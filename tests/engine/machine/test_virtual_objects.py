"""Objects by linear address: split by frame, kept with both addresses, followed when the guest moves them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch import controls as ctl
from engine.cpu.frames import FIRST_VCPU_FRAME, write_word
from engine.errors import EngineError, InvalidValue, LimitExceeded
from engine.kvm.protections import MAX_OBJECTS, ProtectedObject, VirtualObject
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from tests.engine import builders as b
from tests.support.guest_pages import MODES, GuestPages, K, M

AT = 0xC100_0000
# Two neighbours, then a frame before them, then a large page.
FRAMES = (16 * M, 16 * M + 4 * K, 12 * M)


def guest(mode: str = "4-level", **config: Any) -> tuple[VirtualMachine, GuestPages]:
    vm, pages = b.machine(slots=(SlotSpec(0, 0, 64 * M),), **config), GuestPages(MODES[mode], 2 * M)
    for page, gpa in enumerate(FRAMES):
        pages.map(AT + page * 4 * K, gpa)
    pages.map(AT + 4 * M, 32 * M, 2)
    load(vm, pages)
    return vm, pages


def load(vm: VirtualMachine, pages: GuestPages) -> None:
    pages.store(vm.write_memory)
    b.edit(vm, pages.load)


def places(objects: Any) -> list[tuple[int, int | None, int]]:
    return [(item.gpa, item.gva, item.size) for item in objects]


@pytest.mark.parametrize("mode", MODES)
def test_split_where_frames_are_no_neighbours(mode: str) -> None:
    vm, _ = guest(mode)
    found = vm.protect("p", [VirtualObject("o", AT + 0xF00, 0x1200), VirtualObject("big", AT + 4 * M + 0x1000, 0x3000)])
    assert places(found.objects) == [
        (16 * M + 0xF00, AT + 0xF00, 0x1100),
        (12 * M, AT + 0x2000, 0x100),
        (32 * M + 0x1000, AT + 4 * M + 0x1000, 0x3000),
    ]
    assert [item.name for item in found.objects] == ["o", "o", "big"]
    assert b.maps(vm, 4096, 2) == [0x3FFF_FFFF, 0] and b.maps(vm, 3072) == [0xFFFF_FFFC]
    b.round_trip(vm)
    assert b.round_trip(vm).protection("p") == found


def test_hits_are_exact_for_an_object_in_pieces() -> None:
    vm, _ = guest()
    vm.protect("p", [VirtualObject("o", AT + 0xFC0, 0x2010)])
    rows = [(AT + 0xF80, 8), (AT + 0xFC0, 8), (AT + 0x1000, 8), (AT + 0x2FF8, 8), (AT + 0x200C, 8), (AT + 0x2078, 8)]
    result = b.replay(vm, rows, address="gva")
    hit = result.by_object["o"]
    assert (hit.violations, hit.collateral, hit.first_index, hit.subpages) == (6, 2, 0, 65)
    assert result.exit_columns.objects() == [["o"]] * 6
    result = b.replay(vm, [(AT + 0x1FFC, 8), (AT + 0x2FFC, 8)], address="gva")
    assert (result.by_object["o"].violations, result.untranslated) == (1, 1)


@pytest.mark.parametrize(
    ("given", "field", "value", "words"),
    [
        ({"gva": AT + 0x2800, "size": 0x1000}, "objects[1].gva", hex(AT + 0x3000), "level 1.*not present"),
        ({"gva": 1 << 40}, "objects[1].gva", hex(1 << 40), "level 4"),
        ({"gva": 1 << 62}, "objects[1].gva", hex(1 << 62), "canonical"),
        ({"gva": (1 << 64) - 8, "size": 9}, "objects[1].gva", (1 << 64) - 8, "64 bits"),
        ({"size": 0}, "objects[1].size", 0, "one byte"),
        ({"vcpu": 3}, "objects[1].vcpu", 3, "vCPU"),
        ({"cr3": 1 << 60}, "objects[1].cr3", 1 << 60, "CR3"),
        ({"gva": 0, "size": 1 << 33}, "objects", (1 << 21), "pages"),
        ({"granularity": "x"}, "objects[1].granularity", "x", "one of"),
    ],
)
def test_what_does_not_translate_is_refused(given: dict[str, Any], field: str, value: object, words: str) -> None:
    vm, _ = guest()
    item = VirtualObject(**{"name": "o", "gva": AT, "size": 8, **given})
    with b.unchanged(vm), pytest.raises(EngineError, match=words) as caught:
        vm.protect("p", [ProtectedObject("first", 0, 8), item])
    assert (caught.value.field, caught.value.value) == (field, value)
    assert vm.protections() == ()


def test_as_many_pieces_as_objects() -> None:
    vm, _ = guest()
    item = VirtualObject("o", AT + 0x1F00, 0x200)
    with pytest.raises(LimitExceeded, match="gva"):
        vm.protect("p", [ProtectedObject(str(i), 0, 8) for i in range(MAX_OBJECTS - 1)] + [item])


def test_a_vcpu_in_guest_mode_is_refused() -> None:
    vm, _ = guest()
    b.edit(vm, lambda m: write_word(m, FIRST_VCPU_FRAME, ctl.V_GUEST_MODE, 1))
    with pytest.raises(InvalidValue) as caught:
        vm.protect("p", [VirtualObject("o", AT, 8)])
    assert caught.value.field == "objects[0].vcpu"


def test_pieces_lie_in_slots() -> None:
    vm, pages = guest()
    pages.map(AT, 128 * M)
    load(vm, pages)
    with b.unchanged(vm), pytest.raises(InvalidValue, match="0x8000"):
        vm.protect("p", [VirtualObject("o", AT, 8)])


def test_retranslate_moves_what_is_protected() -> None:
    vm, pages = guest()
    vm.protect("other", [ProtectedObject("x", 16 * M + 0x1000, 0x80)])
    vm.protect("p", [VirtualObject("o", AT + 0xF00, 0x1200), ProtectedObject("fixed", 0, 8)])
    assert vm.retranslate("p") == (vm.protection("p"), [])
    pages.map(AT + 0x1000, 20 * M)
    pages.map(AT + 0x2000, 20 * M + 4 * K)
    load(vm, pages)
    after, moved = vm.retranslate("p")
    assert [tuple(run) for run in moved] == [
        ("o", AT + 0x1000, 16 * M + 0x1000, 20 * M, 0x1000),
        ("o", AT + 0x2000, 12 * M, 20 * M + 0x1000, 0x100),
    ]
    assert places(after.objects) == [
        (16 * M + 0xF00, AT + 0xF00, 0x100),
        (20 * M, AT + 0x1000, 0x1100),
        (0, None, 8),
    ]
    assert vm.protection("p") == after and [item.name for item in vm.protections()] == ["other", "p"]
    assert b.maps(vm, 4096, 2) == [0x3FFF_FFFF, 0xFFFF_FFFE], "the other protection stays"
    assert b.maps(vm, 3072) == [b.FULL] and b.maps(vm, 5120, 2) == [0, 0xFFFF_FFFC]
    assert b.round_trip(vm).protection("p") == after
    vm.unprotect("p")
    assert b.maps(vm, 5120, 2) == [b.FULL] * 2


def test_retranslate_moves_nothing_where_one_does_not_translate() -> None:
    vm, pages = guest()
    vm.protect("p", [VirtualObject("a", AT, 8), VirtualObject("b", AT + 0x2000, 8)])
    pages.map(AT, 20 * M)
    pages.entries[pages.slot(AT + 0x2000, 1)] = 0
    load(vm, pages)
    with b.unchanged(vm), pytest.raises(InvalidValue) as caught:
        vm.retranslate("p")
    assert (caught.value.field, caught.value.value) == ("objects[1].gva", hex(AT + 0x2000))


@pytest.mark.parametrize("mode", MODES)
def test_an_object_may_have_an_address_space_of_its_own(mode: str) -> None:
    vm, _ = guest(mode)
    other = GuestPages(MODES[mode], 3 * M)
    other.map(AT, 24 * M)
    other.store(vm.write_memory)
    found = vm.protect("p", [VirtualObject("a", AT, 8), VirtualObject("b", AT, 8, cr3=3 * M)])
    assert places(found.objects) == [(16 * M, AT, 8), (24 * M, AT, 8)]
    b.edit(vm, other.load)
    after, _ = vm.retranslate("p")
    assert places(after.objects) == [(24 * M, AT, 8), (24 * M, AT, 8)], "by the vCPU's CR3 as it is, or by its own"
