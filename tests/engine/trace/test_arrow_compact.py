"""Compact Arrow streams: runs, narrow types, dictionaries and compressed buffers, decompressed ahead of their turn."""

from __future__ import annotations

import io
import itertools
import struct
import threading

import numpy as np
import pyarrow as pa
import pytest

from engine.errors import TraceError
from engine.trace.readers import Budget, arrow, open_trace
from tests.engine.trace.arrow_streams import stream

ENDS = {"int16": pa.int16(), "int32": pa.int32(), "int64": pa.int64()}


def runs(values, ends, kind=None, of=None):
    return pa.RunEndEncodedArray.from_arrays(pa.array(ends, kind or pa.int32()), pa.array(values, of or pa.uint16()))


def read_all(body, **options):
    return np.concatenate([chunk.records.copy() for chunk in open_trace("arrow", io.BytesIO(body), **options)])


@pytest.mark.parametrize("kind", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
def test_columns_of_runs(kind, codec):
    count = 1_000
    rng = np.random.default_rng(1)
    ends = [*sorted(rng.choice(count - 1, 40, replace=False) + 1), count]
    columns = {name: rng.integers(0, 200, len(ends)) for name in ("gpa", "size", "vcpu")}
    batch = pa.record_batch({name: runs(values, ends, kind) for name, values in columns.items()})
    got = read_all(stream(batch, batch.slice(7, 500), compression=codec))
    spread = {name: np.repeat(values, np.diff(ends, prepend=0)) for name, values in columns.items()}
    for name, column in (("gpa", got[:, 0]), ("size", got[:, 1] & 0xFFFF), ("vcpu", got[:, 1] >> 32)):
        assert column.tolist() == [*spread[name], *spread[name][7:507]], name


def test_a_column_of_one_run_leaves_the_others_as_they_came():
    count = 5_000
    batch = pa.record_batch(
        {"gpa": np.arange(count, dtype=np.uint32), "access": runs([2], [count]), "vcpu": runs([3], [count])}
    )
    (chunk,) = open_trace("arrow", io.BytesIO(stream(batch)))
    assert chunk.columns is not None and chunk.columns.above == 2 << 16 | 3 << 32
    assert chunk.columns.gpa.dtype == np.uint64 and chunk.columns.gpa.tolist() == list(range(count))


def test_carried_runs_and_booleans(read):
    batch = pa.record_batch(
        {
            "gpa": np.arange(10),
            "note": runs([1.5, 2.5], [4, 10], of=pa.float32()),
            "bit": runs([True], [10], of=pa.bool_()),
        }
    )
    got = read("arrow", stream(batch), carry=["note", "bit"])
    assert got.carry["note"].tolist() == [1.5] * 4 + [2.5] * 6 and got.carry["bit"].all()


def test_nulls_in_runs():
    for values, wrong in (([1, None], 600), ([None, 1], 0)):
        body = stream(pa.record_batch({"gpa": np.arange(1_000), "size": runs(values, [600, 1_000])}))
        with pytest.raises(TraceError, match="size must not be null") as caught:
            read_all(body)
        assert caught.value.index == wrong


def test_values_of_runs_that_do_not_fit():
    body = stream(pa.record_batch({"gpa": np.arange(1_000), "vcpu": runs([1, 70_000], [600, 1_000], of=pa.int32())}))
    with pytest.raises(TraceError, match="vcpu must be") as caught:
        read_all(body)
    assert (caught.value.index, caught.value.value) == (600, 70_000)


def replaced(body, found, by):
    assert body.count(found) == 1
    return body.replace(found, by)


def test_ends_that_are_none():
    """Not ascending, not positive, short of the records, and twice the same."""
    good = stream(pa.record_batch({"gpa": runs([1, 2, 3], [300, 600, 1_000], pa.int32())}))
    ends = struct.pack("<3i", 300, 600, 1_000)
    assert len(read_all(good)) == 1_000
    for wrong in (
        [600, 300, 1_000],
        [0, 600, 1_000],
        [-5, 600, 1_000],
        [300, 600, 999],
        [300, 300, 1_000],
        [1 << 30, -1, 1_000],
    ):
        with pytest.raises(TraceError, match="ends of its runs do not ascend to its 1000 records"):
            read_all(replaced(good, ends, struct.pack("<3i", *wrong)))
    assert len(read_all(replaced(good, ends, struct.pack("<3i", 300, 600, 0x7FFFFFFF)))) == 1_000


def test_more_runs_than_records_and_more_records_than_a_stream_may_have():
    good = stream(pa.record_batch({"gpa": runs([5], [0x1234567], pa.int64())}))
    length = struct.pack("<q", 0x1234567)
    for count, rule in ((0, "0 records|has 1 runs"), (1 << 40, "may have up to"), ((1 << 63) - 1, "may have up to")):
        with pytest.raises(TraceError, match=rule):
            next(iter(open_trace("arrow", io.BytesIO(good.replace(length, struct.pack("<q", count))))))


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_ahead_changes_nothing(codec):
    rng = np.random.default_rng(2)
    batches = [
        pa.record_batch({"gpa": rng.integers(0, 1 << 40, count), "size": rng.integers(1, 9, count).astype(np.uint8)})
        for count in (1_000, 1, 0, 5_000, 17, *[300] * 20)
    ]
    body = stream(*batches, compression=codec)
    assert np.array_equal(read_all(body), read_all(body, ahead=True))
    assert np.array_equal(read_all(body)[:, 0], np.concatenate([batch["gpa"].to_numpy() for batch in batches]))


def test_dictionaries_between_batches_that_are_ahead():
    columns = [[1, 2], [3, 4, 5], [1], [9, 9, 7], [7]]
    for deltas in (False, True):
        batches = [pa.record_batch({"gpa": pa.array(values, pa.uint64()).dictionary_encode()}) for values in columns]
        body = stream(*batches, compression="zstd", emit_dictionary_deltas=deltas)
        assert read_all(body, ahead=True)[:, 0].tolist() == list(itertools.chain(*columns))


def test_what_is_wrong_comes_in_its_turn():
    """Batches before it are given first, whether it does not decompress or is cut off."""
    batch = pa.record_batch({"gpa": np.arange(1_000)})
    body = stream(*[batch] * 6, compression="zstd")
    at = [n for n in range(len(body)) if body[n : n + 4] == b"\x28\xb5\x2f\xfd"]
    for wrong, index in ((body[: at[3]] + b"\0\0\0\0" + body[at[3] + 4 :], 3_000), (body[: at[4] + 9], 4_000)):
        chunks = iter(open_trace("arrow", io.BytesIO(wrong), ahead=True))
        assert sum(map(len, itertools.islice(chunks, index // 1_000))) == index
        with pytest.raises(TraceError) as caught:
            next(chunks)
        assert caught.value.index == index


class Halting:
    """A source of which nothing more comes for a while once so many bytes were read."""

    def __init__(self, body, halt):
        self._body, self._halt, self._at = body, halt, 0

    @property
    def waiting(self):
        return self._at != self._halt

    def read(self, size=-1, /):
        assert self.waiting, "nothing has come"
        end = self._halt if self._at < self._halt else len(self._body)
        piece = self._body[self._at : min(end, self._at + size)]
        self._at += len(piece)
        return piece

    def go_on(self):
        self._halt = -1


def test_batches_are_not_held_back_for_what_has_not_come():
    batch = pa.record_batch({"gpa": np.arange(1_000)})
    source = Halting(stream(batch, batch, compression="lz4"), len(stream(batch, compression="lz4")) - 8)
    chunks = iter(open_trace("arrow", source, ahead=True))
    assert len(next(chunks)) == 1_000
    source.go_on()
    assert sum(map(len, chunks)) == 1_000


@pytest.mark.parametrize(("memory", "most"), [(900_000, 1), (2_000_000, 2), (64 << 20, arrow.AHEAD + 1)])
def test_ahead_takes_no_more_than_the_budget(monkeypatch, memory, most):
    body = stream(*[pa.record_batch({"gpa": np.zeros(100_000, np.uint64)})] * 8, compression="zstd")
    held = []
    first = arrow._Inflaters._first
    monkeypatch.setattr(arrow._Inflaters, "_first", lambda self: held.append(len(self._coming)) or first(self))
    assert len(read_all(body, ahead=True, memory=Budget(memory))) == 800_000
    assert max(held) == most


def test_a_reader_that_is_left_leaves_no_thread():
    batch = pa.record_batch({"gpa": np.arange(1_000)})
    before = threading.active_count()
    for chunk in itertools.islice(
        open_trace("arrow", io.BytesIO(stream(*[batch] * 9, compression="lz4")), ahead=True), 2
    ):
        assert len(chunk)
    assert threading.active_count() == before
