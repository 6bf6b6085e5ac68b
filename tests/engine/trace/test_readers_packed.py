"""Packed records."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from engine.errors import InvalidValue, TraceError
from engine.trace.columns import CHUNK_RECORDS
from engine.trace.readers import open_trace


def record16(gpa, size=8, access=1, vcpu=0, zero=0, zero2=0):
    return struct.pack("<QHBBHH", gpa, size, access, zero, vcpu, zero2)


def test_record16_is_used_as_it_is(read, words):
    body = record16(0x1234, 3, 2, 9) + record16(2**64 - 1, 65535, 0, 65535)
    got = read("packed", body, record="record16")
    assert got.records.tolist() == words((0x1234, 3, 2, 9), (2**64 - 1, 65535, 0, 65535))
    assert got.gva is None and got.ignored == ()


def test_zero_fields_reach_the_replay_which_checks_them(read):
    got = read("packed", record16(0, zero=1, zero2=2), record="record16")
    assert got.records[0, 1] == 8 | 1 << 16 | 1 << 24 | 2 << 48


def test_gpa8_is_an_eight_byte_write_by_vcpu_0(read, words):
    got = read("packed", struct.pack("<2Q", 5, 2**64 - 1), record="gpa8")
    assert got.records.tolist() == words((5, 8, 1, 0), (2**64 - 1, 8, 1, 0))


@pytest.mark.parametrize(("record", "width"), [("gpa8", 8), ("record16", 16)])
@pytest.mark.parametrize("count", [CHUNK_RECORDS - 1, CHUNK_RECORDS, CHUNK_RECORDS + 1, 2 * CHUNK_RECORDS])
def test_chunk_boundaries(read, trickle, record, width, count):
    body = np.zeros((count, width // 8), dtype=np.uint64)
    body[:, 0] = np.arange(count)
    for source in (body.tobytes(), trickle(body.tobytes(), 65_537)):
        got = read("packed", source, record=record)
        assert got.records[:, 0].tolist() == list(range(count))
        assert got.chunks == -(-count // CHUNK_RECORDS)


@pytest.mark.parametrize(("record", "width"), [("gpa8", 8), ("record16", 16)])
@pytest.mark.parametrize("whole", [0, 3, CHUNK_RECORDS])
def test_truncation_names_the_record_reached(read, record, width, whole):
    for rest in (1, width - 1):
        with pytest.raises(TraceError) as caught:
            read("packed", bytes(whole * width + rest), record=record)
        assert caught.value.index == whole


def test_an_empty_body_has_no_records(read):
    for record in ("gpa8", "record16"):
        assert read("packed", b"", record=record).chunks == 0


@pytest.mark.parametrize("record", [None, "record24", ""])
def test_the_record_format_is_needed(record):
    with pytest.raises(InvalidValue) as caught:
        open_trace("packed", None, record=record)
    assert (caught.value.field, caught.value.value) == ("record", record)


def test_nothing_to_carry():
    with pytest.raises(TraceError) as caught:
        open_trace("packed", None, record="gpa8", carry=["pc"])
    assert caught.value.value == "pc"


@pytest.mark.parametrize("in_place", [True, False])
def test_memory_does_not_grow_with_the_body(in_place):
    class Zeros:
        def __init__(self, size):
            self.left = size
            if in_place:
                self.readinto = self._readinto

        def _readinto(self, target):
            size = min(self.left, len(target))
            self.left -= size
            return size

        def read(self, size=-1, /):
            size = min(size, self.left)
            self.left -= size
            return bytes(size)

    def peak(size):
        tracemalloc.start()
        for _ in open_trace("packed", Zeros(size), record="record16"):
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(64 << 20) < peak(4 << 20) + 100_000
