"""Decoding the row groups of a Parquet file, one after the other or some of them side by side.

The library does not hold the interpreter while it decodes, so that threads that decode and one that replays wait for
each other at nothing but what they hand over: a batch of columns, whole and checked.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import TraceError
from engine.trace.readers.flat import Arguments, Batch, IndexedArguments, Listed, Numbers, Same, Whole
from engine.trace.readers.parquet_sparse import Sparse, SparseColumn

STREAM_BYTES = 1 << 20  # read at a time from each column, so that a row group is never held whole
# Threads that decode, and batches that each is ahead of who takes them: a row group of usual length, so that none waits
# for another's to be taken.
DECODERS, AHEAD = 2, 9


class Shared:
    """A seekable source with a position of its own, for one of several threads that read the same one."""

    def __init__(self, source: Any) -> None:
        self._source: Any = source._source if isinstance(source, Shared) else source
        self._lock: threading.Lock = source._lock if isinstance(source, Shared) else threading.Lock()
        self._at = 0
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            self._source.seek(self._at)
            data = bytes(self._source.read(size))
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._lock:
            start = (0, self._at)[whence] if whence < 2 else self._source.seek(0, whence)
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """What is shared stays open."""


class Plan(NamedTuple):
    """How a file is decoded: which columns, which of them by their first value in each row group, so many records at a
    time; ``firsts`` has the index of the first record of each group."""

    metadata: Any
    names: Sequence[str]
    uniform: Sequence[Sparse]
    records: int
    firsts: Sequence[int]


class Decoder:
    """Some row groups of a file."""

    def __init__(self, source: Shared, plan: Plan, groups: Sequence[int]) -> None:
        self._plan = plan
        file = pq.ParquetFile(
            pa.PythonFile(Shared(source), mode="r"),
            metadata=plan.metadata,
            buffer_size=STREAM_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
            # Arguments stay in their dictionary: a page can name one a million times.
            read_dictionary=["arg"] if "arg" in plan.names else None,
        )
        self._uniform = {column.name: SparseColumn(Shared(source), column) for column in plan.uniform}
        self._batches = self._all(file, groups)

    def next(self) -> Batch | None:
        """The next batch of a group; None after its last one. Raises TraceError, and what Arrow does."""
        return next(self._batches, None)

    def _all(self, file: pq.ParquetFile, groups: Sequence[int]) -> Iterator[Batch | None]:
        plan = self._plan
        names = [name for name in plan.names if name not in self._uniform]
        for group in groups:
            first, same = plan.firsts[group], {}
            if first < plan.firsts[group + 1]:
                same = {name: Same(column.at(np.array([first]))) for name, column in self._uniform.items()}
            for batch in file.iter_batches(plan.records, row_groups=[group], columns=names, use_threads=False):
                found = _batch(batch, names, first)
                yield found._replace(numbers={**found.numbers, **same})
                first += batch.num_rows
            yield None


def decoded(decoders: Sequence[Decoder], groups: int) -> Iterator[Batch]:
    """The batches of all row groups, of which decoders have each theirs in rotation. Raises as ``Decoder.next``."""
    for group in range(groups):
        while (batch := decoders[group % len(decoders)].next()) is not None:
            yield batch


def ahead(decoders: Sequence[Decoder], groups: int) -> Iterator[Batch]:
    """The same, decoded in threads while others are in use. What is wrong with one is raised when its turn comes."""
    with ExitStack() as held:
        coming: list[deque[Future[Batch | None]]] = []
        threads = []
        for decoder in decoders:
            threads.append(thread := ThreadPoolExecutor(1, "parquet"))
            held.callback(thread.shutdown, cancel_futures=True)
            coming.append(deque(thread.submit(decoder.next) for _ in range(AHEAD)))
        for group in range(groups):
            which = group % len(decoders)
            while (batch := coming[which].popleft().result()) is not None:
                coming[which].append(threads[which].submit(decoders[which].next))
                yield batch
            coming[which].append(threads[which].submit(decoders[which].next))


def _batch(batch: pa.RecordBatch, names: Sequence[str], first: int) -> Batch:
    """Checked in full: nothing else looks at what Arrow made of the pages."""
    numbers: dict[str, Numbers] = {}
    arguments: Arguments | None = None
    for name in names:
        array = batch.column(name)
        try:
            array.validate(full=True)
            if name == "arg":
                arguments = _arguments(array)
            else:
                numbers[name] = _numbers(array)
        except (pa.ArrowException, ValueError) as error:
            raise TraceError(f"the column {name} is not valid: {error}", index=first, field=name) from error
    return Batch(batch.num_rows, numbers, arguments)


def _numbers(array: pa.Array) -> Whole:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not array.null_count:
        return Whole(array.to_numpy(zero_copy_only=False), None)
    null = array.is_null().to_numpy(zero_copy_only=False)
    return Whole(array.fill_null(0).to_numpy(zero_copy_only=False), null)


def _arguments(array: pa.Array) -> Listed | IndexedArguments:
    """Of a dictionary, what is used of it."""
    if not pa.types.is_dictionary(array.type):
        return Listed(array.to_pylist())
    places, null = _numbers(array.indices).part(0, len(array))
    used, at = np.unique(places if null is None else places[~null], return_inverse=True)
    found = np.zeros(len(array), dtype=np.int64)
    found[slice(None) if null is None else ~null] = at
    return IndexedArguments(Whole(found, null), array.dictionary.take(pa.array(used)).to_pylist())
