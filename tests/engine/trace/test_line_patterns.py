"""The language of line patterns, each part by what it takes and what it leaves."""

from __future__ import annotations

import numpy as np
import pytest

from engine.trace.lines import patterns as p
from engine.trace.lines import scan


def rows_of(lines: list[p.Line], text: bytes, unknown: bool = False) -> tuple[int, list[list[int]]]:
    """Why the scan ended, and (address, size, access, tag, line) of its rows."""
    body = np.frombuffer(bytearray(text), dtype=np.uint8)
    rows = np.zeros((64, p.ROW_WORDS), dtype=np.int64)
    kept, registers = np.zeros(p.REGISTERS, dtype=np.int64), np.zeros(2 * p.REGISTERS, dtype=np.int64)
    place = np.zeros(scan.PLACE_WORDS, dtype=np.int64)
    counts = np.zeros(len(p.reasons(lines)), dtype=np.int64)
    shown = np.zeros((3, scan.SHOWN_WORDS), dtype=np.int64)
    program = p.compiled(lines)
    status = scan.scan(body, len(body), program, unknown, kept, registers, rows, counts, shown, place)
    return int(status), rows[: place[scan.ROWS], [p.ADDRESS, p.SIZE, p.ACCESS, p.TAG, p.LINE]].tolist()


def fields(*parts: p.Parts, text: bytes) -> list[int] | None:
    """(address, size, access) of the one row of one line, or None where the line does not fit."""
    status, rows = rows_of([p.record("x", *parts)], text + b"\n")
    assert status == (scan.NEEDS_TEXT if rows else scan.FOREIGN)
    return rows[0][:3] if rows else None


@pytest.mark.parametrize(
    ("part", "text", "value"),
    [
        (p.hexadecimal(0), b"0x10", 16),
        (p.hexadecimal(0), b"0XaBc", 0xABC),
        (p.hexadecimal(0), b"fffffffffffffffe", -2),
        (p.hexadecimal(0), b"0000ffffffffffffffff", -1),
        (p.hexadecimal(0), b"1ffffffffffffffff", None),
        (p.hexadecimal(0), b"0x", None),
        (p.hexadecimal(0), b"g", None),
        (p.hexadecimal(0), b"", None),
        (p.decimal(0), b"0042", 42),
        (p.decimal(0), b"9223372036854775799", 9223372036854775799),
        (p.decimal(0), b"9223372036854775808", None),
        (p.decimal(0), b"-1", None),
        (p.decimal(0), b"1f", None),
        (p.seconds(0), b"12.000102", 12_000_102_000),
        (p.seconds(0), b"0.5", 500_000_000),
        (p.seconds(0), b"7", 7_000_000_000),
        (p.seconds(0), b"1.1234567899", 1_123_456_789),
        (p.seconds(0), b"7.", None),
        (p.seconds(0), b"99999999999", None),
        (p.choice(0, read=1, write=2), b"write", 2),
        (p.choice(0, read=1, write=2), b"writ", None),
        (p.choice_of(0, {"r-": 5}), b"r-", 5),
        (p.constant(0, 9), b"", None),
    ],
)
def test_numbers_and_words(part: p.Part, text: bytes, value: int | None) -> None:
    if text:
        assert fields(part, text=text) == (None if value is None else [value, 0, 0])


def test_runs_and_gaps() -> None:
    assert fields(p.spaces(), p.text("a"), p.spaces(0), p.decimal(0), text=b" \t a7") == [7, 0, 0]
    assert fields(p.spaces(), p.decimal(0), text=b"7") is None
    assert fields(p.until(": "), p.text(": "), p.decimal(0), p.rest(), text=b"some: thing") is None
    assert fields(p.until(": "), p.text(": "), p.decimal(0), p.rest(), text=b"some:thing: 5, else") == [5, 0, 0]
    assert fields(p.until("!"), p.rest(), text=b"nothing") is None
    assert fields(p.decimal(0), p.copy(0, 1), p.constant(2, 3), text=b"8") == [8, 8, 3]


