"""Tables of text: names, numbers, words, and rows at fault by their line."""

from __future__ import annotations

import io

import pytest

from engine.errors import TraceError
from engine.trace.readers import open_trace


def refused(body: bytes, **options) -> TraceError:
    with pytest.raises(TraceError) as caught:
        for _ in open_trace("csv", io.BytesIO(body), **options):
            pass
    return caught.value


@pytest.mark.parametrize("mark", [",", "\t", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_and_line_ends(read, words, mark: str, end: str) -> None:
    rows = (("vcpu", "gpa", "note", "size"), ("1", "0x10", "a", "4"), ("2", "32", "", "2"))
    table = end.join(mark.join(row) for row in rows)
    for body in (table, table + end, "\ufeff" + table):
        got = read("csv", body.encode())
        assert got.records.tolist() == words((16, 4, 1, 1), (32, 2, 1, 2))
        assert got.ignored == ("note",)


def test_named_columns(read, words) -> None:
    body = b"addr,len,rw,gpa,t\n0x10,4,r,9,7\n0x20,2,STORE,9,8\n0x30,1,2,9,9\n"
    got = read("csv", body, columns="gpa=addr,size=len,access=rw,time=t")
    assert got.records.tolist() == words((16, 4, 0, 0), (32, 2, 1, 0), (48, 1, 2, 0))
    assert got.carry["time"].tolist() == [7, 8, 9]
    assert got.ignored == ("gpa (unmapped)",)
    assert read("csv", body, columns="gpa=addr", carry=["len"]).carry["len"].tolist() == [4, 2, 1]


def test_auto_knows_tables(read) -> None:
    assert len(read("auto", b"gpa,size\n1,2\n").records) == 1
    assert len(read("auto", b"addr,size\n1,2\n", columns="gpa=addr").records) == 1
    with pytest.raises(TraceError, match=r"looks like a table without a column gpa: .* columns=gpa=NAME"):
        list(open_trace("auto", io.BytesIO(b"addr,size\n1,2\n")))


def test_names_in_capitals(read, words) -> None:
    got = read("auto", b"GPA,Size,ACCESS,Note\n0x10,4,W,a\n")
    assert got.records.tolist() == words((16, 4, 1, 0)) and got.ignored == ("Note",)
    assert read("auto", b"gpa,GPA\n1,2\n").ignored == ("GPA",)
    assert read("csv", b"SIZE,size\n1,2\n", columns="gpa=SIZE").records.tolist() == words((1, 2, 1, 0))


def test_a_table_of_linear_addresses() -> None:
    (chunk,) = open_trace("auto", io.BytesIO(b"gva,size\n0x10,4\n"))
    assert chunk.gva is not None and chunk.gva.tolist() == [16] and not chunk.has_gpa


@pytest.mark.parametrize(
    ("body", "columns", "rule"),
    [
        (b"", None, "has no line of names"),
        (b"addr,size\n1,2\n", None, "has no column gpa: name it with columns=gpa=NAME, of addr, size"),
        (b"addr,size\n1,2\n", "gpa=address", "names the column 'address' for gpa; the table has addr, size"),
        (b"a,a\n1,2\n", "gpa=a", "names the column 'a' for gpa"),
        (b"gpa,gpa\n1,2\n", None, "the column gpa occurs twice"),
        (b"gpa,size\n1,2\nzz,3\n", None, "line 3: "),
        (b"gpa,size\n1,2\n1\n", None, "line 3: "),
        (b"gpa,size\n1,2\n1,2,3\n", None, "line 3: "),
        (b"gpa,size\n1,2\n-1,3\n", None, "line 3: "),
        (b"gpa,size\n1,2\n0x1ffffffffffffffff,3\n", None, "line 3: "),
        (b"gpa,size\n1,2\n1\0,3\n", None, "line 3: "),
        (b"gpa,size\n1,2\n,3\n", None, "line 3: gpa must not be null"),
        (b"gpa,size\n1,2\n5,65536\n", None, "line 3: size must be an integer from 0 to 65535"),
        (b"gpa,size\n1,2\n5,0\n", None, "line 3: size must be from 1 to 65535"),
        (b"gpa,access\n1,r\n5,q\n", None, "access must be an integer from 0 to 255, or one of read"),
        (b"gpa,size\n1,2\n" + b"1" * 70_000 + b",2\n", None, "line 3: "),
    ],
)
def test_tables_at_fault(body: bytes, columns: str | None, rule: str) -> None:
    error = refused(body, columns=columns)
    assert rule in error.rule and len(error.rule) < 600


@pytest.mark.parametrize("columns", ["gpa", "gpa=", "other=x", "gpa=a,gpa=b", "=a", ","])
def test_what_columns_cannot_say(columns: str) -> None:
    assert refused(b"a,b\n1,2\n", columns=columns).field == "columns"


def test_columns_go_with_tables_only() -> None:
    with pytest.raises(TraceError, match="goes with csv; this is lackey"):
        list(open_trace("lackey", io.BytesIO(b" S 00004010,8\n"), columns="gpa=a"))


def test_a_line_without_end_is_not_held() -> None:
    assert "line 2: the line has more than 65536 bytes" in refused(b"gpa\n" + b"1" * 70_000).rule


def test_blocks(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace.readers.csv_tables.BLOCK_BYTES", 64)
    body = b"gpa,size\n" + b"".join(b"%d,8\n" % n for n in range(1000))
    assert read("csv", body).records[:, 0].tolist() == list(range(1000))
    assert "line 1002: " in refused(body + b"x,8\n").rule
