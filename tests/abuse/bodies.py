"""Bodies that are built to end the process, to read what is not theirs, or to take gigabytes."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from service.settings import MIB
from tests.abuse.footers import refooted, rows

HEAP = 100_000  # an offset far outside of what was sent

ARROW = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"
NDJSON = "application/x-ndjson"


def arrow(*batches: pa.RecordBatch, schema: pa.Schema | None = None, **options: object) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema or batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def operations(arg: pa.Array, op: int = 3, **more: pa.Array) -> pa.RecordBatch:
    """Rows of one kind of operation with these arguments."""
    rows = len(arg)
    columns = {"gpa": pa.array([0] * rows, pa.uint64()), "op": pa.array([op] * rows, pa.uint8()), "arg": arg, **more}
    return pa.record_batch(columns)


def offsets_past_the_end() -> bytes:
    """An inner offset of two gigabytes: what ended the process."""
    good = arrow(operations(pa.array([b"12345678", b""], pa.binary())))
    offsets = struct.pack("<3i", 0, 8, 8)
    assert good.count(offsets) == 1
    return good.replace(offsets, struct.pack("<3i", 0, 0x7FFFFFF0, 8))


def window_on_the_heap() -> bytes:
    """Nulls around eight bytes that are far outside: what gave back the memory of others."""
    good = arrow(operations(pa.array([None, b"12345678", None], pa.binary()), gva=pa.array([1, 2, 3], pa.uint64())))
    offsets = struct.pack("<4i", 0, 0, 8, 8)
    assert good.count(offsets) == 1
    return good.replace(offsets, struct.pack("<4i", 0, HEAP, HEAP + 8, 8))


def one_argument_in_all_rows() -> bytes:
    """An argument of a megabyte, named by 6,000 rows of a byte."""
    return arrow(operations(_one_argument(pa.large_binary())), compression="zstd")


def _one_argument(kind: pa.DataType) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(6_000, np.int8)), pa.array([bytes(MIB)], kind))


def _zeros(mib: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(np.zeros(mib << 17, np.uint64)))


def unused_dictionaries(mib: int = 48) -> bytes:
    """Six of them."""
    gpa = pa.array([0], pa.uint64())
    return arrow(pa.record_batch({"gpa": gpa, **{f"note{n}": _zeros(mib) for n in range(6)}}), compression="zstd")


def used_dictionary(mib: int = 256) -> bytes:
    return arrow(pa.record_batch({"gpa": _zeros(mib)}), compression="zstd")


def deltas(mib: int = 24) -> bytes:
    """A dictionary that grows eight times."""
    return arrow(
        *(pa.record_batch({"gpa": _zeros(mib * n)}) for n in range(1, 9)),
        compression="zstd",
        emit_dictionary_deltas=True,
    )


def one_batch(mib: int = 256) -> bytes:
    return arrow(pa.record_batch({"gpa": pa.array(np.zeros(mib << 17, np.uint64))}), compression="zstd")


def _runs(values: pa.Array, ends: list[int]) -> pa.RunEndEncodedArray:
    return pa.RunEndEncodedArray.from_arrays(pa.array(ends, pa.int32()), values)


def _with_ends(*ends: int) -> bytes:
    """Two runs of a thousand records with other ends than they had."""
    good = arrow(pa.record_batch({"gpa": _runs(pa.array([0, 8], pa.uint64()), [0x123, 0x3E8])}))
    true = struct.pack("<2i", 0x123, 0x3E8)
    assert good.count(true) == 1
    return good.replace(true, struct.pack("<2i", *ends))


def runs_that_descend() -> bytes:
    return _with_ends(1000, 999)


def runs_below_zero() -> bytes:
    return _with_ends(-5, 1000)


def runs_that_end_early() -> bytes:
    return _with_ends(0x123, 0x3E7)


def runs_without_end() -> bytes:
    """One run of a million million records, in some hundred bytes."""
    good = arrow(pa.record_batch({"gpa": _runs(pa.array([0], pa.uint64()), [0x1234567])}))
    rows = struct.pack("<q", 0x1234567)
    end = struct.pack("<i", 0x1234567)
    return good.replace(rows, struct.pack("<q", 1 << 40)).replace(end, struct.pack("<i", 0x7FFFFFFF))


def _indexed(index: int) -> bytes:
    """Records whose places in a dictionary of two are made up."""
    indices = pa.Array.from_buffers(pa.int32(), 3, [None, pa.py_buffer(struct.pack("<3i", 0, index, 1))])
    gpa = pa.DictionaryArray.from_arrays(indices, pa.array([0, 8], pa.uint64()), safe=False)
    return arrow(pa.record_batch({"gpa": gpa}))


def index_past_the_dictionary() -> bytes:
    return _indexed(0x7FFFFFFF)


def index_below_the_dictionary() -> bytes:
    return _indexed(-1)


def dictionary_of_two_milliards() -> bytes:
    """A dictionary that says so of itself, and is not."""
    values = pa.array([0x0123456789ABCDEF] * 3, pa.uint64())
    good = arrow(pa.record_batch({"gpa": pa.DictionaryArray.from_arrays(pa.array([0] * 5, pa.int32()), values)}))
    length = struct.pack("<q", 3)
    return good.replace(length, struct.pack("<q", 1 << 31))


def many_deltas(count: int = 20_000) -> bytes:
    """A dictionary that grows by one value so many times."""
    schema = pa.schema([("gpa", pa.dictionary(pa.int32(), pa.uint64()))])
    values = np.arange(count, dtype=np.uint64)
    batches = [
        pa.record_batch([pa.DictionaryArray.from_arrays(pa.array([n], pa.int32()), pa.array(values[: n + 1]))], schema)
        for n in range(1, count, count // 400)
    ]
    return arrow(*batches, schema=schema, emit_dictionary_deltas=True)


def _claimed(codec: str, claim: int, name: str = "gpa") -> bytes:
    """A compressed buffer that says another length of itself than it has."""
    good = arrow(pa.record_batch({name: np.arange(100_000, dtype=np.uint64)}), compression=codec)
    true = struct.pack("<q", 800_000)
    assert good.count(true) == 1
    return good.replace(true, struct.pack("<q", claim))


def claims_more() -> bytes:
    """More than it has: what the records need is there, and that is all that is taken."""
    return _claimed("lz4", 1 << 40)


def claims_less() -> bytes:
    return _claimed("zstd", 8)


def claims_below_zero() -> bytes:
    return _claimed("lz4", -(1 << 40))


def claims_to_be_stored() -> bytes:
    """-1: as it is."""
    return _claimed("zstd", -1)


def holds_less() -> bytes:
    """Buffers of a thousand records where the batch says it has a million."""
    good = arrow(pa.record_batch({"gpa": np.full(0x2345, 8, np.uint64)}), compression="zstd")
    rows, size = struct.pack("<q", 0x2345), struct.pack("<q", 0x2345 * 8)
    return good.replace(rows, struct.pack("<q", 1_000_000)).replace(size, struct.pack("<q", 8_000_000))


def batches_ahead(mib: int = 8, count: int = 6) -> bytes:
    """Batches of that size that come to a few kilobytes each, so that as many as may be are decompressed at once."""
    batch = pa.record_batch({"gpa": np.zeros(mib << 17, np.uint64)})
    return arrow(*[batch] * count, compression="zstd")


def one_value_in_many_pages() -> bytes:
    """A column that is said to be the same everywhere, by a dictionary with a value that no column may have."""
    count = 1 << 19
    columns = {"gpa": pa.array(np.zeros(count, np.uint64)), "vcpu": pa.array(np.full(count, 70_000, np.int32))}
    return parquet(pa.table(columns), row_group_size=1 << 17)


def large_pages(mib: int = 48) -> bytes:
    """Six columns of one page each."""
    zeros = pa.array(np.zeros(mib << 17, np.uint64))
    names = ("gpa", "gva", "size", "vcpu", "access", "kind")
    sink = io.BytesIO()
    pq.write_table(
        pa.table(dict.fromkeys(names, zeros)),
        sink,
        compression="zstd",
        use_dictionary=False,
        data_page_size=1 << 30,
        row_group_size=mib << 17,
        max_rows_per_page=mib << 17,
    )
    return sink.getvalue()


def pages_of_runs(count: int = 1 << 20) -> bytes:
    """So many records in some hundred bytes, of a file that says it has one."""
    zeros = pa.array(np.zeros(count, np.uint64))
    return refooted(parquet(pa.table({"gpa": zeros, "size": zeros}), row_group_size=count), rows(1))


def one_argument_in_a_page() -> bytes:
    return parquet(pa.Table.from_batches([operations(_one_argument(pa.binary()))]))


def deltas_of_bytes() -> bytes:
    """Arguments of a page each that say only that they are as the one before."""
    arg = pa.array([bytes(4096 + 24)] * 4_000, pa.binary())
    return parquet(
        pa.Table.from_batches([operations(arg)]), use_dictionary=False, column_encoding={"arg": "DELTA_BYTE_ARRAY"}
    )


def parquet(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue()


def directory(groups: int = 1_000, columns: int = 2_000) -> bytes:
    """A Parquet file that is a directory: row groups of empty column chunks, three bytes each."""
    chunk = b"\x26\x00\x00"  # file_offset 0, end
    group = b"\x19\xfc" + _varint(columns) + chunk * columns + b"\x16\x00\x16\x00\x00"
    root = b"\x15\x02\x19\x1c\x48\x01r\x15\x00\x00\x16\x00\x19\xfc" + _varint(groups) + group * groups + b"\x00"
    return b"PAR1" + root + struct.pack("<I", len(root)) + b"PAR1"


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def shared_fields(count: int = 1_000_000, name: int = 0) -> bytes:
    """An Arrow schema whose columns are all one table of the flatbuffer, with a name so long: four bytes for each."""

    def table(*slots: int) -> bytes:
        return struct.pack(f"<HH{len(slots)}H", 4 + 2 * len(slots), 64, *slots)

    # vtables first, then tables that point back to them, then what they point forward to
    message_vtable, schema_vtable, field_vtable = table(4, 6, 8), table(0, 4), table(8 if name else 0, 0, 4)
    data = bytearray(4) + message_vtable + schema_vtable + field_vtable
    data += bytes(-len(data) % 8)
    message = len(data)
    data += struct.pack("<ihBxI", message - 4, 4, 1, 0)
    schema = len(data)
    struct.pack_into("<I", data, message + 8, schema - message - 8)
    data += struct.pack("<iI", schema - 4 - len(message_vtable), 4)
    vector = len(data)
    field = vector + 4 + 4 * count
    data += struct.pack("<I", count)
    data += (field - (vector + 4) - 4 * np.arange(count, dtype="<u4")).astype("<u4").tobytes()
    vtable = 4 + len(message_vtable) + len(schema_vtable)
    data += struct.pack("<iB3xI", field - vtable, 1, 4)  # type null; the name is next, if there is one
    data += struct.pack("<I", name) + b"n" * name
    struct.pack_into("<I", data, 0, message)
    data += bytes(-len(data) % 8)
    return b"\xff\xff\xff\xff" + struct.pack("<I", len(data)) + bytes(data) + b"\xff\xff\xff\xff\0\0\0\0"


def shared_name(kib: int = 512) -> bytes:
    """A thousand columns that share one long name."""
    return shared_fields(1_000, kib << 10)


def shared_metadata(count: int = 1_000, kib: int = 512) -> bytes:
    """A Parquet file with an Arrow schema whose columns are all one field, with metadata so long."""
    fields = [pa.field("n", pa.null(), metadata={"k": "v" * (kib << 10)})] + [pa.field("n", pa.null())] * (count - 1)
    sink = io.BytesIO()
    pa.ipc.new_stream(sink, pa.schema(fields)).close()
    data = bytearray(sink.getvalue())
    first = data.index(struct.pack("<I", count)) + 4  # the vector of the fields
    place = first + struct.unpack_from("<I", data, first)[0]
    data[first : first + 4 * count] = (place - first - 4 * np.arange(count, dtype="<u4")).astype("<u4").tobytes()
    names = [f"n{at}" for at in range(count)]
    table = pa.table({"gpa": pa.array([0], pa.uint64()), **{name: pa.array([0], pa.int8()) for name in names[1:]}})
    return with_arrow_schema(table, bytes(data))


def with_arrow_schema(table: pa.Table, schema: bytes) -> bytes:
    """A Parquet file that says it was made of columns of such a schema."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"ARROW:schema": base64.b64encode(schema).decode()})
    return sink.getvalue()


