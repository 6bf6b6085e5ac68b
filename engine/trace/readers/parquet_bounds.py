"""What a Parquet file may cost, found out before it is decoded.

The library that decodes believes what a file says of itself: it unfolds the directory at the end, and makes room for
each page and dictionary as large as its header claims, for each column of as many values as its chunks claim. So the
directory is walked over here first, and then the headers of all pages of the columns that are needed (Apache Parquet
format, parquet.thrift). A page of some bytes can be two thousand million values, so that the number of records, which
callers reckon with, is true of every chunk and page, or the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from engine.errors import TraceError
from engine.trace.operations import LARGEST_ARGUMENT
from engine.trace.readers.budget import MANY_RECORDS, RECORDS_A_BYTE, Budget
from engine.trace.readers.thrift import I32, I64, LIST, STRUCT, TooMuch, Walk

FROM_END = 2  # of seek
MAGIC = b"PAR1"
TAIL_BYTES = 8
MAX_FOOTER_BYTES = 16 << 20
MAX_PAGES = 1 << 20  # of the columns that are needed; 20,000 records a page are usual
PAGE_HEADER_BYTES = (256, 1 << 16)  # read at first, and at most
WHOLE_BYTES = 1 << 20  # of a column's pages that are read in one go: a read for each takes longer than the rest

# Fields of the structs
NUM_ROWS, ROW_GROUPS = (3, I64), (4, LIST)  # FileMetaData, each with its type
COLUMNS, COLUMN_METADATA = 1, 3  # RowGroup, ColumnChunk
# ColumnMetaData, the numbers each with its type: readers step over one of another
PHYSICAL_TYPE, CODEC = (1, I32), (4, I32)
VALUES, PACKED_SIZE, DATA_AT, DICTIONARY_AT = (5, I64), (7, I64), (9, I64), (11, I64)
STATISTICS, NULL_COUNT = (12, STRUCT), (3, I64)  # and what is looked at in these
WORDS, BYTE_ARRAY = 2, 6
PAGE_TYPE, UNPACKED, PACKED, DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_2 = 1, 2, 3, 5, 7, 8
NUM_VALUES = 1
DATA_ENCODING, DATA_2_ENCODING = 2, 4
DATA, INDEX, DICTIONARY, DATA_2 = range(4)  # PageType
STRUCTS = {DATA: DATA_PAGE, DICTIONARY: DICTIONARY_PAGE, DATA_2: DATA_PAGE_2}  # the one that counts for each
# Encodings of bytes in which a page holds what it gives; that of deltas gives a page of bytes for each one sent.
PLAIN_ENCODINGS = frozenset({0, 2, 6, 8})
DICTIONARY_ENCODINGS = frozenset({2, 8})

ARROW_SCHEMA = b"ARROW:schema", b"arrow schema"  # its key, and one that nobody looks for
WHAT = "the pages of a Parquet file"
DIRECTORY = "the directory of a Parquet file"
# A page has besides its values how they are repeated and which are null, and a value of bytes its length.
BESIDE = 1024
A_VALUE = 16


class Chunk(NamedTuple):
    """A column of one row group: how many values, nulls among them, where its pages are, how they are packed, and how
    many nulls it says there are, -1 if it does not say."""

    physical_type: int
    values: int
    packed: int
    data_at: int
    dictionary_at: int
    codec: int = 0
    nulls: int = -1

    @property
    def begin(self) -> int:
        """Where its first page is."""
        return self.dictionary_at if 0 < self.dictionary_at < self.data_at else self.data_at


class Footer(NamedTuple):
    """What is looked at of the directory of a file of ``size`` bytes. Each group has its chunks in order; ``memory`` is
    what the library takes for the directory at most."""

    size: int
    rows: int
    groups: list[list[Chunk]]
    memory: int = 0


def directory(source: Any) -> bytes:
    """The directory of a file and the tail that says its length, which the library reads as it reads the file.

    An Arrow schema in it is under another name, so that nobody unfolds it: its fields can share names and metadata of
    megabytes. Columns are what Parquet says they are. Raises TraceError; the source is left anywhere.
    """
    size = int(source.seek(0, FROM_END))
    if size < len(MAGIC) + TAIL_BYTES:
        raise TraceError("the Parquet file is not valid: it is too short")
    source.seek(size - TAIL_BYTES)
    tail = source.read(TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC:
        raise TraceError("the Parquet file is not valid: it does not end with PAR1")
    if length > MAX_FOOTER_BYTES:
        raise TraceError(f"{DIRECTORY} may have up to {MAX_FOOTER_BYTES} bytes", value=length)
    if length + TAIL_BYTES + len(MAGIC) > size:
        raise TraceError("the Parquet file is not valid: its directory is longer than the file", value=length)
    source.seek(size - TAIL_BYTES - length)
    return bytes(source.read(length + TAIL_BYTES)).replace(*ARROW_SCHEMA)


def read_footer(source: Any, budget: Budget) -> Footer:
    """See that the directory of a file is not too much to unfold.

    Raises TraceError. The source is left anywhere.
    """
    size = int(source.seek(0, FROM_END))
    data = directory(source)
    walk = Walk(data[:-TAIL_BYTES], budget.limit // 2)
    rows, groups = 0, []
    try:
        for number, kind in walk.fields():
            if (number, kind) == NUM_ROWS:
                rows = walk.integer()
            elif (number, kind) == ROW_GROUPS:
                groups += [_group(walk) for _ in range(_structs(walk))]
            else:
                walk.skip(kind)
    except TooMuch:
        rule = f"{DIRECTORY} may take up to {budget.limit // 2} bytes of memory: write fewer row groups and columns"
        raise TraceError(rule) from None
    except IndexError as error:
        raise TraceError(f"the Parquet file is not valid: its directory is damaged: {error}") from None
    if rows < 0:
        raise TraceError("the Parquet file is not valid: it has a number of records below 0", value=rows)
    return Footer(size, rows, groups, budget.limit // 2 - walk.left + 2 * len(data))


def _structs(walk: Walk) -> int:
    count, kind = walk.elements()
    if kind != STRUCT and count:
        raise IndexError("a list is not one of structs")
    return count


def _group(walk: Walk) -> list[Chunk]:
    """The columns of a RowGroup."""
    chunks: list[Chunk] = []
    for number, kind in walk.fields():
        if number == COLUMNS and kind == LIST:
            chunks += [_chunk(walk) for _ in range(_structs(walk))]
        else:
            walk.skip(kind)
    return chunks


_NOTHING = Chunk(0, 0, 0, 0, 0)


def _chunk(walk: Walk) -> Chunk:
    """What a ColumnChunk says. Its path does not matter: the library finds the chunks of a column by their place."""
    found = _NOTHING
    for number, kind in walk.fields():
        if number == COLUMN_METADATA and kind == STRUCT:
            found = _metadata(walk)
        else:
            walk.skip(kind)
    return found


def _metadata(walk: Walk) -> Chunk:
    """What is looked at of a ColumnMetaData."""
    numbers: dict[tuple[int, int], int] = {}
    nulls = -1
    for number, kind in walk.fields():
        if kind in (I32, I64):
            numbers[number, kind] = walk.integer(kind)
        elif (number, kind) == STATISTICS:
            nulls = _null_count(walk)
        else:
            walk.skip(kind)
    kept = (PHYSICAL_TYPE, VALUES, PACKED_SIZE, DATA_AT, DICTIONARY_AT, CODEC)
    return Chunk(*(numbers.get(at, 0) for at in kept))._replace(nulls=nulls)


def _null_count(walk: Walk) -> int:
    nulls = -1
    for number, kind in walk.fields():
        if (number, kind) == NULL_COUNT:
            nulls = walk.integer(kind)
        else:
            walk.skip(kind)
    return nulls


class Page(NamedTuple):
    """Where a page is, what its header says, and how long the header is."""

    at: int
    header: int
    type: int
    unpacked: int
    packed: int
    values: int
    encoding: int


def leaves_of(metadata: Any) -> list[str]:
    """The names of all columns, in order, of what the library made of a directory."""
    schema = metadata.schema
    return [schema.column(place).path for place in range(len(schema))]


class Checked(NamedTuple):
    """What came of the pages: the memory that the largest need, and the columns of which every page of a row group
    takes its values from a dictionary with one."""

    memory: int
    uniform: frozenset[str]


def check_pages(source: Any, footer: Footer, leaves: Sequence[str], names: Sequence[str], budget: Budget) -> Checked:
    """See that some columns have a value for each record and no more, and that their pages are not too large to be
    decoded, before any is. ``leaves`` are the names of all columns of the file, in order.

    Raises TraceError. The source is left anywhere.
    """
    most = max(MANY_RECORDS, RECORDS_A_BYTE * footer.size)
    if footer.rows > most:
        raise TraceError(f"a Parquet file of {footer.size} bytes may have up to {most} records", value=footer.rows)
    needed = frozenset(names)
    wanted = {place: name for place, name in enumerate(leaves) if name in needed}
    _check_values(footer, len(leaves), wanted)
    largest = dict.fromkeys(wanted, 0)
    uniform = set(wanted.values())
    pages = 0
    for group in footer.groups:
        for place, name in wanted.items():
            # Without values none of its pages is read, and writers leave out where they are.
            if group[place].values:
                found = pages_of(source, name, group[place], footer.size)
                count, memory, same = _sum_of(found, name, group[place], MAX_PAGES - pages)
                pages += count
                largest[place] = max(largest[place], memory)
                if not same:
                    uniform.discard(name)
        budget.check(sum(largest.values()), WHAT)
    return Checked(sum(largest.values()), frozenset(uniform))


def _check_values(footer: Footer, columns: int, wanted: Mapping[int, str]) -> None:
    """As many values as records, in the chunks of each column together."""
    if any(len(group) != columns for group in footer.groups):
        raise TraceError(f"the Parquet file is not valid: a row group has not each of the {columns} columns once")
    for place, name in wanted.items():
        values = [group[place].values for group in footer.groups]
        if min(values, default=0) < 0:
            raise _bad(name, "a part of it has a number of values below 0")
        if sum(values) != footer.rows:
            raise _bad(name, f"it has {sum(values)} values, and the file {footer.rows} records")


def _bad(name: str, rule: str) -> TraceError:
    return TraceError(f"the column {name[:64]} is not valid: {rule}", field=name[:64])


def pages_of(source: Any, name: str, chunk: Chunk, size: int) -> Iterator[Page]:
    """The pages of one column of one row group of a file of ``size`` bytes, one after the other, their headers checked.

    Raises TraceError. The source may be moved between two of them.
    """
    return iter(_Pages(source, name, chunk, size))


def _sum_of(pages: Iterator[Page], name: str, chunk: Chunk, most: int) -> tuple[int, int, bool]:
    """How many pages a chunk has, which are up to ``most``, the memory that the largest need together, and whether
    all values are the one of its dictionary."""
    count = dictionary = largest = packed = values = 0
    choices, same = 0, True
    for page in pages:
        count += 1
        if count > most:
            raise TraceError(f"{WHAT} may be up to {MAX_PAGES}: write larger ones", field=name)
        if page.type == DICTIONARY:
            dictionary = max(dictionary, page.unpacked)
            choices += page.values
        else:
            largest = max(largest, page.unpacked)
            if page.type in (DATA, DATA_2):
                values += page.values
                same = same and page.encoding in DICTIONARY_ENCODINGS
        packed = max(packed, page.packed)
    if values != chunk.values:
        raise _bad(name, f"it says {chunk.values} values, and its pages {values}")
    return count, 2 * dictionary + largest + packed, same and choices == 1


class _Pages:
    """Steps from one page to the next."""

    def __init__(self, source: Any, name: str, chunk: Chunk, size: int) -> None:
        self._source = source
        self._name = name
        self._bytes_of_any_length = chunk.physical_type == BYTE_ARRAY
        self._begin, self._end = chunk.begin, chunk.begin + chunk.packed
        if not 0 <= self._begin <= self._end <= size:
            raise self._bad("its pages are not within the file")
        self._whole = b""

    def __iter__(self) -> Iterator[Page]:
        if self._end - self._begin <= WHOLE_BYTES:
            self._source.seek(self._begin)
            self._whole = self._source.read(self._end - self._begin)
        start = self._begin
        while start < self._end:
            page = self._header(start)
            yield page
            start += page.header + page.packed

    def _header(self, start: int) -> Page:
        """The header at a position, checked."""
        left = self._end - start
        for most in PAGE_HEADER_BYTES:
            try:
                page = self._read(start, min(most, left))
                break
            except (IndexError, TooMuch) as error:
                if most == PAGE_HEADER_BYTES[-1] or most >= left:
                    raise self._bad(f"the header of a page is damaged: {error}") from None
        if page.unpacked < 0 or page.packed < 0 or page.header + page.packed > left:
            raise self._bad("a page is not within its column")
        if page.values < 0:
            raise self._bad("a page has a number of values below 0")
        if self._bytes_of_any_length:
            self._check_bytes(page)
        return page

    def _read(self, start: int, length: int) -> Page:
        found = _usual(self._whole, start - self._begin, start) if self._whole else None
        if found is None:
            data = self._bytes(start, length)
            found = _usual(data, 0, start) or _read_header(data, start)
        return found

    def _bytes(self, start: int, length: int) -> bytes:
        if self._whole:
            return self._whole[start - self._begin : start - self._begin + length]
        self._source.seek(start)
        return bytes(self._source.read(length))

    def _check_bytes(self, page: Page) -> None:
        """A page of arguments is no larger than so many arguments can be."""
        if page.type in (DATA, DATA_2) and page.encoding not in PLAIN_ENCODINGS:
            raise self._bad("bytes are encoded as plain, by lengths or by a dictionary")
        if page.unpacked > page.values * (LARGEST_ARGUMENT + A_VALUE) + BESIDE:
            raise self._bad(f"an argument has up to {LARGEST_ARGUMENT} bytes")

    def _bad(self, rule: str) -> TraceError:
        return _bad(self._name, rule)


# The header that nearly every page has, in one step: field by field takes ten times as long, thousands of times a file.
# Type, sizes, a checksum or none, then a data page of the first version, with statistics of up to 8 bytes each or none.
_VARINT = rb"(?:[\x80-\xff]{0,3}+[\x00-\x7f]|[\x80-\xff]{4}[\x00-\x0f])"  # of 32 bits
_LONG = rb"[\x80-\xff]{0,9}+[\x00-\x7f]"
_STATISTIC = (
    rb"[\x16\x26\x36\x46]" + _LONG + rb"|[\x18\x28\x38\x48\x58](?:\x01.|\x02..|\x04.{4}|\x08.{8})|[\x11\x12\x21\x22]"
)
_USUAL = re.compile(
    rb"\x15\x00\x15(V)\x15(V)(?:\x15V\x1c|\x2c)\x15(V)\x15(V)\x15V\x15V(?:\x1c(?:S)*+\x00)?\x00\x00".replace(
        b"V", _VARINT
    ).replace(b"S", _STATISTIC),
    re.DOTALL,
)


def _usual(data: bytes, begin: int, at: int) -> Page | None:
    """The header of the page at ``at``, from ``begin`` of some data on, if it is one of the usual sort."""
    found = _USUAL.match(data, begin)
    if found is None:
        return None
    unpacked, packed, values, encoding = found.groups()
    return Page(at, found.end() - begin, DATA, _zigzag(unpacked), _zigzag(packed), _zigzag(values), _zigzag(encoding))


@lru_cache(1 << 12)  # most are those of the page before
def _zigzag(text: bytes) -> int:
    value = 0
    for byte in reversed(text):
        value = value << 7 | byte & 0x7F
    return value >> 1 ^ -(value & 1)


def _read_header(data: bytes, at: int) -> Page:
    walk = Walk(data, 1 << 16)
    numbers: dict[int, int] = {}
    values, encoding = 0, -1
    for number, kind in walk.fields():
        if kind == I32:
            numbers[number] = walk.integer(kind)
        elif kind == STRUCT and number == STRUCTS.get(numbers.get(PAGE_TYPE, -1)):
            encoded = DATA_2_ENCODING if number == DATA_PAGE_2 else DATA_ENCODING
            for inner, inner_kind in walk.fields():
                if inner_kind == I32:
                    value = walk.integer(inner_kind)
                    values = value if inner == NUM_VALUES else values
                    encoding = value if inner == encoded else encoding
                else:
                    walk.skip(inner_kind)
        else:
            walk.skip(kind)
    missing = {PAGE_TYPE, UNPACKED, PACKED} - numbers.keys()
    if missing:
        raise IndexError("it says no size")
    return Page(at, walk.at, numbers[PAGE_TYPE], numbers[UNPACKED], numbers[PACKED], values, encoding)
