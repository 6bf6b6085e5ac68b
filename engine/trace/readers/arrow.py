"""Arrow IPC streams: batches are replayed while they arrive."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from engine.errors import EngineError, TraceError
from engine.trace.columns import TraceChunk
from engine.trace.readers.arrow_batches import (
    DICTIONARY_DATA,
    DICTIONARY_ID,
    DICTIONARY_IS_DELTA,
    BatchReader,
    Read,
    Room,
    Wanted,
)
from engine.trace.readers.arrow_dictionaries import Dictionary
from engine.trace.readers.arrow_frames import DICTIONARY_BATCH, RECORD_BATCH, SCHEMA, Message, Messages
from engine.trace.readers.arrow_schema import Field, Schema, buffers_of, read_schema, values_of
from engine.trace.readers.base import Source, TraceReader
from engine.trace.readers.budget import MANY_RECORDS, RECORDS_A_BYTE, Budget
from engine.trace.readers.columnar import BatchConverter
from engine.trace.readers.flat import Batch

# Metadata of these versions: Arrow 0.8 and later.
VERSIONS = range(3, 5)
# Threads that decompress batches, and batches that are in their hands while one before them is replayed.
INFLATERS, AHEAD = 2, 3


class ArrowReader(TraceReader):
    """Reads an Arrow IPC stream of any number of batches. One batch is held at a time; of it, what is used.

    With ``ahead`` compressed batches that have come are decompressed while others before them are in use. What is
    wrong with one is raised when its turn comes.

    The stream must end with its end-of-stream mark: one that was cut between two batches cannot be told from a complete
    one otherwise.
    """

    def __init__(self, source: Source, carry: Sequence[str], budget: Budget, *, ahead: bool = False) -> None:
        super().__init__(source, carry)
        self._messages = Messages(source)
        self._budget = budget
        self._ahead = ahead
        self._converter: BatchConverter | None = None
        self._records = 0

    def _chunks(self) -> Iterator[TraceChunk]:
        try:
            for batch in self._batches():
                assert self._converter is not None
                yield from self._converter.chunks(batch)
            if self._converter is None:
                raise TraceError("the body is not an Arrow IPC stream")
            self._messages.finish()
        except TraceError as error:
            if error.index is None:
                error.index = self._converter.done if self._converter else 0
            raise

    def _batches(self) -> Iterator[Batch]:
        """The batches, in order, each valid until the next is asked for."""
        stream: _Stream | None = None
        with _Inflaters() as ahead:
            try:
                for message in self._arriving(ahead):
                    if message is None:
                        yield from ahead.all()
                    elif stream is None:
                        stream = self._open(message)
                    elif message.header_type == DICTIONARY_BATCH:
                        yield from ahead.all()  # who has the one before keeps it in memory
                        stream.define(message)
                    elif message.header_type == RECORD_BATCH:
                        yield from self._in_turn(stream, message, ahead)
                    else:
                        raise TraceError("an Arrow stream has batches after its schema", value=message.header_type)
            except EngineError:
                yield from ahead.all()
                raise
            yield from ahead.all()

    def _arriving(self, ahead: _Inflaters) -> Iterator[Message | None]:
        """The messages; None where batches are ahead and the next message has yet to come."""
        messages = iter(self._messages)
        while True:
            if ahead and not getattr(self._source, "waiting", True):
                yield None
            message = next(messages, None)
            if message is None:
                return
            yield message

    def _open(self, message: Message) -> _Stream:
        schema = _schema(message)
        kinds = [(field.name, field.stored.kind) for field in schema.fields]
        self._converter = BatchConverter(kinds, self._carry)
        self.ignored_columns = self._converter.plan.ignored
        return _Stream(self._messages, schema, self._converter.names, self._budget)

    def _in_turn(self, stream: _Stream, message: Message, ahead: _Inflaters) -> Iterator[Batch]:
        """The batch of a message, or one before it whose turn it is."""
        wanted = stream.wanted(message)
        assert self._converter is not None
        records = self._records = self._records + wanted.rows
        most = max(MANY_RECORDS, RECORDS_A_BYTE * (self._messages.taken + message.body_length))
        if records > most:
            raise TraceError(f"so much of an Arrow stream may have up to {most} records", value=records)
        inflates = self._ahead and wanted.codec is not None and "arg" not in wanted.needs
        if not inflates or not self._budget.has(ahead.size + wanted.size):
            yield from ahead.all()
        read = stream.read(message, wanted, ahead.room(), ahead.size)
        if inflates:
            yield from ahead.add(stream, read)
        else:
            yield stream.batch(read)


class _Inflaters:
    """Batches that are being decompressed in threads, in order."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._coming: deque[tuple[Future[Batch], int]] = deque()
        self._rooms = [Room() for _ in range(AHEAD + 1)]
        self._next = 0
        self.size = 0

    def __enter__(self) -> _Inflaters:
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def __bool__(self) -> bool:
        return bool(self._coming)

    def room(self) -> Room:
        """Memory that none of them uses."""
        return self._rooms[self._next]

    def add(self, stream: _Stream, read: Read) -> Iterator[Batch]:
        """One more, in ``room``; gives those whose turn it is."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(INFLATERS, "arrow")
        self._coming.append((self._threads.submit(stream.batch, read), read.wanted.size))
        self.size += read.wanted.size
        self._next = (self._next + 1) % len(self._rooms)
        while len(self._coming) > AHEAD:
            yield self._first()

    def all(self) -> Iterator[Batch]:
        """All of them."""
        while self._coming:
            yield self._first()

    def _first(self) -> Batch:
        batch, size = self._coming.popleft()
        self.size -= size
        try:
            return batch.result()
        except BaseException:
            self._coming.clear()  # none after it counts
            raise


class _Stream:
    """What is known of a stream after its schema: how its batches lie, and the dictionaries that came."""

    def __init__(self, messages: Messages, schema: Schema, names: Sequence[str], budget: Budget) -> None:
        self._batches = BatchReader(messages, schema, budget)
        self._fields = [field for field in schema.fields if field.name in names]
        self._dictionaries: dict[int, tuple[Dictionary, BatchReader]] = {}
        self._room = Room()  # of what is copied from it
        for field in self._fields:
            if field.places is not None:
                self._expect(field, messages, budget)

    def _expect(self, field: Field, messages: Messages, budget: Budget) -> None:
        """A dictionary is of use."""
        values = values_of(field)
        if field.dictionary not in self._dictionaries:
            layout = Schema((values,), 1, buffers_of(field.stored), 0)
            self._dictionaries[field.dictionary] = Dictionary(values, budget), BatchReader(messages, layout, budget)
        elif self._dictionaries[field.dictionary][0].field.stored != field.stored:
            raise TraceError("two columns of different types have one dictionary", field=field.name)

    def define(self, message: Message) -> None:
        """Take a dictionary; one that no column needs is left in its source, whatever is in it."""
        with _well_formed():
            number = message.header.scalar(DICTIONARY_ID, "<q")
            if number not in self._dictionaries:
                return
            dictionary, batches = self._dictionaries[number]
            delta = message.header.scalar(DICTIONARY_IS_DELTA, "<B") != 0
            name = dictionary.field.name
            wanted = batches.wanted(message, message.header.child(DICTIONARY_DATA), [dictionary.field])
            read = batches.read(message, wanted, self._room)
            dictionary.add(wanted.rows, batches.columns(read)[name], delta=delta)

    def wanted(self, message: Message) -> Wanted:
        """What a batch has of the columns that are used."""
        with _well_formed():
            return self._batches.wanted(message, message.header, self._fields)

    def read(self, message: Message, wanted: Wanted, room: Room, beside: int) -> Read:
        """That, as it was sent, while others take ``beside`` bytes."""
        return self._batches.read(message, wanted, room, beside)

    def batch(self, read: Read) -> Batch:
        """The columns of some records. From any thread; no dictionary is taken meanwhile."""
        with _well_formed():
            columns = self._batches.columns(read)
        for field in self._fields:
            if field.places is not None:
                columns[field.name] = self._dictionaries[field.dictionary][0].column(columns[field.name])
        arguments = columns.pop("arg", None)
        return Batch(read.wanted.rows, columns, arguments)


def _schema(message: Message) -> Schema:
    with _well_formed():
        if message.header_type != SCHEMA or message.version not in VERSIONS:
            raise TraceError("the body is not an Arrow IPC stream", value=message.header_type)
        return read_schema(message.header, message.version)


@contextmanager
def _well_formed() -> Iterator[None]:
    """What does not fit together is an error of the body."""
    try:
        yield
    except (struct.error, ValueError) as error:
        raise TraceError(f"an Arrow message is not valid: {error}") from error
