"""The generator and the image of vectors; these run without Bochs."""

from __future__ import annotations

import pytest

from . import layout
from .generate import generate
from .vectors import HEADER, MAGIC, POKE, RECORD, SECTOR, Kind, Vector, encode


@pytest.fixture(scope="module")
def vectors() -> list[Vector]:
    return generate(3, count=1500)


def test_a_seed_gives_the_same_vectors(vectors: list[Vector]) -> None:
    assert generate(3, count=1500) == vectors
    assert generate(4, count=1500) != vectors


def test_accesses_stay_on_the_two_pages(vectors: list[Vector]) -> None:
    for vector in vectors:
        assert 0 <= vector.offset < layout.PAGE
        assert vector.offset + vector.size <= 2 * layout.PAGE
        assert vector.first.gpa != vector.second.gpa
        assert vector.size <= 8 or vector.kind in (Kind.READ, Kind.WRITE)


def test_vectors_touch_test_tables_alone(vectors: list[Vector]) -> None:
    """A vector that changed the entries of the guest's own code would end somewhere else than at its access."""
    own = {slot for slot, _ in layout.base_memory().items() if slot & ~0xFFF != layout.ONES}
    shared = {layout.EPT_PML4, layout.TEST_PT_ENTRY, layout.SPP_L4}
    for vector in vectors:
        words = vector.memory()
        assert words.keys() & own <= shared
        assert words.get(layout.EPT_PML4, layout.NEAR_PDPT | layout.EPT_TABLE) == layout.NEAR_PDPT | layout.EPT_TABLE
        tables = {address & ~0xFFF for address in words}
        assert tables <= {*layout.TABLES, layout.TEST_PT}


def test_bytes_are_looked_for_where_they_can_land(vectors: list[Vector]) -> None:
    for vector in vectors:
        assert vector.first.data != vector.second.data
        for page in (vector.first, vector.second):
            assert layout.WINDOW <= page.data < layout.RAM_SIZE


def test_the_image_holds_every_vector(vectors: list[Vector]) -> None:
    image = encode(vectors)
    magic, length, base, count, *_ = HEADER.unpack_from(image)
    assert (magic, count) == (MAGIC, len(vectors))
    position = SECTOR + base * POKE.size
    for number, vector in enumerate(vectors):
        record = RECORD.unpack_from(image, position)
        assert record[:3] == (number, vector.kind, vector.size)
        words = [POKE.unpack_from(image, position + RECORD.size + n * POKE.size) for n in range(record[3])]
        assert dict(words) == vector.memory()
        position += RECORD.size + record[3] * POKE.size
    assert position == SECTOR + length
