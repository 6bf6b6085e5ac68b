"""Arrow IPC streams: framing, truncation, encodings, hostile bodies."""

from __future__ import annotations

import gc
import io
import random
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from engine.errors import TraceError
from engine.trace.columns import CHUNK_RECORDS
from engine.trace.readers import open_trace
from tests.abuse.bodies import shared_name
from tests.engine.trace.arrow_streams import EOS, stream
from tests.engine.trace.conftest import table


def messages(body):
    """Start of each message of a stream, the end mark included."""
    source = pa.BufferReader(body)
    starts = [0]
    while starts[-1] < len(body) - len(EOS):
        pa.ipc.read_message(source)
        starts.append(source.tell())
    return starts


@pytest.mark.parametrize(
    "count",
    [1, CHUNK_RECORDS - 1, CHUNK_RECORDS, CHUNK_RECORDS + 1, 3 * CHUNK_RECORDS + 5],
)
def test_batches_of_any_length(read, count):
    got = read("arrow", stream(table(count), table(0), table(3)))
    assert got.records[:, 0].tolist() == [*range(count), 0, 1, 2]
    assert set(got.records[:, 1].tolist()) == {4 | 1 << 16}


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_buffers(read, codec):
    got = read("arrow", stream(table(5_000), compression=codec))
    assert got.records[:, 0].tolist() == list(range(5_000))


def test_streams_without_the_continuation_word(read):
    got = read("arrow", legacy(stream(table())))
    assert len(got.records) == 1_000


def legacy(body):
    """The same stream in the framing used before Arrow 0.15: no 0xFFFFFFFF in front of the metadata length."""
    starts = messages(body)
    parts = [body[start + 4 : end] for start, end in zip(starts, [*starts[1:], len(body)], strict=True)]
    return b"".join(parts)


@pytest.mark.parametrize("values", [pa.uint64(), pa.int16()])
def test_dictionary_encoded_integers(read, values):
    gpa = pa.array([5, 6, 5, 7], values).dictionary_encode()
    got = read("arrow", stream(pa.table({"gpa": gpa, "pc": gpa})), carry=["pc"])
    assert got.records[:, 0].tolist() == [5, 6, 5, 7]
    assert got.carry["pc"].tolist() == [5, 6, 5, 7]


def test_dictionaries_that_grow_between_batches(read):
    first = pa.record_batch({"gpa": pa.array([1, 2], pa.uint64()).dictionary_encode()})
    second = pa.record_batch({"gpa": pa.array([1, 2, 3], pa.uint64()).dictionary_encode()})
    for deltas in (False, True):
        got = read("arrow", stream(first, second, second, emit_dictionary_deltas=deltas))
        assert got.records[:, 0].tolist() == [1, 2, 1, 2, 3, 1, 2, 3]


def test_nulls_in_a_dictionary(read):
    index = pa.array([0, 1, None], pa.int8())
    value = pa.array([0, 1, 0], pa.int8())
    for gpa in (
        pa.DictionaryArray.from_arrays(index, pa.array([4, 5], pa.uint64())),
        pa.DictionaryArray.from_arrays(value, pa.array([4, None], pa.uint64())),
    ):
        with pytest.raises(TraceError, match="null") as caught:
            read("arrow", stream(pa.table({"gpa": gpa})))
        assert caught.value.index == (2 if gpa.null_count else 1)


def test_dictionary_of_text(read):
    with pytest.raises(TraceError, match="integers"):
        read("arrow", stream(pa.table({"gpa": pa.array(["a"]).dictionary_encode()})))


def test_runs_of_text(read):
    gpa = pa.RunEndEncodedArray.from_arrays([2, 3], ["a", "b"])
    with pytest.raises(TraceError, match="integers"):
        read("arrow", stream(pa.table({"gpa": gpa})))


def test_a_column_twice(read):
    gpa = pa.array([1], pa.uint64())
    for name, carry in (("gpa", ()), ("pc", ["pc"])):
        schema = pa.schema([("gpa", pa.uint64()), (name, pa.uint64()), (name, pa.uint64())])
        with pytest.raises(TraceError, match="twice") as caught:
            read("arrow", stream(pa.record_batch([gpa] * 3, schema=schema)), carry=carry)
        assert caught.value.field == name
    schema = pa.schema([("gpa", pa.uint64()), ("pc", pa.uint64()), ("pc", pa.uint64())])
    assert read("arrow", stream(pa.record_batch([gpa] * 3, schema=schema))).ignored == ("pc",)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.int64(), [-5, 5]),
        (pa.float32(), [0.5, 1.5]),
        (pa.bool_(), [True, False]),
        (pa.uint8(), [1, 255]),
    ],
)
def test_carried_types_are_kept(read, kind, values):
    got = read(
        "arrow",
        stream(pa.table({"gpa": pa.array([1, 2], pa.uint64()), "x": pa.array(values, kind)})),
        carry=["x"],
    )
    assert got.carry["x"].tolist() == values
    assert got.carry["x"].dtype.kind in "iufb"


