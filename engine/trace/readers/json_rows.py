"""The records of a JSON document, taken out of it while it arrives.

The document is never held: a body of some kilobytes can unpack to gigabytes of empty objects, or to one endless text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from engine.errors import TraceError
from engine.trace.columns import MalformedBody
from engine.trace.readers.base import Source, read_up_to
from engine.trace.readers.rows import RowConverter

MAX_LINE_BYTES = 1 << 20  # of one record
BLOCK_BYTES = 1 << 18  # read at a time
MAX_HEAD_BYTES = 2 * BLOCK_BYTES  # up to the first record, and read at first
MAX_DEPTH = 16  # of what is in a record, itself included; a record of the format has at most 3

_HEAD = re.compile(rb'[ \t\r\n]*+\{[ \t\r\n]*+("(?:[^"\\]|\\.)*+")[ \t\r\n]*+:[ \t\r\n]*+\[', re.DOTALL)
_END = re.compile(rb"\][ \t\r\n]*+\}[ \t\r\n]*+\Z")
# What shapes a document: brackets, commas and texts; a text that is cut off has no group 1.
_TOKEN = re.compile(rb'[{}\[\],]|"(?:[^"\\]|\\.)*+(")?', re.DOTALL)

_document = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])
_text = msgspec.json.Decoder(str)

Texts = Sequence[bytes | msgspec.Raw]
_SHAPE = "the body must be an object whose field accesses is an array"


class _Split(NamedTuple):
    """The whole records at the start of some text, where they end, and whether the array does."""

    rows: Texts
    end: int
    closed: bool


class DocumentRows:
    """Iterates over runs of records, undecoded. Raises TraceError, MalformedBody for what is not JSON.

    ``converter`` is who knows how many records there were before.
    """

    def __init__(self, source: Source, converter: RowConverter) -> None:
        self._source = source
        self._converter = converter

    def __iter__(self) -> Iterator[Texts]:
        text, ended = self._head()
        first = True
        while True:
            split = _split(text, ended, self._converter.done)
            if split.closed and not first and not split.rows:
                raise MalformedBody("the body is not JSON: a comma has no record after it", index=self._converter.done)
            if split.rows:
                yield split.rows
                first = False
            text = text[split.end :]
            if split.closed:
                self._tail(text)
                return
            if ended and not split.rows:
                raise MalformedBody("the body is not JSON: it is cut off", index=self._converter.done)
            if len(text) > MAX_LINE_BYTES:
                rule = f"a record has more than {MAX_LINE_BYTES} bytes"
                raise TraceError(rule, index=self._converter.done)
            if not ended:
                piece = read_up_to(self._source, BLOCK_BYTES)
                ended = len(piece) < BLOCK_BYTES
                text += piece

    def _head(self) -> tuple[bytes, bool]:
        """What follows the opening of the array, as far as it was read, and whether that is all of the body."""
        text = bytes(read_up_to(self._source, MAX_HEAD_BYTES))
        ended = len(text) < MAX_HEAD_BYTES
        found = _HEAD.match(text)
        if found is None and not ended:
            raise TraceError(_SHAPE, field="accesses")
        if found is None:
            _diagnose(text)
            raise TraceError(_SHAPE, field="accesses")
        try:
            name = _text.decode(found[1])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedBody(f"the body is not JSON: {error}") from error
        if name != "accesses":
            raise TraceError("the body has the field accesses and no other", field=name)
        return text[found.end() :], ended

    def _tail(self, text: bytes) -> None:
        """What follows the array: the end of the object, and nothing else."""
        while len(text := text.lstrip(b" \t\r\n")) < MAX_HEAD_BYTES:
            piece = read_up_to(self._source, BLOCK_BYTES)
            if not piece:
                break
            text += piece
        if text != b"}":
            _diagnose(b'{"accesses": []' + text)
            raise TraceError("the body has the field accesses once", field="accesses")


def _split(text: bytes, ended: bool, done: int) -> _Split:
    """Where the records of a text end, found by where one seems to and by decoding what is before it.

    There were ``done`` records before it. Raises MalformedBody where one is nested too deep.
    """
    if ended:
        end = _END.search(text, max(0, text.rfind(b"]")))
        at, closed = (end.start() if end else -1), True
    else:
        at, closed = text.rfind(b"},") + 1, False
    if at > 0:
        try:
            return _Split(_list.decode(b"[" + text[:at] + b"]"), at + 1, closed)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
    return _scanned(text, done)


def _scanned(text: bytes, done: int) -> _Split:
    """The same by looking at each bracket. What is between two commas is a record, whatever it is."""
    rows: list[bytes] = []
    start = depth = 0
    for token in _TOKEN.finditer(text):
        mark = token[0][:1]
        if mark == b'"':
            if token[1] is None:
                break
        elif mark in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                rule = f"the body is not JSON of records: one is nested more than {MAX_DEPTH} deep"
                raise MalformedBody(rule, index=done + len(rows))
        elif mark == b"," and not depth:
            rows.append(text[start : token.start()])
            start = token.end()
        elif mark in b"]}":
            depth -= 1
            if depth < 0:
                last = text[start : token.start()]
                if last.strip() or (rows and mark == b"]"):
                    rows.append(last)
                end = token.end() if mark == b"]" else token.start()
                return _Split(rows, end, closed=True)
    return _Split(rows, start, closed=False)


def _diagnose(text: bytes) -> None:
    """Raise what is wrong with a document that is not one of records, if that can be told."""
    try:
        document = _document.decode(text)
    except msgspec.ValidationError as error:
        raise TraceError(_SHAPE, field="accesses") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedBody(f"the body is not JSON: {error}") from error
    for field in document:
        if field != "accesses":
            raise TraceError("the body has the field accesses and no other", field=field)
