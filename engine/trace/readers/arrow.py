"""Arrow IPC streams: batches are replayed while they arrive."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine.errors import TraceError
from engine.trace.columns import TraceChunk
from engine.trace.readers.arrow_batches import DICTIONARY_DATA, DICTIONARY_ID, DICTIONARY_IS_DELTA, BatchReader
from engine.trace.readers.arrow_dictionaries import Dictionary
from engine.trace.readers.arrow_frames import DICTIONARY_BATCH, RECORD_BATCH, SCHEMA, Message, Messages
from engine.trace.readers.arrow_schema import Field, Schema, buffers_of, read_schema, values_of
from engine.trace.readers.base import Source, TraceReader
from engine.trace.readers.budget import Budget
from engine.trace.readers.columnar import BatchConverter
from engine.trace.readers.flat import Batch

# Metadata of these versions: Arrow 0.8 and later.
VERSIONS = range(3, 5)


class ArrowReader(TraceReader):
    """Reads an Arrow IPC stream of any number of batches. One batch is held at a time; of it, what is used.

    The stream must end with its end-of-stream mark: one that was cut between two batches cannot be told from a complete
    one otherwise.
    """

    def __init__(self, source: Source, carry: Sequence[str], budget: Budget) -> None:
        super().__init__(source, carry)
        self._messages = Messages(source)
        self._budget = budget

    def _chunks(self) -> Iterator[TraceChunk]:
        converter: BatchConverter | None = None
        stream: _Stream | None = None
        try:
            for message in self._messages:
                if stream is None or converter is None:
                    schema = _schema(message)
                    kinds = [(field.name, field.stored.kind) for field in schema.fields]
                    converter = BatchConverter(kinds, self._carry)
                    self.ignored_columns = converter.plan.ignored
                    stream = _Stream(self._messages, schema, converter.names, self._budget)
                elif message.header_type == DICTIONARY_BATCH:
                    stream.define(message)
                elif message.header_type == RECORD_BATCH:
                    yield from converter.chunks(stream.batch(message))
                else:
                    raise TraceError("an Arrow stream has batches after its schema", value=message.header_type)
            if stream is None:
                raise TraceError("the body is not an Arrow IPC stream")
            self._messages.finish()
        except TraceError as error:
            if error.index is None:
                error.index = converter.done if converter else 0
            raise


class _Stream:
    """What is known of a stream after its schema: how its batches lie, and the dictionaries that came."""

    def __init__(self, messages: Messages, schema: Schema, names: Sequence[str], budget: Budget) -> None:
        self._batches = BatchReader(messages, schema, budget)
        self._fields = [field for field in schema.fields if field.name in names]
        self._dictionaries: dict[int, tuple[Dictionary, BatchReader]] = {}
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
            rows, columns = batches.read(message, message.header.child(DICTIONARY_DATA), [dictionary.field])
            dictionary.add(rows, columns[name], delta=delta)

    def batch(self, message: Message) -> Batch:
        """The columns of some records."""
        with _well_formed():
            rows, columns = self._batches.read(message, message.header, self._fields)
        for field in self._fields:
            if field.places is not None:
                columns[field.name] = self._dictionaries[field.dictionary][0].column(columns[field.name])
        arguments = columns.pop("arg", None)
        return Batch(rows, columns, arguments)


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
