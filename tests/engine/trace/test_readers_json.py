"""JSON documents and NDJSON."""

from __future__ import annotations

import io
import json

import pytest

from engine.errors import TraceError
from engine.trace.columns import MalformedBody
from engine.trace.readers import open_trace
from engine.trace.readers.json_bodies import BLOCK_BYTES, MAX_LINE_BYTES
from engine.trace.readers.rows import CHUNK_ROWS, MAX_IGNORED_COLUMNS


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def document(*rows):
    return b'{"accesses": [' + b",".join(lines(row) for row in rows) + b"]}"


BOTH = pytest.mark.parametrize(("name", "body"), [("json", document), ("ndjson", lines)])


@BOTH
def test_integers_as_text(read, words, name, body):
    got = read(
        name,
        body(
            {"gpa": "0x1F", "size": "2"},
            {"gpa": "0XfFfFfFfFfFfFfFfF", "vcpu": "0x0a"},
            {"gpa": "18446744073709551615", "access": "00"},
            {"gpa": 7},
        ),
    )
    top = 2**64 - 1
    assert got.records.tolist() == words((31, 2, 1, 0), (top, 8, 1, 10), (top, 8, 0, 0), (7, 8, 1, 0))


@BOTH
def test_a_column_of_hexadecimal_text(read, name, body):
    got = read(name, body(*({"gpa": hex(i << 12), "size": hex(i % 7)} for i in range(100))))
    assert got.records[:, 0].tolist() == [i << 12 for i in range(100)]


@BOTH
@pytest.mark.parametrize(
    "value",
    [
        "",
        "0x",
        "x10",
        "-1",
        "+1",
        " 1",
        "1 ",
        "0x1\n",
        "0x1\n0x2",
        "1_000",
        "0b1",
        "0o7",
        "1e3",
        "\u0663",
        "0x10000000000000000",
        *["18446744073709551616", "0" * 21, 2**64, -1, 1.0, 1e3, True, [1], {"a": 1}],
    ],
)
def test_what_is_not_an_integer(read, name, body, value):
    with pytest.raises(TraceError) as caught:
        read(name, body({"gpa": "0x1"}, {"gpa": value}, {"gpa": value}))
    assert (caught.value.index, caught.value.field, caught.value.value) == (
        1,
        "gpa",
        value,
    )
    assert not isinstance(caught.value, MalformedBody)


@BOTH
def test_numbers_beyond_any_type(read, name, body):
    with pytest.raises(TraceError) as caught:
        read(name, body({"gpa": 1}, '{"gpa": 1e999}'))
    assert caught.value.index == 1 and not isinstance(caught.value, MalformedBody)


@BOTH
def test_rows_may_leave_out_what_has_a_default(read, words, name, body):
    got = read(
        name,
        body(
            {"gpa": 1, "size": 2},
            {"gpa": 2},
            {"vcpu": 3, "gpa": 3},
            {"gpa": 4, "access": 2, "size": 1},
        ),
    )
    assert got.records.tolist() == words((1, 2, 1, 0), (2, 8, 1, 0), (3, 8, 1, 3), (4, 1, 2, 0))


@BOTH
def test_defaults_come_back_in_a_later_chunk(read, words, name, body):
    rows = [{"gpa": i, "size": 1, "vcpu": 5} for i in range(CHUNK_ROWS)] + [{"gpa": i} for i in range(CHUNK_ROWS)]
    got = read(name, body(*rows))
    assert got.records[:CHUNK_ROWS].tolist() == words(*((i, 1, 1, 5) for i in range(CHUNK_ROWS)))
    assert got.records[CHUNK_ROWS:].tolist() == words(*((i, 8, 1, 0) for i in range(CHUNK_ROWS)))


@BOTH
@pytest.mark.parametrize("first", [{"gpa": 1}, {"gpa": 1, "gva": 1}])
@pytest.mark.parametrize("distance", [1, CHUNK_ROWS + 3])
def test_gva_is_in_every_row_or_in_none(read, name, body, first, distance):
    other = {"gpa": 1} if "gva" in first else {"gpa": 1, "gva": 1}
    with pytest.raises(TraceError, match="gva") as caught:
        read(name, body(*[first] * distance, other))
    assert caught.value.index == distance


