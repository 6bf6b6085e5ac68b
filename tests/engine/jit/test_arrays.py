"""Arrays that kernels take by one pointer: what compiled code sees is what Python sees, and only what was declared."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from engine.jit import Arrays, Kind, by_pointer, kernel

WORDS, BYTES = np.dtype(np.int64), np.dtype(np.uint8)


@by_pointer
class Three(Arrays):
    """Arrays of one, two and three indices."""

    kinds: ClassVar = {"bytes": Kind(BYTES, 1), "table": Kind(WORDS, 2), "cube": Kind(WORDS, 3)}

    bytes: np.ndarray
    table: np.ndarray
    cube: np.ndarray


def three(count: int = 3) -> Three:
    return Three(
        bytes=np.arange(count, dtype=np.uint8),
        table=np.arange(10, dtype=np.int64).reshape(2, 5),
        cube=np.arange(24, dtype=np.int64).reshape(2, 3, 4),
    )


@kernel
def shapes(t):  # type: ignore[no-untyped-def]
    """Every length."""
    return t.bytes.shape[0], t.table.shape[0], t.table.shape[1], t.cube.shape[0], t.cube.shape[1], t.cube.shape[2]


@kernel
def at(t, i, j, k):  # type: ignore[no-untyped-def]
    """An item of each."""
    return t.bytes[k], t.table[i, j], t.cube[i, j, k]


@kernel
def doubled(t, times):  # type: ignore[no-untyped-def]
    """Write, and read what was written, through a call."""
    for _ in range(times):
        for i in range(t.bytes.shape[0]):
            t.bytes[i] += t.bytes[i]
        t.table[1, 4] += at(t, 1, 2, 0)[1]
    return t.table[1, 4]


def test_lengths_and_items() -> None:
    assert shapes(three()) == (3, 2, 5, 2, 3, 4)
    assert shapes(three(0)) == (0, 2, 5, 2, 3, 4)
    for i, j, k in ((0, 0, 0), (1, 2, 2), (1, 1, 0)):
        assert at(three(), i, j, k) == (k, 5 * i + j, 12 * i + 4 * j + k)


def test_what_is_written_is_in_the_arrays() -> None:
    found = three()
    assert doubled(found, 2) == 9 + 2 * 7 == found.table[1, 4]
    assert found.bytes.tolist() == [0, 4, 8]


def test_another_with_some_arrays_replaced() -> None:
    before = three()
    after = before.replaced(bytes=np.zeros(5, dtype=np.uint8))
    assert (len(before.bytes), len(after.bytes)) == (3, 5)
    assert after.table is before.table and shapes(after)[0] == 5


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 5), dtype=np.int32),
        np.zeros(10, dtype=np.int64),
        np.zeros((5, 2), dtype=np.int64).T,
        np.zeros((2, 10), dtype=np.int64)[:, ::2],
        np.frombuffer(bytes(80), dtype=np.int64).reshape(2, 5),
    ],
    ids=["numbers", "indices", "order", "gaps", "read-only"],
)
def test_array_that_is_not_as_declared_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(TypeError, match="table is no array of int64 with 2 indices"):
        three().replaced(table=wrong)


def test_arrays_are_those_of_the_declaration() -> None:
    with pytest.raises(TypeError, match="cube"):
        Three(bytes=three().bytes, table=three().table)
    with pytest.raises(TypeError, match="more"):
        three().replaced(more=np.zeros(1))


def test_arrays_stay_what_they_are() -> None:
    found = three()
    with pytest.raises(AttributeError, match="replaced"):
        found.table = np.zeros((9, 9), dtype=np.int64)
    assert found.table is found.arrays[1]
