"""The kernel that takes lines apart by their patterns (``patterns``): one loop for every text format."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.jit import kernel
from engine.trace.lines import patterns as p

# Longer lines are of no format; nobody holds them.
MAX_LINE_BYTES = 1 << 16

# Why a scan comes back: all whole lines are done; no room for rows or for lines to show; a line that is at fault.
NEEDS_TEXT, FULL, FOREIGN, BROKEN, TOO_WIDE, TOO_LONG, HAS_NUL = range(7)

# What matching one line comes to, besides FULL, BROKEN and TOO_WIDE.
FITS, OTHER = 100, 101

# The words of a scan's place, which goes on with the next call: where the text was read up to, lines before that, rows
# and lines to show that were given, how many of the latter there may be, and which form a line at fault is of.
AT, LINES, ROWS, SHOWN, FORM = range(5)
PLACE_WORDS = 5
# A line to show: its number, where it begins and ends, the number of the reason.
SHOWN_WORDS = 4

_SPACE, _TAB, _CR, _LF, _X, _DOT, _COLON = 32, 9, 13, 10, 120, 46, 58
_BILLION = 1_000_000_000


@kernel
def digit_of(byte: Any) -> Any:
    """The value of a hexadecimal digit, -1 for anything else."""
    if 48 <= byte <= 57:
        return byte - 48
    lower = byte | 32
    if 97 <= lower <= 102:
        return lower - 87
    return -1


@kernel
def begins(text: Any, at: Any, end: Any, texts: Any, first: Any, length: Any) -> Any:
    """Whether some of ``texts`` is what the text has at a place."""
    if end - at < length:
        return False
    for i in range(length):  # noqa: SIM110 - numba compiles no generator
        if text[at + i] != texts[first + i]:
            return False
    return True


@kernel
def find(text: Any, at: Any, end: Any, texts: Any, first: Any, length: Any) -> Any:
    """Where some of ``texts`` is next; ``end`` if nowhere."""
    lead, last = texts[first], end - length
    while at <= last:
        if text[at] == lead and begins(text, at, end, texts, first, length):
            return at
        at += 1
    return end


@kernel
def number(text: Any, at: Any, end: Any, shift: Any) -> Any:
    """(value, where it ends; -1: none, -2: too wide) of a number in hexadecimal with ``shift``, else decimal."""
    if shift and end - at > 2 and text[at] == 48 and text[at + 1] | 32 == _X and digit_of(np.int64(text[at + 2])) >= 0:
        at += 2
    value, first = np.int64(0), at
    while at < end:
        digit = digit_of(np.int64(text[at]))
        if digit < 0:
            break
        if shift:
            if value >> 60 != 0:
                return np.int64(0), np.int64(-2)
            value = value << 4 | digit
        else:
            if digit > 9:
                break
            if value > 922337203685477579:
                return np.int64(0), np.int64(-2)
            value = value * 10 + digit
        at += 1
    return value, np.int64(at if at > first else -1)


@kernel
def nanoseconds(text: Any, at: Any, end: Any) -> Any:
    """The same of seconds with a fraction."""
    value, at = number(text, at, end, 0)
    if at < 0:
        return value, at
    if value > 9_000_000_000:
        return value, np.int64(-2)
    value = value * _BILLION
    if at < end and text[at] == _DOT:
        at += 1
        scale, first = np.int64(_BILLION), at
        while at < end and 48 <= text[at] <= 57:
            scale //= 10
            value += (np.int64(text[at]) - 48) * scale
            at += 1
        if at == first:
            return value, np.int64(-1)
    return value, at


@kernel
def stamped(text: Any, start: Any, at: Any, end: Any) -> Any:
    """(nanoseconds, behind its colon; -1: none) of the next time stamp."""
    begins_here = at == start or text[at - 1] == _SPACE
    while at < end:
        byte = text[at]
        if begins_here and 48 <= byte <= 57:
            value, behind = nanoseconds(text, at, end)
            if 0 <= behind < end and text[behind] == _COLON and text[behind - 1] != _DOT:
                i = at
                while i < behind and text[i] != _DOT:
                    i += 1
                if i < behind:
                    return value, behind + 1
        begins_here = byte == _SPACE
        at += 1
    return np.int64(0), np.int64(-1)


@kernel
def give(rows: Any, used: Any, registers: Any, tag: Any, line: Any, start: Any) -> None:
    """Fill a row."""
    for i in range(p.REGISTERS):
        rows[used, i] = registers[i]
    rows[used, p.TAG] = tag
    rows[used, p.LINE] = line
    rows[used, p.AT] = start


@kernel
def save(registers: Any) -> None:
    """Keep what registers hold, for an attempt that fails."""
    for i in range(p.REGISTERS):
        registers[p.REGISTERS + i] = registers[i]


@kernel
def match(
    text: Any, start: Any, end: Any, op: Any, program: Any, kept: Any, registers: Any, rows: Any, place: Any
) -> Any:
    """Try one form of line, whose operations begin with ``op``, on a line. Its rows count only if it FITS."""
    ops, texts, choices = program.ops, program.texts, program.choices
    at, used, keeping = start, place[ROWS], np.int64(0)
    sure = False
    again, again_at, again_used = np.int64(-1), start, used
    for i in range(p.REGISTERS):
        registers[i] = kept[i]
    while True:
        code, a, b = ops[op, 0], ops[op, 1], ops[op, 2]
        failed = False
        if code == p.LITERAL:
            failed = not begins(text, at, end, texts, a, b)
            at += b
        elif code == p.SPACES:
            first = at
            while at < end and (text[at] == _SPACE or text[at] == _TAB):
                at += 1
            failed = at - first < a
        elif code == p.HEXADECIMAL or code == p.DECIMAL or code == p.SECONDS:
            if code == p.SECONDS:
                value, behind = nanoseconds(text, at, end)
            else:
                value, behind = number(text, at, end, 4 if code == p.HEXADECIMAL else 0)
            if behind == -2 and sure:
                return TOO_WIDE
            failed = behind < 0
            registers[a] = value
            at = behind
        elif code == p.CHOICE:
            failed = True
            for i in range(b >> 16, (b >> 16) + (b & 0xFFFF)):
                if begins(text, at, end, texts, choices[i, 0], choices[i, 1]):
                    registers[a] = choices[i, 2]
                    at += choices[i, 1]
                    failed = False
                    break
        elif code == p.CONSTANT:
            registers[a] = b
        elif code == p.COPY:
            registers[b] = registers[a]
        elif code == p.UNTIL:
            at = find(text, at, end, texts, a, b)
            failed = at >= end
        elif code == p.WITHIN:
            length = b >> 16
            limit = find(text, at, end, texts, a + length, b & 0xFFFF)
            at = find(text, at, min(limit + length, end), texts, a, length)
            failed = at >= limit
        elif code == p.STAMP:
            value, behind = stamped(text, start, at, end)
            failed = behind < 0
            registers[a] = value
            at = behind
        elif code == p.START:
            at = start
        elif code == p.REST:
            at = end
        elif code == p.SURE:
            sure = True
        elif code == p.END:
            failed = at != end
        elif code == p.EMIT:
            if used == rows.shape[0]:
                return FULL
            give(rows, used, registers, a, place[LINES] + 1, start)
            used += 1
        elif code == p.KEEP:
            keeping |= np.int64(1) << a
        elif code == p.ATTEMPT:
            again, again_at, again_used = op + a, at, used
            save(registers)
        elif code == p.AGAIN:
            if at == again_at:
                again = np.int64(-1)
            else:
                op += a
                again_at, again_used = at, used
                save(registers)
        elif again < 0:
            break
        else:
            again = np.int64(-1)
        if failed:
            if again < 0:
                return BROKEN if sure else OTHER
            op, at, used, again = again, again_at, again_used, np.int64(-1)
            for i in range(p.REGISTERS):
                registers[i] = registers[p.REGISTERS + i]
        else:
            op += 1
    place[ROWS] = used
    for i in range(p.REGISTERS):
        if keeping >> i & 1:
            kept[i] = registers[i]
    return FITS


@kernel
def line_end(text: Any, at: Any, end: Any) -> Any:
    """(where a line ends, or -1 for nowhere in this text; whether it has a NUL byte before that)."""
    nul = False
    while at < end:
        byte = text[at]
        if byte == _LF:
            return np.int64(at), nul
        nul = nul or byte == 0
        at += 1
    return np.int64(-1), nul


@kernel
def scan(
    text: Any,
    end: Any,
    program: Any,
    unknown: Any,
    kept: Any,
    registers: Any,
    rows: Any,
    counts: Any,
    shown: Any,
    place: Any,
) -> Any:
    """Take whole lines of ``text`` apart up to ``end``; go on by calling again with what moves the cause aside.

    ``unknown``: whether lines of no form are skipped. ``kept`` int64[REGISTERS], ``registers`` twice as many; ``rows``
    int64[n, ROW_WORDS]; ``counts`` int64[reasons] skipped lines, ``shown`` int64[m, SHOWN_WORDS] the first of them,
    ``place`` int64[PLACE_WORDS]. Returns why it came back; the place then is at the line that it is about.
    """
    lines = program.lines
    while True:
        start = place[AT]
        newline, nul = line_end(text, start, end)
        if newline < 0:
            return HAS_NUL if nul else NEEDS_TEXT if end - start <= MAX_LINE_BYTES else TOO_LONG
        if newline - start > MAX_LINE_BYTES:
            return TOO_LONG
        if nul:
            return HAS_NUL
        stop = newline
        if stop > start and text[stop - 1] == _CR:
            stop -= 1
        reason = np.int64(p.BLANK if stop == start else -1)
        form, fits = np.int64(0), stop == start
        while not fits and form < lines.shape[0]:
            status = match(text, start, stop, lines[form, 0], program, kept, registers, rows, place)
            if status == FITS:
                fits = True
                if lines[form, 1] == p.SKIPPED:
                    reason = lines[form, 2]
            elif status == OTHER:
                form += 1
            else:
                place[FORM] = form
                return status
        if not fits:
            if not unknown:
                return FOREIGN
            reason = np.int64(p.UNKNOWN)
        if reason >= 0:
            counts[reason] += 1
            if place[SHOWN] < shown.shape[0]:
                shown[place[SHOWN], 0] = place[LINES] + 1
                shown[place[SHOWN], 1] = start
                shown[place[SHOWN], 2] = stop
                shown[place[SHOWN], 3] = reason
                place[SHOWN] += 1
        place[LINES] += 1
        place[AT] = newline + 1