@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("ns"),
        pa.decimal128(5),
        pa.binary(4),
        pa.list_(pa.int8()),
        pa.null(),
    ],
)
def test_types_that_are_not_carried(read, kind):
    with pytest.raises(TraceError, match="numbers") as caught:
        read(
            "arrow",
            stream(pa.table({"gpa": pa.array([1], pa.uint64()), "x": pa.nulls(1, kind)})),
            carry=["x"],
        )
    assert caught.value.field == "x"


def test_index_of_a_fault_in_a_later_batch(read):
    bad = pa.table({"gpa": pa.array([1, 2], pa.uint64()), "size": pa.array([1, None], pa.uint8())})
    with pytest.raises(TraceError) as caught:
        read("arrow", stream(table(1_000), bad, schema=bad.schema))
    assert caught.value.index == 1_001


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}])
def test_every_truncation_is_found(read, options):
    body = stream(table(40), table(30), **options)
    starts = messages(body)
    assert len(starts) == 4
    for end in range(len(body)):
        with pytest.raises(TraceError) as caught:
            read("arrow", body[:end])
        assert caught.value.index == (0 if end < starts[2] else 40 if end < starts[3] else 70)


def test_a_missing_end_mark_is_a_truncation(read):
    with pytest.raises(TraceError, match="end-of-stream") as caught:
        read("arrow", stream(table(), eos=False))
    assert caught.value.index == 1_000


def test_bytes_after_the_end(read):
    with pytest.raises(TraceError, match="follow"):
        read("arrow", stream(table()) + b"\0")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"A",
        b"garbage" * 100,
        EOS,
        b"\0" * 64,
        b"\xff" * 64,
        b"\xff\xff\xff\xff\x10\0\0\0" + b"\0" * 16,
    ],
)
def test_what_is_not_a_stream(read, body):
    with pytest.raises(TraceError) as caught:
        read("arrow", body)
    assert caught.value.index == 0


def test_the_file_format_is_told_apart(read):
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table().schema) as writer:
        writer.write(table())
    with pytest.raises(TraceError, match="stream format"):
        read("arrow", sink.getvalue())


def test_a_message_in_the_wrong_place(read):
    body = stream(table(10))
    starts = messages(body)
    with pytest.raises(TraceError):
        read("arrow", body[starts[1] :])
    with pytest.raises(TraceError):
        read("arrow", body[: starts[1]] + body)


def test_claimed_sizes_are_bounded(read):
    read("arrow", stream(table(400)), memory=4_096)
    with pytest.raises(TraceError, match="4096") as caught:
        read("arrow", stream(table(400), table(2_000)), memory=4_096)
    assert caught.value.index == 400
    zeros = pa.table({"gpa": pa.array(np.zeros(100_000, np.uint64))})
    assert len(stream(zeros, compression="zstd")) < 4_096
    with pytest.raises(TraceError, match="4096"):
        read("arrow", stream(zeros, compression="zstd"), memory=4_096)
    encoded = pa.table({"gpa": pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), zeros["gpa"].chunk(0))})
    with pytest.raises(TraceError, match="4096"):
        read("arrow", stream(encoded, compression="zstd"), memory=4_096)


def test_what_is_not_used_takes_nothing_of_the_budget(read):
    """Neither columns that are ignored nor their dictionaries are kept."""
    note = pa.array([f"{i:8}" * 20 for i in range(1_000)])
    body = stream(table(1_000, note=note, code=note.dictionary_encode()))
    assert len(body) > 300_000
    assert len(read("arrow", body, memory=20_000).records) == 1_000


def test_dictionaries_count_together_and_deltas_add_up(read):
    def batch(first, count, name="gpa"):
        return pa.DictionaryArray.from_arrays(
            pa.array([0], pa.int32()), pa.array(np.arange(first, first + count, dtype=np.uint64))
        )

    grown = [pa.record_batch({"gpa": batch(0, count)}) for count in range(100, 2_000, 100)]
    body = stream(*grown, emit_dictionary_deltas=True)
    assert len(read("arrow", body, memory=64_000).records) == len(grown)
    with pytest.raises(TraceError, match="dictionaries before it"):
        read("arrow", body, memory=16_000)
    two = pa.record_batch({"gpa": batch(0, 1_000), "gva": batch(0, 1_000)})
    assert len(read("arrow", stream(two), memory=32_000).records) == 1
    with pytest.raises(TraceError, match="dictionaries before it"):
        read("arrow", stream(two), memory=16_000)


