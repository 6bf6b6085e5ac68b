"""Frames: copies are made on the first write, addresses reach them, absent memory reads as all ones."""

from __future__ import annotations

import numpy as np
import pytest

from engine.cpu import frames, host_physical_memory
from engine.state.config import VmConfig
from engine.state.frame_store import Draft
from tests.engine.builders import bare_draft


@pytest.fixture
def draft() -> Draft:
    """A change on top of a published state that holds one frame with a word in it."""
    first = bare_draft(VmConfig(maxphyaddr=40))
    m = first.machine
    frame = frames.new_frame(m, frames.CLIENT)
    assert frame == FRAME
    frames.write_word(m, frame, 7, 77)
    first.store.publish(first)
    return first.store.begin(m.slots)


FRAME = 3
ARENA = 1 << 39


def test_first_write_copies_the_frame_and_leaves_the_published_row(draft: Draft) -> None:
    m = draft.machine
    published = draft.base
    row = int(m.row_of[FRAME])
    frames.write_word(m, FRAME, 8, 88)
    assert int(m.row_of[FRAME]) != row
    assert frames.read_word(m, FRAME, 7) == 77 and frames.read_word(m, FRAME, 8) == 88
    assert frames.read_word(published, FRAME, 8) == 0
    assert draft.changed().tolist() == [FRAME]


def test_second_write_copies_nothing(draft: Draft) -> None:
    m = draft.machine
    frames.write_word(m, FRAME, 8, 88)
    row, spare = int(m.row_of[FRAME]), int(m.top[frames.TOP_SPARE])
    frames.write_word(m, FRAME, 9, 99)
    assert (int(m.row_of[FRAME]), int(m.top[frames.TOP_SPARE])) == (row, spare)


def test_word_that_is_already_there_copies_nothing(draft: Draft) -> None:
    frames.write_word(draft.machine, FRAME, 7, 77)
    assert draft.changed().size == 0


def test_new_frame_is_zeroed_and_named(draft: Draft) -> None:
    m = draft.machine
    m.rows[draft.spare_rows()] = -1
    frame = frames.new_frame(m, frames.SPPT)
    assert not m.rows[m.row_of[frame]].any()
    assert m.kind[frame] == frames.SPPT and m.fresh[frame] == 1


def test_freed_frame_is_absent_and_the_next_to_be_used(draft: Draft) -> None:
    m = draft.machine
    frames.free_frame(m, np.int64(FRAME))
    assert m.row_of[FRAME] == -1 and m.kind[FRAME] == frames.FREE
    assert host_physical_memory.frame_at(m, ARENA + (FRAME << 12)) == -1
    assert frames.new_frame(m, frames.MEMORY) == FRAME
    assert frames.read_word(m, FRAME, 7) == 0


ADDRESSES = [
    ("below the arena", ARENA - 4096, -1),
    ("frame of registers", ARENA, -1),
    ("inside a frame", ARENA + (FRAME << 12) + 8, FRAME),
    ("free frame", ARENA + (100 << 12), -1),
    ("beyond all frames", ARENA + (1 << 30), -1),
]


@pytest.mark.parametrize(("address", "frame"), [row[1:] for row in ADDRESSES], ids=[row[0] for row in ADDRESSES])
def test_frame_at_an_address(draft: Draft, address: int, frame: int) -> None:
    m = draft.machine
    assert host_physical_memory.frame_at(m, address) == frame
    assert host_physical_memory.read_entry(m, address, 7) == (int(m.rows[m.row_of[frame], 7]) if frame >= 0 else -1)


def test_store_to_absent_memory_is_lost(draft: Draft) -> None:
    m = draft.machine
    before = m.rows.copy()
    host_physical_memory.write_entry(m, ARENA - 4096, 0, np.int64(1))
    assert np.array_equal(m.rows, before)
    host_physical_memory.write_entry(m, ARENA + (FRAME << 12), 0, np.int64(5))
    assert host_physical_memory.read_entry(m, int(frames.address_of(m, FRAME)), 0) == 5


def test_table_of_an_entry_is_its_address_bits() -> None:
    assert host_physical_memory.table_of(np.int64((1 << 61) | 0x12345_6FFF)) == 0x1_2345_6000


def test_ample_needs_frames_and_rows(draft: Draft) -> None:
    m = draft.machine
    assert frames.ample(m)
    for position in (frames.TOP_FREE, frames.TOP_SPARE):
        height = int(m.top[position])
        m.top[position] = frames.RESERVE - 1
        assert not frames.ample(m)
        draft.ensure()
        m = draft.machine
        assert frames.ample(m) and m.top[position] >= frames.RESERVE, height