@BOTH
@pytest.mark.parametrize("row", [5, None, [1], "text", True])
def test_a_record_is_an_object(read, name, body, row):
    with pytest.raises(TraceError, match="object") as caught:
        read(name, body({"gpa": 1}, row if not isinstance(row, str) else '"text"'))
    assert caught.value.index == 1 and not isinstance(caught.value, MalformedBody)


@BOTH
@pytest.mark.parametrize("row", [{}, {"size": 8}, {"size": 8, "vcpu": 1}])
def test_gpa_is_missing_in_one_row(read, name, body, row):
    with pytest.raises(TraceError, match="gpa is required") as caught:
        read(name, body({"gpa": 1}, {"gpa": 1}, row))
    assert caught.value.index == 2


@BOTH
def test_a_carried_key_is_in_every_row(read, name, body):
    got = read(name, body({"gpa": 1, "pc": "0x5"}, {"pc": 2**64 - 1, "gpa": 1}), carry=["pc"])
    assert got.carry["pc"].tolist() == [5, 2**64 - 1]
    with pytest.raises(TraceError, match="does not exist") as caught:
        read(name, body({"gpa": 1, "pc": 5}, {"gpa": 1}), carry=["pc"])
    assert caught.value.index == 1
    with pytest.raises(TraceError) as caught:
        read(name, body({"gpa": 1, "pc": 5}, {"gpa": 1, "pc": -5}), carry=["pc"])
    assert (caught.value.index, caught.value.field, caught.value.value) == (1, "pc", -5)


@BOTH
def test_ignored_columns_of_all_rows(read, name, body):
    got = read(
        name,
        body({"gpa": 1, "b": 1}, {"a": None, "gpa": 1}, {"gpa": 1, "b": {"deep": [1.5]}}),
    )
    assert got.ignored == ("b", "a")


@BOTH
def test_names_to_ignore_are_bounded(read, name, body):
    rows = [{"gpa": 1, f"column{i}": 1} for i in range(MAX_IGNORED_COLUMNS + 1)]
    assert len(read(name, body(*rows[:-1])).ignored) == MAX_IGNORED_COLUMNS
    with pytest.raises(TraceError) as caught:
        read(name, body(*rows))
    assert caught.value.index == MAX_IGNORED_COLUMNS


MALFORMED = [
    "{",
    '{"gpa": 1',
    '{"gpa": 01}',
    '{"gpa": NaN}',
    '{"gpa": 1,}',
    "{'gpa': 1}",
    '{"gpa": 1} {"gpa": 2}',
    "nul",
    "[" * 9_000,
]


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_lines(read, line):
    with pytest.raises(MalformedBody) as caught:
        read("ndjson", lines({"gpa": 1}, "", "  ", line, {"gpa": 2}))
    assert caught.value.index == 1
    assert caught.value.code == "malformed-body"
    assert caught.value.rule.startswith("line 4: ") and str(caught.value) == caught.value.rule


@pytest.mark.parametrize("line", [*MALFORMED, '{"gpa": 1}, '])
def test_malformed_rows(read, line):
    with pytest.raises(MalformedBody):
        read("json", document({"gpa": 1}, line, {"gpa": 2}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"accesses": [',
        b'{"accesses": [{"gpa": 1}',
        b'{"accesses": []}x',
        b"\xff\xfe",
    ],
)
def test_malformed_documents(read, body):
    with pytest.raises(MalformedBody):
        read("json", body)


def test_malformed_text(read):
    for name, body in (
        ("json", b'{"accesses": [{"gpa": "\xff"}]}'),
        ("ndjson", b'{"gpa": "\xff"}'),
    ):
        with pytest.raises(MalformedBody):
            read(name, body)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"5",
        b"null",
        b'"accesses"',
        b'{"accesses": {}}',
        b'{"accesses": null}',
        b'{"accesses": 5}',
        b"{}",
    ],
)
def test_a_document_of_another_shape_is_well_formed_but_refused(read, body):
    with pytest.raises(TraceError) as caught:
        read("json", body)
    assert caught.value.field == "accesses" and not isinstance(caught.value, MalformedBody)


