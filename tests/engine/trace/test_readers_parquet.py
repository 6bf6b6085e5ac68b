"""Parquet files."""

from __future__ import annotations

import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import TraceError
from engine.trace.columns import CHUNK_RECORDS
from engine.trace.readers import open_trace
from engine.trace.readers.budget import Budget
from engine.trace.readers.parquet_bounds import directory
from tests.abuse.bodies import with_arrow_schema
from tests.abuse.footers import LIES, refooted
from tests.engine.trace.conftest import table
from tests.support import recorded


def file(data, **options):
    sink = io.BytesIO()
    pq.write_table(data, sink, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 7},
        {
            "compression": "zstd",
            "use_dictionary": False,
            "column_encoding": {"gpa": "BYTE_STREAM_SPLIT", "size": "PLAIN"},
        },
        {
            "data_page_version": "2.0",
            "write_page_checksum": True,
            "compression": "gzip",
        },
        {"store_schema": False},
    ],
)
def test_encodings(read, options):
    got = read("parquet", file(table(), **options))
    assert got.records[:, 0].tolist() == list(range(1_000))
    assert set(got.records[:, 1].tolist()) == {4 | 1 << 16}


def test_row_groups_and_batches(read):
    count = 600_000
    got = read("parquet", file(table(count), row_group_size=250_000))
    assert np.array_equal(got.records[:, 0], np.arange(count, dtype=np.uint64))
    assert got.chunks >= count // CHUNK_RECORDS


def test_index_of_a_fault_in_a_later_row_group(read):
    size = pa.array([1] * 700_000 + [70_000], pa.uint32())
    with pytest.raises(TraceError) as caught:
        read(
            "parquet",
            file(pa.table({"gpa": size, "size": size}), row_group_size=100_000),
        )
    assert (caught.value.index, caught.value.field, caught.value.value) == (
        700_000,
        "size",
        70_000,
    )


def test_truncation_loses_the_footer(read):
    body = file(table())
    for end in (0, 1, 4, 8, 100, len(body) // 2, len(body) - 1):
        with pytest.raises(TraceError) as caught:
            read("parquet", body[:end])
        assert caught.value.index == 0


def test_what_is_not_parquet(read):
    for body in (
        b"garbage" * 100,
        b"PAR1" + b"\xff" * 100 + b"PAR1",
        b"PAR1PAR1",
        b"PAR1\0\0\0\0PAR1",
    ):
        with pytest.raises(TraceError):
            read("parquet", body)


def test_a_damaged_page_names_the_record_reached(read):
    body = bytearray(
        file(
            table(600_000),
            row_group_size=300_000,
            write_page_checksum=True,
            use_dictionary=False,
        )
    )
    metadata = pq.read_metadata(io.BytesIO(bytes(body)))
    start = metadata.row_group(1).column(0).data_page_offset
    body[start + 2_000] ^= 0xFF
    with pytest.raises(TraceError) as caught:
        read("parquet", bytes(body))
    assert 0 < caught.value.index <= 300_000


def test_damaged_bytes_never_end_in_anything_but_a_refusal(read):
    body = file(table(200, note=pa.array(["x"] * 200)), write_page_checksum=True)
    rng = random.Random(11)
    for _ in range(300):
        changed = bytearray(body)
        changed[rng.randrange(len(changed))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        refused = None
        try:
            read("parquet", bytes(changed))
        except TraceError as error:
            refused = error
        assert refused is None or refused.index is not None


def test_only_needed_columns_are_decoded(read):
    body = bytearray(
        file(
            table(2_000, note=pa.array(np.arange(2_000) * 7 % 1_999)),
            use_dictionary=False,
            compression="zstd",
        )
    )
    column = pq.read_metadata(io.BytesIO(bytes(body))).row_group(0).column(2)
    body[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    got = read("parquet", bytes(body))
    assert (len(got.records), got.ignored) == (2_000, ("note",))
    with pytest.raises(TraceError):
        read("parquet", bytes(body), carry=["note"])


@pytest.mark.parametrize("schema", ["", "no schema", "metadata"])
def test_the_arrow_schema_of_a_file_is_not_looked_at(read, schema):
    """It is a flatbuffer in which any number of fields can share metadata of megabytes; the library copies each."""
    said = schema.encode()
    if schema == "metadata":
        field = pa.field("gpa", pa.uint64(), metadata={"k": "v" * 100_000})
        said = pa.schema([field, ("size", pa.uint8())]).serialize().to_pybytes()
    body = with_arrow_schema(table(), said)
    assert b"ARROW:schema" in body
    assert read("parquet", body).records[:, 0].tolist() == list(range(1_000))
    assert pq.read_metadata(pa.BufferReader(directory(io.BytesIO(body)))).schema.to_arrow_schema().field("gpa") == (
        pa.field("gpa", pa.uint64())
    )


def test_types_that_only_an_arrow_schema_tells(read):
    """Columns are read as Parquet has them."""
    note = pa.array(np.arange(1_000) % 7).dictionary_encode()
    got = read("parquet", file(table(note=note)), carry=["note"])
    assert got.carry["note"].dtype == np.int64
    assert got.carry["note"].tolist() == [at % 7 for at in range(1_000)]


@pytest.mark.parametrize(("name", "count"), [("boot", 16_000_000), ("user", 12_000_000)])
def test_the_committed_traces(name, count):
    done = 0
    with recorded.trace(name).open("rb") as source:
        reader = open_trace("parquet", source, carry=["pc_low32"])
        sums = np.zeros(2, dtype=np.uint64)
        for chunk in reader:
            sums += chunk.records.sum(axis=0, dtype=np.uint64)
            assert chunk.gva is not None and chunk.carry["pc_low32"].dtype == np.uint32
            done += len(chunk.records)
    assert done == count
    assert reader.ignored_columns == ("flags", "as_id")
    whole = pq.read_table(recorded.trace(name), columns=["gpa", "size"])
    assert int(sums[0]) == int(whole["gpa"].to_numpy().sum(dtype=np.uint64))
    assert int(sums[1]) == int(whole["size"].to_numpy().astype(np.uint64).sum()) + (count << 16)


@pytest.mark.parametrize("lie", LIES)
def test_a_directory_that_lies_is_refused(read, lie):
    """The number of records, which memory and limits are reckoned by, is that of every column."""
    body = file(table(1_000), row_group_size=500)
    assert len(read("parquet", refooted(body, lambda tree: None)).records) == 1_000
    with pytest.raises(TraceError, match=r"its pages \d|and the file \d|below 0|columns once"):
        read("parquet", refooted(body, LIES[lie]))


def test_what_was_not_kept_is_not_given_back():
    budget = Budget(100)
    budget.keep(60, "it")
    with pytest.raises(ValueError, match="kept"):
        budget.keep(-61, "it")
    budget.keep(-60, "it")
    assert budget.kept == 0
