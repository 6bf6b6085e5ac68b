"""What holds for every body that has column names, whatever its encoding."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from engine.errors import InvalidValue, TraceError
from engine.trace.columns import CHUNK_RECORDS, COLUMNS, USABLE, MalformedBody
from engine.trace.option_names import FORMATS
from engine.trace.readers import open_trace


def table(**columns):
    return pa.table(columns)


def test_the_column_table_is_the_contract():
    usable = {c.name: (c.dtype, c.default) for c in COLUMNS if not c.beside}
    assert usable == {
        "gpa": ("<u8", None),
        "size": ("<u2", 8),
        "access": ("|u1", 1),
        "vcpu": ("<u2", 0),
        "gva": ("<u8", None),
        "kind": ("|u1", 0),
        "linear": ("|u1", 1),
        "source": ("|u1", 0),
        "insn_len": ("|u1", 0),
        "pc": ("<u8", None),
        "time": ("<u8", None),
        "value": ("binary", None),
    }
    beside = {c.name: (c.dtype, c.default) for c in COLUMNS if c.beside}
    assert beside == {"address_space": ("<u8", None), "op": ("|u1", 0), "arg": ("binary", None)}
    assert USABLE["gpa"].limit == 2**64 - 1 and USABLE["vcpu"].limit == 65535


def test_all_columns(named, read, words):
    name, encode = named
    body = encode(
        table(
            gpa=pa.array([0x1000, 2**64 - 1, 0], pa.uint64()),
            size=pa.array([1, 65535, 8], pa.uint16()),
            access=pa.array([0, 255, 2], pa.uint8()),
            vcpu=pa.array([7, 65535, 0], pa.uint16()),
            gva=pa.array([2**64 - 1, 5, 6], pa.uint64()),
        )
    )
    got = read(name, body)
    assert got.records.tolist() == words((0x1000, 1, 0, 7), (2**64 - 1, 65535, 255, 65535), (0, 8, 2, 0))
    assert got.gva.tolist() == [2**64 - 1, 5, 6]
    assert got.ignored == () and got.carry == {}


def test_defaults(named, read, words):
    name, encode = named
    got = read(name, encode(table(gpa=pa.array([4096], pa.uint64()))))
    assert got.records.tolist() == words((4096, 8, 1, 0))
    assert got.gva is None


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.int16(),
        pa.int32(),
        pa.int64(),
        pa.uint8(),
        pa.uint32(),
        pa.uint64(),
    ],
)
@pytest.mark.parametrize("column", ["gpa", "size", "access", "vcpu", "gva"])
def test_other_widths_are_converted(named, read, column, kind):
    name, encode = named
    columns = {"gpa": pa.array([1, 2, 3], pa.uint64())} | {column: pa.array([0, 1, 127], kind)}
    got = read(name, encode(table(**columns)))
    shift = {"size": 0, "access": 16, "vcpu": 32}
    if column == "gpa":
        assert got.records[:, 0].tolist() == [0, 1, 127]
    elif column == "gva":
        assert got.gva.tolist() == [0, 1, 127]
    else:
        mask = 0xFF if column == "access" else 0xFFFF
        assert [word >> shift[column] & mask for word in got.records[:, 1].tolist()] == [0, 1, 127]


@pytest.mark.parametrize(
    ("column", "kind", "value", "limit"),
    [
        ("gpa", pa.int64(), -1, 2**64 - 1),
        ("size", pa.int8(), -128, 65535),
        ("size", pa.uint32(), 65536, 65535),
        ("size", pa.uint64(), 2**64 - 1, 65535),
        ("size", pa.int32(), 2**31 - 1, 65535),
        ("access", pa.uint16(), 256, 255),
        ("access", pa.int8(), -1, 255),
        ("vcpu", pa.int64(), 2**40, 65535),
        ("gva", pa.int16(), -2, 2**64 - 1),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_index(named, read, column, kind, value, limit):
    name, encode = named
    count, bad = 70_000 if name in ("arrow", "parquet") else 9_000, 8_500
    values = np.ones(count, dtype=kind.to_pandas_dtype())
    values[bad] = value
    columns = {"gpa": pa.array(np.arange(count, dtype=np.uint64))} | {column: pa.array(values, kind)}
    with pytest.raises(TraceError) as caught:
        read(name, encode(table(**columns)))
    error = caught.value
    assert (error.index, error.field, int(error.value)) == (bad, column, value)
    assert str(limit) in error.rule


def test_kinds(named, read):
    """Byte 3: the kind in bits 2:0, the linear bits above, of which valid is turned over."""
    name, encode = named
    body = encode(
        table(
            linear=pa.array([1, 0, 3, 15, 1], pa.uint8()),
            gpa=pa.array([1, 2, 3, 4, 5], pa.uint64()),
            access=pa.array([1, 0, 2, 1, 0], pa.uint8()),
            kind=pa.array([0, 2, 0, 3, 4], pa.int32()),
        )
    )
    got = read(name, body)
    assert [word >> 16 for word in got.records[:, 1].tolist()] == [0x0001, 0x0A00, 0x1002, 0x7301, 0x0400]


def test_source_and_length(named, read):
    """Bits 63:48: the source in 49:48, the length of the instruction above."""
    name, encode = named
    body = encode(
        table(
            insn_len=pa.array([0, 15, 4], pa.int16()),
            gpa=pa.array([1, 2, 3], pa.uint64()),
            source=pa.array([2, 0, 1], pa.uint8()),
            vcpu=pa.array([0, 7, 65535], pa.uint16()),
        )
    )
    got = read(name, body)
    assert got.records[:, 1].tolist() == [
        8 | 1 << 16 | v << 32 | s << 48 | n << 50 for s, v, n in ((2, 0, 0), (0, 7, 15), (1, 65535, 4))
    ]


def test_a_kind_says_what_it_does(named, read):
    name, encode = named
    body = encode(table(gpa=pa.array(range(5), pa.uint64()), kind=pa.array(range(5), pa.uint8())))
    assert [word >> 16 & 0xFF for word in read(name, body).records[:, 1].tolist()] == [1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("column", "value", "limit"),
    [("kind", 5, 4), ("kind", 255, 4), ("linear", 16, 15), ("source", 3, 2), ("insn_len", 16, 15)],
)
def test_kinds_that_are_none(named, read, column, value, limit):
    name, encode = named
    body = encode(table(gpa=pa.array([1, 2, 3], pa.uint64()), **{column: pa.array([0, 1, value], pa.uint8())}))
    with pytest.raises(TraceError) as caught:
        read(name, body)
    error = caught.value
    assert (error.index, error.field, int(error.value)) == (2, column, value) and f"0 to {limit}" in error.rule


@pytest.mark.parametrize("carried", ["address_space", "arg", "gpa", "op", "size"])
def test_columns_with_a_meaning_are_not_carried(carried):
    with pytest.raises(TraceError) as caught:
        open_trace("arrow", None, carry=[carried])
    assert carried in caught.value.rule


def test_gpa_is_required(named, read):
    name, encode = named
    with pytest.raises(TraceError, match="gpa is required") as caught:
        read(name, encode(table(size=pa.array([8], pa.uint8()))))
    assert (caught.value.index, caught.value.field) == (0, "gpa")


@pytest.mark.parametrize("column", ["gpa", "size", "access", "vcpu", "gva", "extra"])
def test_nulls_are_refused_with_their_index(named, read, column):
    name, encode = named
    columns = {"gpa": pa.array([1, 2, 3], pa.uint64())} | {column: pa.array([1, None, None], pa.uint8())}
    with pytest.raises(TraceError, match="must not be null") as caught:
        read(name, encode(table(**columns)), carry=["extra"] if column == "extra" else ())
    assert (caught.value.index, caught.value.field) == (1, column)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1.0, 2.0]),
        pa.array([True, False]),
        pa.array(["one", "0x"]),
        pa.array([[1], [2]]),
        pa.array([{"a": 1}, {"a": 2}]),
    ],
    ids=["float", "bool", "string", "list", "struct"],
)
@pytest.mark.parametrize("column", ["gpa", "size", "access", "vcpu", "gva"])
def test_wrong_types(named, read, column, values):
    name, encode = named
    columns = {"gpa": pa.array([1, 2], pa.uint64())} | {column: values}
    with pytest.raises(TraceError) as caught:
        read(name, encode(table(**columns)))
    assert (caught.value.index, caught.value.field) == (0, column)
    assert not isinstance(caught.value, MalformedBody)


def test_other_columns_are_ignored_and_named(named, read):
    name, encode = named
    body = encode(
        table(
            flags=pa.array([1, None], pa.uint8()),
            gpa=pa.array([1, 2], pa.uint64()),
            comment=pa.array(["a", "b"]),
            nested=pa.array([[1], []]),
        )
    )
    got = read(name, body)
    assert got.ignored == ("flags", "comment", "nested")
    assert len(got.records) == 2


def test_carry(named, read):
    name, encode = named
    count = CHUNK_RECORDS + 5_000 if name in ("arrow", "parquet") else 20_000
    body = encode(
        table(
            pc_low32=pa.array(np.arange(count, dtype=np.uint32)),
            gpa=pa.array(np.arange(count, dtype=np.uint64)),
            as_id=pa.array(np.full(count, 3, dtype=np.uint8)),
            flags=pa.array(np.zeros(count, dtype=np.uint8)),
        )
    )
    got = read(name, body, carry=["as_id", "pc_low32", "as_id"])
    assert list(got.carry) == ["as_id", "pc_low32"]
    assert got.carry["pc_low32"].tolist() == list(range(count))
    assert set(got.carry["as_id"].tolist()) == {3}
    assert got.ignored == ("flags",)
    assert got.chunks > 1


def test_carry_of_a_column_that_does_not_exist(named, read):
    name, encode = named
    with pytest.raises(TraceError, match="does not exist") as caught:
        read(name, encode(table(gpa=pa.array([1], pa.uint64()))), carry=["pc"])
    assert (caught.value.field, caught.value.value) == ("carry", "pc")


def test_carry_of_a_string(named, read):
    name, encode = named
    with pytest.raises(TraceError) as caught:
        read(
            name,
            encode(table(gpa=pa.array([1], pa.uint64()), pc=pa.array(["here"]))),
            carry=["pc"],
        )
    assert caught.value.field == "pc"


PCS = [0xFFFFFFFF81123456, 0x401624]


def test_pc_and_time_go_along_unasked(named, read):
    name, encode = named
    body = encode(
        table(
            time=pa.array([5, 1 << 60], pa.uint64()),
            gpa=pa.array([1, 2], pa.uint64()),
            pc=pa.array(PCS, pa.uint64()),
            flags=pa.array([7, 8], pa.uint8()),
        )
    )
    for carry in ((), ("pc",), ("flags", "time")):
        got = read(name, body, carry=carry)
        assert set(got.carry) == {*carry, "pc", "time"}
        assert got.carry["pc"].dtype == got.carry["time"].dtype == np.uint64
        assert got.carry["pc"].tolist() == PCS and got.carry["time"].tolist() == [5, 1 << 60]
        assert got.ignored == (() if "flags" in carry else ("flags",))


def test_what_pc_cannot_be(named, read):
    name, encode = named
    for wrong in (pa.array([1, -1], pa.int64()), pa.array([1, None], pa.uint64())):
        with pytest.raises(TraceError) as caught:
            read(name, encode(table(gpa=pa.array([1, 2], pa.uint64()), pc=wrong)))
        assert (caught.value.field, caught.value.index) == ("pc", 1)


def test_values_are_known(named, read):
    name, encode = named
    if name in ("arrow", "parquet"):
        values = pa.array([b"\x01\x02", None], pa.binary())
        assert read(name, encode(table(gpa=pa.array([1, 2], pa.uint64()), value=values))).ignored == ()
    numbers = encode(table(gpa=pa.array([1, 2], pa.uint64()), value=pa.array([3, 4], pa.uint16())))
    assert read(name, numbers, carry=["value"]).carry["value"].tolist() == [3, 4]


def test_no_records(named, read):
    name, encode = named
    got = read(name, encode(table(gpa=pa.array([], pa.uint64()))))
    assert got.chunks == 0


@pytest.mark.parametrize("step", [1, 13, 100_000])
def test_sources_may_give_few_bytes_at_a_time(streamed, read, trickle, step):
    name, encode = streamed
    body = encode(table(gpa=pa.array(range(300), pa.uint64()), size=pa.array([4] * 300, pa.uint8())))
    got = read(name, trickle(body, step))
    assert got.records[:, 0].tolist() == list(range(300))


def test_a_failing_source_is_not_blamed_on_the_body(streamed):
    name, make = streamed

    class Failing:
        def __init__(self):
            self.left = make(table(gpa=pa.array([1, 2], pa.uint64())))[:9]

        def read(self, size=-1, /):
            piece, self.left = self.left[:size], self.left[size:]
            if not piece:
                raise ConnectionResetError("gone")
            return piece

    with pytest.raises(ConnectionResetError):
        list(open_trace(name, Failing()))


def test_unknown_format():
    with pytest.raises(InvalidValue) as caught:
        open_trace("tsv", None)
    assert (caught.value.field, caught.value.value) == ("format", "tsv")
    assert FORMATS == ("json", "ndjson", "arrow", "parquet", "packed")


def test_a_record_format_goes_with_packed_only(named):
    with pytest.raises(InvalidValue) as caught:
        open_trace(named[0], None, record="gpa8")
    assert caught.value.field == "record"
