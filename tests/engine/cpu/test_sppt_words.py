"""Sub-page masks and vectors: spreading, gathering, and which sub-pages an access touches."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.arch import sppt as arch
from engine.arch.words import positions, signed, unsigned
from engine.cpu import sppt

MASKS = [
    (0, 0),
    (1, 1),
    (2, 4),
    (0xF, 0x55),
    (0x8000_0000, 1 << 62),
    (0x0001_0000, 1 << 32),
    (0xFFFF_FFFF, 0x5555_5555_5555_5555),
    (0xAAAA_AAAA, 0x4444_4444_4444_4444),
    (0x5555_5555, 0x1111_1111_1111_1111),
]


@pytest.mark.parametrize(("mask", "vector"), MASKS, ids=[hex(mask) for mask, _ in MASKS])
def test_bit_s_of_a_mask_is_bit_2s_of_a_vector(mask: int, vector: int) -> None:
    assert unsigned(sppt.spread(np.int64(mask))) == vector
    assert int(sppt.gather(np.int64(vector))) == mask


@given(st.integers(0, 0xFFFF_FFFF))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_gather_undoes_spread(mask: int) -> None:
    vector = sppt.spread(np.int64(mask))
    assert unsigned(vector) == sum(1 << 2 * s for s in range(32) if mask >> s & 1)
    assert int(sppt.gather(vector)) == mask
    assert int(sppt.gather(np.int64(int(vector) | signed(arch.VECTOR_RESERVED)))) == mask, "odd bits do not count"


def test_spread_looks_at_32_bits_only() -> None:
    assert int(sppt.spread(np.int64(-1))) == arch.VECTOR_ALL
    assert int(sppt.spread(np.int64(1 << 40))) == 0


TOUCHED = [
    ("first byte", 0, 1, [0]),
    ("last byte of the first", 127, 1, [0]),
    ("first byte of the second", 128, 1, [1]),
    ("over an end", 124, 8, [0, 1]),
    ("exactly one", 128, 128, [1]),
    ("one byte more", 128, 129, [1, 2]),
    ("last byte", 4095, 1, [31]),
    ("last eight", 4088, 8, [31]),
    ("whole page", 0, 4096, list(range(32))),
    ("upper half", 2048, 2048, list(range(16, 32))),
]


@pytest.mark.parametrize(("at", "size", "subpages"), [row[1:] for row in TOUCHED], ids=[row[0] for row in TOUCHED])
@pytest.mark.parametrize("page", [0, 0x8000_0801_000, 1 << 51])
def test_sub_pages_that_an_access_touches(page: int, at: int, size: int, subpages: list[int]) -> None:
    wanted = reduce(int.__or__, (1 << s for s in subpages))
    assert int(sppt.touched(np.int64(page + at), np.int64(size))) == wanted


@given(st.integers(0, 4095), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_touched_is_the_set_of_sub_pages_of_its_bytes(at: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4096 - at))
    wanted = reduce(int.__or__, (1 << (byte >> 7) for byte in range(at, at + size)))
    assert int(sppt.touched(np.int64(at), np.int64(size))) == wanted


@pytest.mark.parametrize(
    ("word", "same"), [(0, 0), (1 << 63, -(1 << 63)), ((1 << 64) - 1, -1), ((1 << 63) - 1, (1 << 63) - 1)]
)
def test_words_keep_their_bits_in_either_reading(word: int, same: int) -> None:
    assert signed(word) == same
    assert unsigned(same) == word


def test_positions_count_from_the_start() -> None:
    assert [int(p) for p in positions(3, 5)] == [5, 6, 7]
    assert all(isinstance(p, np.int64) for p in positions(2))
