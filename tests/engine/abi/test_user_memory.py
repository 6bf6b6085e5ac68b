"""The caller's memory: what can be read and stored, and what faults."""

from __future__ import annotations

import pytest

from engine.abi import SYSTEM, VCPU, VM, UserBuffer, UserMemory, failed, wrong_level


@pytest.mark.parametrize(
    ("offset", "size", "read"), [(0, 4, b"abcd"), (2, 2, b"cd"), (4, 0, b""), (2, 3, None), (5, 0, None)]
)
def test_reading_a_buffer(offset: int, size: int, read: bytes | None) -> None:
    assert UserBuffer.of(b"abcd").copy_from(offset, size) == read


def test_null_faults_even_for_nothing() -> None:
    null = UserBuffer.of(None)
    assert null.copy_from(0, 0) is None
    assert not null.copy_to(0, b"")


@pytest.mark.parametrize(
    ("offset", "data", "stored", "after"),
    [(1, b"xy", True, b"axyd"), (3, b"xy", False, b"abcx"), (9, b"x", False, b"abcd"), (0, b"", True, b"abcd")],
)
def test_what_fits_is_stored_before_the_fault(offset: int, data: bytes, stored: bool, after: bytes) -> None:
    buffer = UserBuffer.of(b"abcd")
    assert buffer.copy_to(offset, data) is stored
    assert buffer.data == after


def test_read_only_faults_and_stays() -> None:
    buffer = UserBuffer.of(b"abcd", read_only=True)
    assert not buffer.copy_to(0, b"x")
    assert buffer.data == b"abcd" and buffer.copy_from(0, 1) == b"a"


def test_an_argument_inside_a_segment_shares_its_bytes() -> None:
    memory = UserMemory([(0x1000, bytearray(b"abcd")), (0x2000, bytearray(b"efgh"))])
    buffer = memory.buffer(0x2001)
    assert buffer.copy_from(0, 3) == b"fgh" and buffer.copy_from(0, 4) is None
    assert not buffer.copy_to(2, b"XY")
    assert memory.read(0x2000, 4) == b"efgX"
    for address in (0xFFF, 0x1004, 0x2004, 0):
        assert memory.buffer(address).data is None


def test_segments_are_written_whole_or_not_at_all() -> None:
    memory = UserMemory([(0x1000, bytearray(b"abcd"))])
    assert memory.write(0x1001, b"xy") and memory.read(0x1000, 4) == b"axyd"
    assert not memory.write(0x1003, b"xy") and memory.read(0x1000, 4) == b"axyd"
    assert memory.read(0x1003, 2) is None
    memory.read_only = True
    assert not memory.write(0x1000, b"x") and not memory.buffer(0x1000).copy_to(0, b"x")


def test_levels_answer_what_they_do_not_know_as_the_kernel_does() -> None:
    assert [wrong_level(level) for level in (SYSTEM, VM, VCPU)] == [
        failed("EINVAL"),
        failed("ENOTTY"),
        failed("EINVAL"),
    ]