def test_unknown_fields_of_the_document_are_refused(read):
    with pytest.raises(TraceError) as caught:
        read("json", b'{"accesses": [], "acesses": []}')
    assert caught.value.field == "acesses" and not isinstance(caught.value, MalformedBody)


def test_a_document_is_read_while_it_arrives():
    row = b'{"gpa": 4096, "note": {"a": "},", "b": [1]}},'
    source = io.BytesIO(b'{"accesses": [' + row * (1 << 17))
    first = next(iter(open_trace("json", source)))
    assert len(first.records) == CHUNK_ROWS and source.tell() <= 1 << 20


def test_a_comma_in_front_of_nothing(read):
    for body in (
        b'{"accesses": [{"gpa": 1},]}',
        b'{"accesses": [,{"gpa": 1}]}',
        b'{"accesses": [{"gpa": 1},,{"gpa": 1}]}',
    ):
        with pytest.raises(MalformedBody):
            read("json", body)


def test_ndjson_line_ends(read):
    one = b'{"gpa": 1}'
    for body in (
        b"",
        b"\n",
        b"\r\n \n",
        one,
        one + b"\n",
        b"\n\n" + one + b"\r\n\r\n",
        b"  " + one + b"  ",
    ):
        assert len(read("ndjson", body).records) == body.count(one)


def test_ndjson_blocks(read, trickle):
    count = 3 * BLOCK_BYTES // 20
    body = lines(*({"gpa": 10**9 + i} for i in range(count)))
    for source in (body, body + b"\n", trickle(body, 4_099)):
        got = read("ndjson", source)
        assert got.records[:, 0].tolist() == list(range(10**9, 10**9 + count))
        assert got.chunks > count // CHUNK_ROWS


def test_ndjson_line_number_in_a_later_block(read):
    count = 3 * BLOCK_BYTES // 20
    with pytest.raises(TraceError, match=f"^line {count + 1}: ") as caught:
        read("ndjson", lines(*({"gpa": 10**9} for _ in range(count)), {"gpa": -1}))
    assert caught.value.index == count


def test_ndjson_long_lines(read):
    def padded(length):
        return b'{"gpa": 1' + b" " * (length - 10) + b"}"

    assert len(read("ndjson", padded(MAX_LINE_BYTES) + b"\n" + padded(MAX_LINE_BYTES)).records) == 2
    for body in (
        padded(MAX_LINE_BYTES + 1),
        padded(MAX_LINE_BYTES + 1) + b"\n",
        b" " * (8 * MAX_LINE_BYTES),
    ):
        with pytest.raises(TraceError, match="line 3 is longer") as caught:
            read("ndjson", lines({"gpa": 1}, {"gpa": 2}) + b"\n" + body)
        assert caught.value.index == 2 and not isinstance(caught.value, MalformedBody)


@pytest.mark.parametrize("nest", [b"[", b'{"gpa":'])
def test_a_record_that_nests_without_end_is_not_read_on(read, nest):
    class Endless:
        given = 0

        def read(self, size=-1, /):
            self.given += 1
            return b'{"accesses": [{"gpa": 1}, ' + nest * 4_096 if self.given == 1 else nest * 4_096

    source = Endless()
    with pytest.raises(MalformedBody, match="nested more than 16 deep") as caught:
        read("json", source)
    assert caught.value.index == 1
    assert source.given * 4_096 * len(nest) <= 4 * BLOCK_BYTES


def test_ndjson_is_read_while_it_arrives():
    class Endless:
        def __init__(self):
            self.given = 0

        def read(self, size=-1, /):
            self.given += 1
            return b'{"gpa": 4096}\n' * 4_096

    source = Endless()
    first = next(iter(open_trace("ndjson", source)))
    assert len(first.records) == CHUNK_ROWS
    assert source.given * 4_096 * 14 <= BLOCK_BYTES + 4_096 * 14
