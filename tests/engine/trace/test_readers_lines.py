"""Text of tools: line ends, lines that are skipped, lines that are at fault."""

from __future__ import annotations

import io
import tracemalloc

import pytest

from engine.errors import TraceError
from engine.trace.lines.scan import MAX_LINE_BYTES
from engine.trace.readers import open_trace
from engine.trace.readers.lines import BLOCK_BYTES
from engine.trace.taken import SHOWN_CHARACTERS, SHOWN_LINES

GOOD = b"I  00401000,4\n S 00004010,8\n"


def taken(body: bytes, **options):
    reader = open_trace("lackey", io.BytesIO(body), **options)
    for _ in reader:
        pass
    return reader.taken


def refused(body: bytes, format: str = "lackey", **options) -> TraceError:
    with pytest.raises(TraceError) as caught:
        for _ in open_trace(format, io.BytesIO(body), **options):
            pass
    return caught.value


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends(read, words, end: bytes, last: bool) -> None:
    body = GOOD.replace(b"\n", end)
    found = read("lackey", body if last else body.removesuffix(end))
    assert found.records.tolist() == words((0x401000, 4, 2, 0), (0x4010, 8, 1, 0))
    assert found.carry["pc"].tolist() == [0x401000, 0x401000]


def test_a_source_that_gives_little_at_a_time(read, trickle, words) -> None:
    assert read("lackey", trickle(GOOD * 3)).records.tolist() == words((0x401000, 4, 2, 0), (0x4010, 8, 1, 0)) * 3


def test_an_empty_body_and_a_byte_order_mark(read) -> None:
    assert len(read("lackey", b"").records) == 0
    assert len(read("lackey", b"\xef\xbb\xbf" + GOOD).records) == 2


def test_skipped_lines_are_counted_and_the_first_are_shown() -> None:
    said = b"==7== " + b"x" * 300 + b"\n"
    found = taken(said * 12 + b"\n" + GOOD + b"--7-- more\n")
    assert found.skipped == {"message of Valgrind": 13, "blank line": 1}
    assert [line.line for line in found.first] == list(range(1, SHOWN_LINES + 1))
    assert found.first[0].text == ("==7== " + "x" * 300)[:SHOWN_CHARACTERS]
    assert (found.format, found.address, found.sizes) == ("lackey", "process-virtual", "as recorded")


def test_what_a_terminal_would_act_on_is_not_shown() -> None:
    assert taken(b"==7== \x1b[2J\xff\n" + GOOD).first[0].text == "==7== \N{REPLACEMENT CHARACTER}[2J" + "\ufffd"


def test_lines_of_no_form_are_refused_unless_they_may_be_skipped() -> None:
    error = refused(GOOD + b"hello from the program\n" + GOOD)
    assert error.rule.startswith("line 3: the line is none of lackey, which has 'I  ADDRESS,SIZE', ' S ADDRESS,SIZE'")
    assert error.value == "hello from the program"
    assert error.index == 2
    found = taken(GOOD + b"hello from the program\n" + GOOD, skip_unknown=True)
    assert found.skipped == {"line of no known form": 1}


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b" S 0000401", "the line is not whole; lackey has ' S ADDRESS,SIZE' here"),
        (b" S ", "the line is not whole"),
        (b" S 00004010,", "the line is not whole"),
        (b" S 00004010,8 more", "the line is not whole"),
        (b" S 1ffffffffffffffff,8", "a number has more than 64 bits; lackey has ' S ADDRESS,SIZE' here"),
        (b" S 00004010,99999999999999999999", "a number has more than 64 bits"),
        (b" S 00004010,0", "size must be from 1 to 65535: ' S 00004010,0'"),
        (b" S 00004010,65536", "size must be from 1 to 65535"),
        (b" S 00004010,8\0", "the line has a NUL byte"),
        (b"==7== \0", "the line has a NUL byte"),
        (b"I", "the line is none of lackey"),
        (b"==7== " + b"x" * MAX_LINE_BYTES, f"the line has more than {MAX_LINE_BYTES} bytes"),
    ],
)
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_line_at_fault(line: bytes, rule: str, unknown: bool, end: bytes) -> None:
    if line == b"I" and unknown:
        return
    error = refused(GOOD + line + end, skip_unknown=unknown)
    assert error.rule.startswith(f"line 3: {rule}"), error.rule
    assert error.index == 2


def test_a_record_as_wide_as_can_be(read) -> None:
    found = read("lackey", b" S 0xffffffffffffffff,65535\n L 000000000000000000000000001,1\n")
    assert found.records[:, 0].tolist() == [(1 << 64) - 1, 1]


def test_mixed_formats_are_named() -> None:
    assert "no UTF-16" not in refused(GOOD + "I".encode("utf-16")).rule
    assert "is of no format that is recognised" in refused(b"something else\n", format="auto").rule


class Endless:
    """A line of a gigabyte."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1, /) -> bytes:
        piece = b"x" * min(self.left, size)
        self.left -= len(piece)
        return piece


@pytest.mark.parametrize("format", ["lackey", "auto"])
def test_an_endless_line_is_not_held(format: str) -> None:
    source = Endless(1 << 30)
    tracemalloc.start()
    with pytest.raises(TraceError):
        for _ in open_trace(format, source):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * BLOCK_BYTES
    assert source.left > (1 << 30) - 4 * BLOCK_BYTES


def test_lines_over_the_edge_of_a_block(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace.readers.lines.BLOCK_BYTES", 50)
    found = read("lackey", GOOD * 40)
    assert len(found.records) == 80
    assert set(found.records[1::2, 0].tolist()) == {0x4010}


def test_more_rows_than_there_is_room_for(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace.readers.lines.ROWS", 7)
    assert len(read("lackey", GOOD * 40).records) == 80


def test_carrying_what_the_format_has_not() -> None:
    with pytest.raises(TraceError, match="lackey has no column flags to carry"):
        for _ in open_trace("lackey", io.BytesIO(GOOD), carry=["flags"]):
            pass