def empty_objects(mib: int = 60) -> bytes:
    return b'{"accesses": [' + b"{}," * (mib * MIB // 3) + b"{}]}"


def one_text(mib: int = 60) -> bytes:
    return b'"' + b"a" * (mib * MIB) + b'"'


def one_long_record(mib: int = 60) -> bytes:
    return b'{"accesses": [{"gpa": "' + b"0" * (mib * MIB) + b'"}]}'


def packed(body: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(body)


# Name: its media type, its maker, and what its refusal says. Whoever has little memory refuses all of them.
ATTACKS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "offsets": (ARROW, offsets_past_the_end, "arg"),
    "heap": (ARROW, window_on_the_heap, "arg"),
    "one-argument": (ARROW, one_argument_in_all_rows, "invlpg"),
    "unused-dictionaries": (ARROW, unused_dictionaries, ""),
    "dictionary": (ARROW, used_dictionary, "memory"),
    "deltas": (ARROW, deltas, "memory"),
    "batch": (ARROW, one_batch, "memory"),
    "runs-descend": (ARROW, runs_that_descend, "do not ascend"),
    "runs-below-zero": (ARROW, runs_below_zero, "do not ascend"),
    "runs-end-early": (ARROW, runs_that_end_early, "do not ascend"),
    "runs-without-end": (ARROW, runs_without_end, "may have up to 268435456 records"),
    "index-past": (ARROW, index_past_the_dictionary, "an index is not in its dictionary"),
    "index-below": (ARROW, index_below_the_dictionary, "an index is not in its dictionary"),
    "dictionary-claims": (ARROW, dictionary_of_two_milliards, "where its records need"),
    "many-deltas": (ARROW, many_deltas, ""),
    "claims-more": (ARROW, claims_more, ""),
    "claims-less": (ARROW, claims_less, "a buffer has 8 bytes"),
    "claims-below-zero": (ARROW, claims_below_zero, "a buffer has -"),
    "claims-stored": (ARROW, claims_to_be_stored, "where its records need"),
    "holds-less": (ARROW, holds_less, "where its records need"),
    "batches-ahead": (ARROW, batches_ahead, ""),
    "uniform": (PARQUET, one_value_in_many_pages, "vcpu must be an integer"),
    "shared-fields": (ARROW, shared_fields, "1024 columns"),
    "shared-name": (ARROW, shared_name, "a name has more than 256 bytes"),
    "pages": (PARQUET, large_pages, "memory"),
    "pages-of-runs": (PARQUET, pages_of_runs, "1048576 values, and the file 1 records"),
    "one-argument-in-a-page": (PARQUET, one_argument_in_a_page, "argument has up to 4120 bytes"),
    "deltas-of-bytes": (PARQUET, deltas_of_bytes, "encoded"),
    "shared-metadata": (PARQUET, shared_metadata, ""),
    "directory": (PARQUET, directory, "memory"),
    "objects": (JSON, empty_objects, "gpa is required"),
    "text": (JSON, one_text, "field accesses"),
    "text-in-a-line": (NDJSON, one_text, "longer than"),
    "long-record": (JSON, one_long_record, "a record has more than"),
}