def test_what_may_be_missing() -> None:
    parts = (p.text("a"), *p.maybe(p.text(" LIN "), p.decimal(1)), p.text(" PHY "), p.decimal(0))
    assert fields(*parts, text=b"a LIN 3 PHY 4") == [4, 3, 0]
    assert fields(*parts, text=b"a PHY 4") == [4, 0, 0]
    assert fields(*parts, text=b"a LIN PHY 4") is None


def test_an_attempt_that_fails_leaves_registers_as_they_were() -> None:
    parts = (p.constant(1, 3), *p.maybe(p.decimal(1), p.text("!")), p.decimal(0))
    assert fields(*parts, text=b"8") == [8, 3, 0]
    assert fields(*p.repeated(p.hexadecimal(0), p.text(",")), p.rest(), text=b"1,2,3") == [2, 0, 0]


def test_words_before_others() -> None:
    parts = (p.within("store", ": "), p.until(": "), p.text(": "), p.decimal(0))
    assert fields(*parts, text=b"a store of: 5") == [5, 0, 0]
    assert fields(*parts, text=b"a load of: store: 5") is None
    assert fields(*parts, text=b"a load") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"1.5: x", 1_500_000_000),
        (b"CPU 0/KVM-42 [001] ..... 1204.000100: x", 1_204_000_100_000),
        (b"w 42 0.000000001: x", 1),
        (b"w-1.5: x", None),
        (b"w 15: x", None),
        (b"w 1.: x", None),
        (b"w 1.5 : x", None),
        (b"w 1.5", None),
        (b"w 1:2 3.5: x", 3_500_000_000),
    ],
)
def test_time_stamps(text: bytes, value: int | None) -> None:
    assert fields(p.stamp(0), p.text(" x"), text=text) == (None if value is None else [value, 0, 0])


def test_the_beginning_of_the_line_again() -> None:
    parts = (p.until("b="), p.text("b="), p.decimal(1), p.start(), p.until("a="), p.text("a="), p.decimal(0), p.rest())
    assert fields(*parts, text=b"a=4 b=5") == [4, 5, 0]
    assert fields(*parts, text=b"b=5 a=4") == [4, 5, 0]


def test_several_rows_of_a_line() -> None:
    each = p.repeated(p.text(", "), p.choice(p.ACCESS, load=0, store=1), p.text(" "), p.hexadecimal(0), p.emit(5))
    lines = [p.line("pc, …", p.decimal(1), each)]
    assert rows_of(lines, b"7, load 10, store 20\n8\n")[1] == [[16, 7, 0, 5, 1], [32, 7, 1, 5, 1]]
    status, rows = rows_of(lines, b"7, load 10, store\n")
    assert (status, rows) == (scan.FOREIGN, [])


def test_lines_are_tried_in_order_and_sure_ones_are_not_tried_again() -> None:
    lines = [
        p.record("a N", p.text("a "), p.sure(), p.decimal(0)),
        p.record("a x", p.text("a x"), tag=2),
        p.skip("remark", p.text("#")),
    ]
    assert rows_of(lines, b"# a\na 1\n")[1] == [[1, 0, 0, 0, 2]]
    assert rows_of(lines, b"a x\n")[0] == scan.BROKEN
    assert rows_of(lines, b"b\n")[0] == scan.FOREIGN
    assert rows_of(lines, b"b\n", unknown=True) == (scan.NEEDS_TEXT, [])


def test_registers_last_for_a_line_unless_they_are_kept() -> None:
    lines = [
        p.line("pc", p.text("pc "), p.decimal(p.SIZE), p.decimal(0), p.keep(p.SIZE)),
        p.line("set", p.text("set "), p.decimal(p.SIZE), p.keep(p.SIZE)),
        p.record("at", p.text("at "), p.hexadecimal(p.ADDRESS)),
    ]
    assert rows_of(lines, b"set 4\nat 1\nat 2\nset 5\nat 3\n")[1] == [[1, 4, 0, 0, 2], [2, 4, 0, 0, 3], [3, 5, 0, 0, 5]]


def test_a_scan_without_room_goes_on_where_it_was() -> None:
    line = p.record("x", p.decimal(0))
    assert rows_of([line], b"1\n" * 80)[0] == scan.FULL
