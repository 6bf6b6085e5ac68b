"""What the lines of a text format look like, as tables that a kernel follows.

A ``Line`` is a run of parts, each made by one of the functions below, and what becomes of a line that has them all: it
gives rows, or it is passed over for a reason. The lines of a format are tried in order; the first that fits is it. From
``sure`` on a line is of its pattern: one that then does not fit is broken, and no other is tried.

Numbers go into registers. A row is what all registers hold when it is given, ``ROW_WORDS`` 64-bit words; after the
line, registers are again what they were before it, but for those that ``keep`` names: they go on to later lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Registers with a meaning: what becomes of each is for ``trace.readers.lines``.
ADDRESS, SIZE, ACCESS, KIND, VCPU, GVA, PC, TIME, VALUE, SPACE, LINEAR = range(11)
# Whether VALUE is one; for what a format works out itself from several.
VALUED, A, B = 11, 12, 13
REGISTERS = 14
# And of each row: its tag, the number of its line (from 1), and where the line begins in the text.
TAG, LINE, AT = 14, 15, 16
ROW_WORDS = 17

# Operations; see the functions that make them.
LITERAL, SPACES, HEXADECIMAL, DECIMAL, SECONDS, CHOICE, CONSTANT, UNTIL, REST, SURE, END, EMIT, KEEP, COPY = range(14)
ATTEMPT, DONE, AGAIN, WITHIN, STAMP, START = range(14, 20)

# What becomes of a line.
GIVES, SKIPPED = 0, 1

# Why there are skipped lines in every format: the reasons before those of its own.
BLANK, UNKNOWN = 0, 1
COMMON_REASONS = ("blank line", "line of no known form")


class Part(NamedTuple):
    """One operation; ``a`` and ``b`` as it needs them. ``jump`` is relative to its own place."""

    code: int
    a: int = 0
    b: int = 0
    text: bytes = b""
    stop: bytes = b""
    choices: tuple[tuple[bytes, int], ...] = ()


Parts = Part | tuple[Part, ...]


class Line(NamedTuple):
    """One form of line. ``shape`` shows it to people; ``reason`` says why such a line is skipped, None: it is not."""

    shape: str
    parts: tuple[Part, ...]
    reason: str | None = None


class Program(NamedTuple):
    """Lines as arrays: int64[n, 3] operations with their two arguments, the bytes of all texts, int64[m, 3] choices
    (place and length of a text, value), int64[k, 3] lines (first operation, what becomes of it, reason).
    """

    ops: NDArray[np.int64]
    texts: NDArray[np.uint8]
    choices: NDArray[np.int64]
    lines: NDArray[np.int64]


def text(literal: str) -> Part:
    """Exactly this."""
    return Part(LITERAL, text=literal.encode())


def spaces(least: int = 1) -> Part:
    """At least so many spaces and tabs, and all that follow."""
    return Part(SPACES, least)


def hexadecimal(register: int) -> Part:
    """A hexadecimal number, with ``0x`` or without, of at most 64 bits."""
    return Part(HEXADECIMAL, register)


def decimal(register: int) -> Part:
    """A decimal number of at most 63 bits, without a sign."""
    return Part(DECIMAL, register)


def seconds(register: int) -> Part:
    """Decimal seconds, with a fraction of up to nine digits or without: nanoseconds."""
    return Part(SECONDS, register)


def choice(register: int, **values: int) -> Part:
    """One of these words, tried in order."""
    return choice_of(register, values)


def choice_of(register: int, values: dict[str, int]) -> Part:
    """The same for texts that are no words of Python."""
    return Part(CHOICE, register, choices=tuple((word.encode(), value) for word, value in values.items()))


def constant(register: int, value: int) -> Part:
    """Nothing of the line; the register gets the value."""
    return Part(CONSTANT, register, value)


def copy(register: int, target: int) -> Part:
    """Nothing of the line; ``target`` gets what ``register`` holds."""
    return Part(COPY, register, target)


def until(literal: str) -> Part:
    """Anything up to where this begins next."""
    return Part(UNTIL, text=literal.encode())


def within(literal: str, stop: str) -> Part:
    """Anything up to where this begins next, which is before ``stop`` does."""
    return Part(WITHIN, text=literal.encode(), stop=stop.encode())


def stamp(register: int) -> Part:
    """Anything up to a time stamp, ``SECONDS.FRACTION:`` at the beginning or after a space, and it: nanoseconds."""
    return Part(STAMP, register)


def start() -> Part:
    """Nothing of the line: what follows is from its beginning again."""
    return Part(START)


def rest() -> Part:
    """All that is left of the line."""
    return Part(REST)


def sure() -> Part:
    """From here on the line is of this form."""
    return Part(SURE)


def emit(tag: int = 0) -> Part:
    """A row of what the registers hold now. ``record`` gives one at the end of the line by itself."""
    return Part(EMIT, tag)


def keep(register: int) -> Part:
    """The register keeps its value for later lines, if the line fits."""
    return Part(KEEP, register)


def maybe(*parts: Parts) -> tuple[Part, ...]:
    """These or nothing, then with registers as before. Not within another."""
    inner = _flat(parts)
    return (Part(ATTEMPT, len(inner) + 2), *inner, Part(DONE))


def repeated(*parts: Parts) -> tuple[Part, ...]:
    """These as often as they come, also not at all. Not within another, and each time at least a byte."""
    inner = _flat(parts)
    return (Part(ATTEMPT, len(inner) + 2), *inner, Part(AGAIN, -len(inner) - 1))


def record(shape: str, *parts: Parts, tag: int = 0) -> Line:
    """A line that gives one row, at its end."""
    return Line(shape, (*_flat(parts), Part(END), emit(tag)))


def line(shape: str, *parts: Parts) -> Line:
    """A line that gives the rows that ``emit`` among its parts says, or none."""
    return Line(shape, (*_flat(parts), Part(END)))


def skip(reason: str, *parts: Parts) -> Line:
    """A line that begins so and is skipped, whatever follows."""
    return Line(reason, _flat(parts), reason)


def reasons(lines: Sequence[Line]) -> tuple[str, ...]:
    """Why lines of this format are skipped, in the order in which the kernel counts them."""
    return (*COMMON_REASONS, *dict.fromkeys(line.reason for line in lines if line.reason is not None))


def compiled(lines: Sequence[Line]) -> Program:
    """The lines as the kernel reads them."""
    texts = bytearray()
    ops: list[tuple[int, int, int]] = []
    choices: list[tuple[int, int, int]] = []
    heads: list[tuple[int, int, int]] = []
    numbers = {reason: number for number, reason in enumerate(reasons(lines))}
    for form in lines:
        does = (GIVES, 0) if form.reason is None else (SKIPPED, numbers[form.reason])
        heads.append((len(ops), *does))
        # A line that fits runs into DONE where nothing was attempted: the end.
        for part in (*form.parts, Part(DONE)):
            a, b = part.a, part.b
            if part.code in (LITERAL, UNTIL):
                a, b = len(texts), len(part.text)
                texts += part.text
            elif part.code == WITHIN:
                a, b = len(texts), len(part.text) << 16 | len(part.stop)
                texts += part.text + part.stop
            elif part.code == CHOICE:
                b = len(choices) << 16 | len(part.choices)
                for word, value in part.choices:
                    choices.append((len(texts), len(word), value))
                    texts += word
            ops.append((part.code, a, b))

    def table(rows: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
        return np.array(rows, dtype=np.int64).reshape(len(rows), 3)

    return Program(table(ops), np.frombuffer(bytearray(texts or b"\0"), dtype=np.uint8), table(choices), table(heads))


def _flat(parts: Sequence[Any]) -> tuple[Part, ...]:
    """Parts of which some are runs of parts; a Part is a tuple, too."""
    return tuple(one for part in parts for one in ((part,) if isinstance(part, Part) else part))
