"""Memory slots: what is refused, and which slot holds a page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.cpu.memory_slots import find_slot
from engine.errors import InvalidValue
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec, first_page_without_slot, slot_table, writable_bytes
from tests.engine.builders import MIB, bare_draft

REFUSED = [
    ("slot -1", {"slot": -1}, "slot", -1, "must be 0 to 508"),
    ("slot 509", {"slot": 509}, "slot", 509, "must be 0 to 508"),
    ("unaligned address", {"gpa": 0x1001}, "gpa", 0x1001, "multiple of 4096"),
    ("negative address", {"gpa": -4096}, "gpa", -4096, "multiple of 4096"),
    ("size 0", {"size": 0}, "size", 0, "multiple of 4096 and not 0"),
    ("negative size", {"size": -4096}, "size", -4096, "multiple of 4096 and not 0"),
    ("unaligned size", {"size": 4097}, "size", 4097, "multiple of 4096 and not 0"),
    ("beyond the width", {"gpa": (1 << 40) - 4096, "size": 8192}, "gpa", (1 << 40) - 4096, "width of 40 bits"),
    ("far beyond the width", {"gpa": 1 << 70}, "gpa", 1 << 70, "width of 40 bits"),
    ("host page of 8 KByte", {"host_page_size": 8192}, "host_page_size", 8192, "4096, 2097152 or 1073741824"),
    ("address space 2", {"address_space": 2}, "address_space", 2, "0, or 1 for system-management mode"),
    ("address space -1", {"address_space": -1}, "address_space", -1, "0, or 1 for system-management mode"),
]


def validate(spec: SlotSpec) -> None:
    """All checks of one slot, for a machine of 509 slots and 40 bits."""
    spec.validate_number(509)
    spec.validate_place()
    spec.validate_width(40)


@pytest.mark.parametrize(
    ("change", "field", "value", "rule"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_slot_that_cannot_be(change: dict[str, Any], field: str, value: Any, rule: str) -> None:
    spec = SlotSpec(**{"slot": 0, "gpa": 0, "size": 4096, **change})
    with pytest.raises(InvalidValue, match=rule) as caught:
        validate(spec)
    assert (caught.value.field, caught.value.value) == (field, value)


@pytest.mark.parametrize("host_page_size", [1 << 12, 1 << 21, 1 << 30])
@pytest.mark.parametrize("slot", [0, 508])
def test_slot_at_the_ends_of_what_is_allowed(slot: int, host_page_size: int) -> None:
    validate(SlotSpec(slot, (1 << 40) - 4096, 4096, host_page_size=host_page_size))


OVERLAPS = [
    ("same", 0x10, 0x10, True),
    ("inside", 0x14, 4, True),
    ("around", 0, 0x40, True),
    ("first page", 0xF, 2, True),
    ("last page", 0x1F, 2, True),
    ("before", 0xF, 1, False),
    ("after", 0x20, 1, False),
]


@pytest.mark.parametrize(("gfn", "pages", "shared"), [row[1:] for row in OVERLAPS], ids=[row[0] for row in OVERLAPS])
def test_overlap(gfn: int, pages: int, shared: bool) -> None:
    known = SlotSpec(7, 0x10000, 0x10000)
    spec = SlotSpec(3, gfn << 12, pages << 12)
    assert spec.overlaps(known) is known.overlaps(spec) is shared
    if not shared:
        SlotMap.of([known]).with_slot(spec)
        return
    with pytest.raises(InvalidValue, match="slot 7, which covers 0x10000 to 0x1ffff") as caught:
        SlotMap.of([known]).with_slot(spec)
    assert (caught.value.field, caught.value.value, caught.value.errno) == ("gpa", gfn << 12, "EEXIST")
    SlotMap.of([known]).with_slot(SlotSpec(7, gfn << 12, pages << 12))  # a slot may move over itself


SLOTS = [
    SlotSpec(2, 0, 0x1000, address_space=1),
    SlotSpec(9, 0x5000, 0x3000, userspace_addr=0x7F0000),
    SlotSpec(1, 0x2000, 0x1000, read_only=True),
    SlotSpec(4, 0x8000, 0x1000),
    SlotSpec(0, 1 << 45, MIB),
]


def test_table_is_sorted_by_base() -> None:
    assert slot_table(SLOTS).tolist() == [
        [2, 1, 2, 1, 1, 0, 0, 0],
        [5, 3, 0, 9, 1, 0x7F0, 0, 0],
        [8, 1, 0, 4, 1, 0, 0, 0],
        [1 << 33, 256, 0, 0, 1, 0, 0, 0],
        [1 << 40, 1, 0, 2, 1, 0, 0, 0],
    ]
    assert slot_table([]).shape == (0, 8)


@pytest.mark.parametrize(
    ("gfn", "slot"),
    [
        *((0, None), (1, None), (2, 1), (3, None), (4, None), (5, 9), (7, 9), (8, 4), (9, None)),
        *((1 << 33, 0), ((1 << 33) + 255, 0), ((1 << 33) + 256, None)),
    ],
)
def test_slot_of_a_page(gfn: int, slot: int | None) -> None:
    m = bare_draft(slots=SLOTS).machine
    position = int(find_slot(m, np.int64(gfn)))
    assert (None if position < 0 else int(m.slots[position, 3])) == slot


def test_machine_without_slots_has_no_page() -> None:
    assert int(find_slot(bare_draft().machine, np.int64(0))) == -1


@pytest.mark.parametrize(
    ("gfn", "pages", "missing"),
    [(2, 1, -1), (2, 2, 3), (5, 4, -1), (5, 5, 9), (0, 9, 0), (7, 2, -1), ((1 << 33) + 255, 2, (1 << 33) + 256)],
)
def test_first_page_without_a_slot(gfn: int, pages: int, missing: int) -> None:
    m = bare_draft(slots=SLOTS).machine
    assert int(first_page_without_slot(m, gfn, pages)) == missing


@pytest.mark.parametrize(
    ("gpa", "size", "writable"),
    [(0x5000, 0x4000, True), (0x5000, 0x4001, False), (0x2000, 1, False), (0x4FFF, 2, False), (0x7FFF, 2, True)],
)
def test_bytes_in_writable_slots(gpa: int, size: int, writable: bool) -> None:
    assert bool(writable_bytes(bare_draft(slots=SLOTS).machine, gpa, size)) is writable