def test_a_batch_longer_than_its_buffers(read):
    """A length that the buffers cannot back must not reach memory beyond them."""
    body = bytearray(stream(table(10)))
    start = messages(bytes(body))[1]
    length = struct.pack("<q", 10)
    found = 0
    position = body.find(length, start)
    while position >= 0:
        for claim in (11, 1 << 20, 1 << 40, -1):
            changed = body.copy()
            changed[position : position + 8] = struct.pack("<q", claim)
            try:
                got = read("arrow", bytes(changed))
            except TraceError:
                found += 1
            else:
                assert len(got.records) <= 16
        position = body.find(length, position + 1)
    assert found


@pytest.mark.parametrize("options", [{}, {"compression": "lz4"}])
def test_damaged_bytes_never_end_in_anything_but_a_refusal(read, options):
    encoded = pa.array(np.arange(50) % 5, pa.uint16()).dictionary_encode()
    body = stream(table(50, vcpu=encoded, note=pa.array(["x"] * 50)), **options)
    rng = random.Random(7)
    for _ in range(1_500):
        changed = bytearray(body)
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        refused = None
        try:
            read("arrow", bytes(changed))
        except TraceError as error:
            refused = error
        assert refused is None or refused.index is not None


def test_only_needed_columns_are_decoded(read):
    """A damaged column that is ignored does no harm."""
    body = bytearray(stream(table(2_000, note=pa.array(np.arange(2_000) * 7 % 1_999)), compression="zstd"))
    at = body.rindex(b"\x28\xb5\x2f\xfd")  # the mark at the start of the last compressed buffer
    body[at : at + 100] = bytes(100)
    got = read("arrow", bytes(body))
    assert (len(got.records), got.ignored) == (2_000, ("note",))
    with pytest.raises(TraceError):
        read("arrow", bytes(body), carry=["note"])


@pytest.mark.parametrize("length", [256, 257, 100_000])
def test_the_length_of_a_name(read, length):
    body = stream(pa.table({"gpa": pa.array([1], pa.uint64()), "n" * length: pa.array([1])}))
    if length <= 256:
        assert read("arrow", body).ignored == ("n" * length,)
        return
    with pytest.raises(TraceError, match="a name has more than 256 bytes"):
        read("arrow", body)


def test_columns_that_share_a_long_name_cost_nothing(read):
    body = shared_name()
    tracemalloc.start()
    with pytest.raises(TraceError):
        read("arrow", body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(body)


@pytest.mark.parametrize("offsets", [(0, 2**63 - 1, -2, 5), (0, 5, 4, 8), (-1, 0, 5, 8), (0, 5, 9, 12)])
def test_offsets_that_are_out_of_order(read, offsets):
    """Their differences may be all above 0: they wrap."""
    arg = pa.array([b"abc", b"de", b"fgh"], pa.large_binary())
    body = stream(pa.table({"gpa": pa.array([0] * 3, pa.uint64()), "op": pa.array([1] * 3, pa.uint8()), "arg": arg}))
    assert body.count(struct.pack("<4q", 0, 3, 5, 8)) == 1
    with pytest.raises(TraceError, match="offsets"):
        read("arrow", body.replace(struct.pack("<4q", 0, 3, 5, 8), struct.pack("<4q", *offsets)))


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
def test_a_body_that_was_read_keeps_no_memory(codec):
    body = stream(table(2_000), table(2_000), compression=codec)

    def kept_by(bodies):
        for _ in range(bodies):
            for _ in open_trace("arrow", io.BytesIO(body)):
                pass
        gc.collect()
        return tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()

    tracemalloc.start()
    try:
        kept_by(20)
        before, after = kept_by(5), kept_by(100)
    finally:
        tracemalloc.stop()
    assert after[0] - before[0] < 100 * 64 and after[1] == before[1]


def test_a_stream_that_is_not_compressed_does_without_the_library():
    script = (
        "import io, sys\n"
        "from engine.trace.readers import open_trace\n"
        "records = sum(len(chunk.records) for chunk in open_trace('arrow', io.BytesIO(sys.stdin.buffer.read())))\n"
        "print(records, 'pyarrow' in sys.modules)\n"
    )
    for codec, loaded in ((None, False), ("zstd", True)):
        body = stream(table(100), compression=codec)
        run = subprocess.run([sys.executable, "-c", script], input=body, capture_output=True, check=True, timeout=120)
        assert run.stdout.decode().split() == ["100", str(loaded)]


def test_chunks_are_replayed_while_the_stream_arrives():
    body = stream(*[table(100)] * 50)
    source = io.BytesIO(body)
    next(iter(open_trace("arrow", source)))
    assert source.tell() < len(body) / 10
