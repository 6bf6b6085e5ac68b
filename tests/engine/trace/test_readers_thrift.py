"""The directory and the page headers of a Parquet file, read as the library reads them or not at all."""

from __future__ import annotations

import io

import pytest

from engine.errors import TraceError
from engine.trace.operations import LARGEST_ARGUMENT
from engine.trace.readers.budget import Budget
from engine.trace.readers.parquet_bounds import Chunk, Footer, check_pages, read_footer
from engine.trace.readers.thrift import I32, Walk


def fields(data):
    walk, found = Walk(data, 1 << 16), []
    for number, kind in walk.fields():
        assert kind == I32
        found.append((number, walk.integer()))
    return found


def test_fields_ascend_by_deltas_and_by_numbers():
    assert fields(b"\x15\x02\xf5\x04\x05\x40\x06\x05\xfe\xff\x03\x08\0") == [(1, 1), (16, 2), (32, 3), (32767, 4)]


@pytest.mark.parametrize(
    "data",
    [
        b"\x25\x02\x05\x04\x04\0",  # 2 twice
        b"\x25\x02\x05\x02\x04\0",  # 2, then 1
        b"\x05\x00\x04\0",  # 0
        b"\x05\x01\x04\0",  # -1
        b"\x05\x80\x80\x04\x04\0",  # 32768, of which 16 bits are a number below 0
        b"\x05\xfe\xff\x03\x04\x15\x04\0",  # 32767, then one more
        b"\x25\x02\x05\x82\x80\x08\x04\0",  # 2, then 65537, of which 16 bits are 1
    ],
)
def test_fields_that_do_not_ascend(data):
    with pytest.raises(IndexError, match="order"):
        fields(data)


# Fields of a page header: type, unpacked and packed size, then one of structs; values in the first of theirs.
DATA, DICTIONARY = b"\x15\x00", b"\x15\x04"
SIZES = b"\x15\x80\x80\x08\x15\x00"  # 64 KiB of nothing
MANY, ONE = b"\x15\x80\x80\x08\x15\x00\0", b"\x15\x02\x15\x00\0"  # 64 Ki values and one, plain


@pytest.mark.parametrize(
    "header",
    [
        DATA + SIZES + b"\x2c" + ONE + b"\x2c" + MANY + b"\0",  # those of a dictionary are many
        DATA + SIZES + b"\x4c" + MANY + b"\0",
        DICTIONARY + SIZES + b"\x2c" + MANY + b"\x2c" + ONE + b"\0",
        DICTIONARY + SIZES + b"\x4c" + ONE + b"\x1c" + MANY + b"\0",
    ],
)
def test_the_values_of_a_page_are_those_of_its_type(header):
    chunk = Chunk(6, 1, len(header), 0, 0)
    assert LARGEST_ARGUMENT + 1024 < 1 << 16
    with pytest.raises(TraceError):
        check_pages(io.BytesIO(header), Footer(len(header), 1, [[chunk]]), ["arg"], ["arg"], Budget(1 << 20))


@pytest.mark.parametrize(
    ("header", "values"),
    [(DATA + SIZES + b"\x2c" + MANY + b"\0", 1 << 16), (DICTIONARY + SIZES + b"\x4c" + MANY + b"\0", 0)],
)
def test_a_page_with_as_many_values_as_it_has_room_for(header, values):
    chunk = Chunk(6, values, len(header), 0, 0)
    check_pages(io.BytesIO(header), Footer(1 << 20, values, [[chunk]]), ["arg"], ["arg"], Budget(1 << 20))


def chunk_of(kind, packed_at=b"\x26\x00", dictionary_at=b"\x26\x00"):
    """What is read of a file of one column: its type, 1 value, its size 0 and where its pages are."""
    column = kind + b"\x29\x18\x03arg" + b"\x26\x02\x26\x00" + packed_at + dictionary_at + b"\0"
    root = b"\x49\x1c\x19\x1c\x3c" + column + b"\0" + b"\0" + b"\0"
    body = b"PAR1" + root + len(root).to_bytes(4, "little") + b"PAR1"
    return read_footer(io.BytesIO(body), Budget(1 << 20)).groups[0][0]


def test_a_column_as_it_is_written():
    assert chunk_of(b"\x15\x0c", dictionary_at=b"\x26\x08") == Chunk(6, 1, 0, 0, 4)


def test_a_number_of_another_type_is_none():
    """The library steps over it."""
    assert chunk_of(b"\x15\x0c", dictionary_at=b"\x25\x08") == Chunk(6, 1, 0, 0, 0)
    assert chunk_of(b"\x16\x0c").physical_type == 0


def test_a_number_that_does_not_fit_32_bits():
    """The library takes 32 bits of it, here BYTE_ARRAY."""
    with pytest.raises(TraceError, match="32 bits"):
        chunk_of(b"\x15\x8c\x80\x80\x80\x20")


@pytest.mark.parametrize("kind", [DATA, DICTIONARY])
def test_a_number_of_values_that_does_not_fit_32_bits(kind):
    values = b"\x15\x82\x80\x80\x80\x20\x15\x00"
    inner = values + (b"\x15\x06\x15\x06" if kind == DATA else b"") + b"\0"
    header = kind + SIZES + (b"\x2c" if kind == DATA else b"\x4c") + inner + b"\0"
    with pytest.raises(TraceError, match="32 bits"):
        check_pages(
            io.BytesIO(header),
            Footer(len(header), 1, [[Chunk(6, 1, len(header), 0, 0)]]),
            ["arg"],
            ["arg"],
            Budget(1 << 20),
        )
