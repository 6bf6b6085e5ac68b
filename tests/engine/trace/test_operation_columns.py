"""The columns op, arg and address_space of every body that has column names, and what an argument must be."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pytest

from engine.errors import TraceError
from engine.trace import operations as ops
from engine.trace.columns import TraceChunk
from engine.trace.operations import NO_SPACE, Operation, hypercall_of, operand_of
from engine.trace.readers import open_trace
from engine.trace.readers.rows import CHUNK_ROWS
from tests.engine.trace.conftest import arrow_body, parquet_body

FAST = 1 << 16
BINARY = {"arrow": arrow_body, "parquet": parquet_body}


def words(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def chunks(name: str, body: bytes, **options: Any) -> list[TraceChunk]:
    return [chunk.copy() for chunk in open_trace(name, io.BytesIO(body), **options)]


def one(name: str, body: bytes) -> TraceChunk:
    (only,) = chunks(name, body)
    return only


def rows_body(name: str, rows: list[dict[str, Any]]) -> bytes:
    if name == "json":
        return json.dumps({"accesses": rows}).encode()
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


CALL = words(2, 0x5000, 0)
TABLE = {
    "gpa": pa.array([0x1000, None, 0x2000, None, 0x3000], pa.uint64()),
    "vcpu": pa.array([0, 1, 2, 3, 4], pa.uint16()),
    "gva": pa.array([0x7000, None, 0x8000, 0x9000, 0xA000], pa.uint64()),
    "address_space": pa.array([0x100000, None, None, 0x200000, 0x300000], pa.uint64()),
    "op": pa.array([0, 1, 0, 3, 0], pa.uint8()),
}


DICTIONARY = pa.dictionary(pa.int8(), pa.binary())


@pytest.mark.parametrize(
    ("encoded", "kind"),
    [*((name, kind) for name in BINARY for kind in (pa.binary(), pa.large_binary())), ("arrow", DICTIONARY)],
)
def test_binary_columns(encoded: str, kind: pa.DataType) -> None:
    arg = pa.array([None, CALL, b"", None, None], pa.binary()).cast(kind)
    check(one(encoded, BINARY[encoded](pa.table({**TABLE, "arg": arg}))))


@pytest.mark.parametrize("encoded", ["json", "ndjson"])
def test_text_columns(encoded: str) -> None:
    rows = pa.table({**TABLE, "arg": pa.array([None, CALL.hex(), "", None, None])}).to_pylist()
    check(one(encoded, rows_body(encoded, rows)))
    assert [name for name, value in rows[1].items() if value is None] == ["gpa", "gva", "address_space"]
    check(one(encoded, rows_body(encoded, [{k: v for k, v in row.items() if v is not None} for row in rows])))


def check(chunk: TraceChunk) -> None:
    assert chunk.operations is not None and chunk.gva is not None
    found = chunk.operations
    assert found.at.tolist() == [1, 3]
    assert found.items == (
        Operation(1, ops.HYPERCALL, CALL, None, None),
        Operation(3, ops.INVLPG, None, 0x9000, 0x200000),
    )
    assert found.spaces.tolist() == [0x100000, NO_SPACE, NO_SPACE, 0x200000, 0x300000]
    assert [chunk.records[i, 0] for i in (0, 2, 4)] == [0x1000, 0x2000, 0x3000]
    assert (chunk.records[:, 1] >> 32).tolist() == [0, 1, 2, 3, 4]
    assert [chunk.gva[i] for i in (0, 2, 4)] == [0x7000, 0x8000, 0xA000]


def test_a_trace_without_these_columns_has_no_operations(named: Any) -> None:
    name, encode = named
    assert one(name, encode(pa.table({"gpa": pa.array([1], pa.uint64())}))).operations is None


@pytest.mark.parametrize("column", ["op", "address_space"])
def test_either_column_alone(named: Any, column: str) -> None:
    name, encode = named
    chunk = one(name, encode(pa.table({"gpa": pa.array([1], pa.uint64()), column: pa.array([0], pa.uint8())})))
    assert chunk.operations is not None and chunk.operations.items == ()
    assert set(chunk.operations.spaces.tolist()) <= ({NO_SPACE} if column == "op" else {0})
    assert column == "op" or len(chunk.operations.spaces) == 1


# ---- arguments

ARGUMENTS = [
    ({"op": 1}, "arg", "begins with 24 bytes"),
    ({"op": 1, "arg": ""}, "arg", "begins with 24 bytes"),
    ({"op": 1, "arg": words(2, 0)[:23].hex()}, "arg", "begins with 24 bytes"),
    ({"op": 1, "arg": (words(2, 0, 0) + bytes(4097)).hex()}, "arg", "at most 4096 bytes"),
    ({"op": 1, "arg": (words(FAST | 2, 0, 0) + bytes(104)).hex()}, "arg", "up to 96 bytes"),
    ({"op": 1, "arg": (words(FAST | 2, 0, 0) + bytes(7)).hex()}, "arg", "whole words"),
    ({"op": 2}, "arg", "operand in arg or in address_space"),
    ({"op": 2, "gva": 0x1000}, "arg", "operand in arg or in address_space"),
    ({"op": 2, "arg": "00"}, "arg", "a mov-cr3 has 8 bytes"),
    ({"op": 2, "arg": bytes(16).hex()}, "arg", "a mov-cr3 has 8 bytes"),
    ({"op": 3}, "arg", "linear address in arg or in gva"),
    ({"op": 3, "address_space": 0x1000}, "arg", "linear address in arg or in gva"),
    ({"op": 3, "arg": bytes(7).hex()}, "arg", "an? invlpg has 8 bytes"),
    ({"op": 0, "gpa": 1, "gva": 1, "arg": "00"}, "arg", "an access has no argument"),
    ({"op": 4}, "op", "0 to 3"),
    ({"op": -1}, "op", "0 to 3"),
    ({"op": 3, "gva": 1, "address_space": NO_SPACE}, "address_space", "0 to"),
]


@pytest.mark.parametrize(("row", "field", "rule"), ARGUMENTS)
def test_what_is_no_operation(named: Any, row: dict[str, Any], field: str, rule: str) -> None:
    name, encode = named
    first = {"gpa": 1, "gva": 1, "vcpu": 0}
    full = [{key: item.get(key) for key in ("gpa", "gva", "op", "arg", "address_space")} for item in (first, row)]
    full[0]["op"] = 0
    if name in ("json", "ndjson"):
        body = rows_body(name, full)
    else:
        kinds = {"gpa": pa.uint64(), "gva": pa.uint64(), "op": pa.int16(), "address_space": pa.uint64()}
        columns = {key: pa.array([item[key] for item in full], kind) for key, kind in kinds.items()}
        given = [None if item["arg"] is None else bytes.fromhex(item["arg"]) for item in full]
        body = encode(pa.table({**columns, "arg": pa.array(given, pa.binary())}))
    with pytest.raises(TraceError, match=rule) as caught:
        chunks(name, body)
    assert (caught.value.index, caught.value.field) == (1, field)


@pytest.mark.parametrize("arg", ["0", "0x00", "GG", "ABCD", "00 00", 5, [1], True])
@pytest.mark.parametrize("name", ["json", "ndjson"])
def test_an_argument_is_lower_case_hex(name: str, arg: Any) -> None:
    with pytest.raises(TraceError, match="lower-case hex") as caught:
        chunks(name, rows_body(name, [{"op": 3, "gva": 1}, {"op": 3, "arg": arg}]))
    assert (caught.value.index, caught.value.field) == (1, "arg")


@pytest.mark.parametrize("kind", [pa.string(), pa.uint64(), pa.list_(pa.uint8())])
def test_a_column_of_arguments_is_binary(kind: pa.DataType) -> None:
    body = arrow_body(pa.table({"gpa": pa.array([1], pa.uint64()), "arg": pa.array([None], kind)}))
    with pytest.raises(TraceError, match="binary") as caught:
        chunks("arrow", body)
    assert (caught.value.index, caught.value.field) == (0, "arg")


@pytest.mark.parametrize(("column", "rule"), [("gpa", "gpa"), ("gva", "gva"), ("size", "size")])
def test_an_access_has_what_an_operation_may_lack(named: Any, column: str, rule: str) -> None:
    name, encode = named
    columns = {"gpa": [1, None, 3], "gva": [1, None, 3], "size": [8, 8, 8], "op": [0, 3, 0]}
    columns[column][2] = None
    kinds = {"gpa": pa.uint64(), "gva": pa.uint64(), "size": pa.uint16(), "op": pa.uint8()}
    arrays = {key: pa.array(values, kinds[key]) for key, values in columns.items()}
    arg = [None, words(5), None] if name in ("arrow", "parquet") else [None, words(5).hex(), None]
    with pytest.raises(TraceError, match=rule) as caught:
        chunks(name, encode(pa.table({**arrays, "arg": pa.array(arg)})))
    assert caught.value.index == 2


@pytest.mark.parametrize("name", ["json", "ndjson"])
def test_rows_of_operations_do_not_decide_about_columns(name: str) -> None:
    """Of carried and ignored columns, and of gva, which accesses have in every row or in none."""
    rows = [{"op": 3, "gva": 1, "more": 1}] * CHUNK_ROWS + [
        {"gpa": 1, "gva": 2, "pc": 7},
        {"op": 2, "address_space": 0},
    ]
    first, second = chunks(name, rows_body(name, rows), carry=["pc"])
    assert first.operations is not None and len(first.operations.items) == CHUNK_ROWS and first.gva is None
    assert second.operations is not None and second.gva is not None and second.carry["pc"].tolist() == [7, 0]
    with pytest.raises(TraceError, match="gva"):
        chunks(name, rows_body(name, [*rows[-2:], {"gpa": 1, "pc": 7}]), carry=["pc"])
    with pytest.raises(TraceError, match="does not exist") as caught:
        chunks(name, rows_body(name, [*rows[-2:], {"gpa": 1, "gva": 1}]), carry=["pc"])
    assert caught.value.index == 2


@pytest.mark.parametrize("name", ["json", "ndjson"])
@pytest.mark.parametrize("late", [{"op": 3, "gva": 1}, {"gpa": 1, "address_space": 1}, {"gpa": 1, "arg": None}])
def test_these_columns_do_not_begin_late(name: str, late: dict[str, Any]) -> None:
    """What has been replayed before would have been replayed otherwise."""
    rows = [{"gpa": 1}] * CHUNK_ROWS
    with pytest.raises(TraceError, match="first records") as caught:
        chunks(name, rows_body(name, [*rows, late]))
    assert caught.value.index == CHUNK_ROWS
    parts = chunks(name, rows_body(name, [{"gpa": 1, "op": 0}, *rows, {"gpa": 1}]))
    assert [part.operations is None for part in parts] == [False, False]


def test_a_hypercall_taken_apart() -> None:
    slow = hypercall_of(Operation(0, ops.HYPERCALL, words(2, 0x5000, 7) + b"block", None, None))
    assert slow == (2, 0x5000, 7, (0,) * 6, b"block")
    assert hypercall_of(Operation(0, ops.HYPERCALL, words(2, 0x5000, 7), None, None)).block is None
    fast = hypercall_of(Operation(0, ops.HYPERCALL, words(FAST | 2, 1, 2, 3, 4, 5), None, None))
    assert fast == (FAST | 2, 1, 2, (3 | 4 << 64, 5, 0, 0, 0, 0), None)


def test_operands() -> None:
    assert operand_of(Operation(0, ops.MOV_CR3, words(1 << 63 | 5), None, 9)) == 1 << 63 | 5
    assert operand_of(Operation(0, ops.MOV_CR3, None, None, 9)) == 9
    assert operand_of(Operation(0, ops.INVLPG, words(7), 8, None)) == 7
    assert operand_of(Operation(0, ops.INVLPG, None, 8, None)) == 8
