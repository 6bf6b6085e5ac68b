"""Chunks of a trace as a Parquet file with the columns of a trace, written beside its place and then put there."""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.trace.columns import TraceChunk
from engine.trace.operations import NO_SPACE
from service.platform.failures import Failure

ROW_GROUP = 1 << 20  # records, about 30 MB before they are encoded
_WORDS = ("gpa", "gva", "pc", "time")  # columns whose bytes, apart, compress best
# Columns that may have nulls; where none can be, a third of what decoding takes is spared.
_NULLS = ("arg", "value", "address_space")


class TableOut(ABC):
    """A file of columns under way: chunks in, tables out. The first ones say which columns there are, of which some are
    left out."""

    def __init__(self, path: Path, without: Sequence[str] = ()) -> None:
        self._path = path
        self._without = frozenset(without)
        self._names: list[str] = []
        self._held: list[dict[str, Any]] = []
        self._rows = 0
        self.records = 0

    def add(self, chunk: TraceChunk, records: NDArray[np.uint64], valued: NDArray[np.bool_] | None) -> None:
        """Take in a chunk; ``records`` are its records, perhaps with other addresses, ``valued`` those with a value."""
        columns = columns_of(chunk, records, valued)
        self._held.append(columns)
        self._rows += len(records)
        self.records += len(records)
        if self._rows >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left; a trace without records has its columns."""
        if self._rows or not self._names:
            self._flush()
        self._end()

    def _flush(self) -> None:
        if not self._held:
            self._held = [columns_of(TraceChunk(np.zeros((0, 2), dtype=np.uint64), None, {}))]
        found = dict.fromkeys(name for held in self._held for name in held if name not in self._without)
        self._names = self._names or list(found)
        arrays = {}
        for name in self._names:
            parts = [held[name] if name in held else _absent(name, held) for held in self._held]
            arrays[name] = _array(name, parts)
        self._write(pa.table(arrays))
        self._held, self._rows = [], 0

    @abstractmethod
    def _write(self, table: pa.Table) -> None:
        """Some records."""

    @abstractmethod
    def _end(self) -> None:
        """There are no more."""


class ParquetOut(TableOut):
    """A Parquet file, a row group for each table."""

    _writer: pq.ParquetWriter | None = None
    _schema: pa.Schema

    def _write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._schema = pa.schema([field.with_nullable(field.name in _NULLS) for field in table.schema])
            words = [name for name in table.column_names if name in _WORDS]
            others = [name for name in table.column_names if name not in _WORDS]
            self._writer = pq.ParquetWriter(
                self._path, self._schema, compression="zstd", use_dictionary=others, use_byte_stream_split=words
            )
        self._writer.write_table(table.cast(self._schema), row_group_size=ROW_GROUP)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()


def columns_of(
    chunk: TraceChunk, records: NDArray[np.uint64] | None = None, valued: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """The columns of a chunk by name, copies of its memory, those that it has."""
    records = chunk.records if records is None else records
    word = records[:, 1]
    columns: dict[str, Any] = {
        "gpa": records[:, 0].copy(),
        "size": word.astype(np.uint16),
        "access": (word >> np.uint64(16)).astype(np.uint8),
        "vcpu": (word >> np.uint64(32)).astype(np.uint16),
    }
    if chunk.gva is not None:
        columns["gva"] = chunk.gva.copy()
    if chunk.kinds:
        columns["kind"] = (word >> np.uint64(acc.RECORD_KIND_SHIFT) & np.uint64(7)).astype(np.uint8)
        linear = word >> np.uint64(acc.RECORD_LINEAR_SHIFT) & np.uint64(acc.LINEAR_BITS)
        columns["linear"] = (linear ^ np.uint64(acc.LINEAR_VALID)).astype(np.uint8)
        columns["source"] = (word >> np.uint64(acc.RECORD_SOURCE_SHIFT) & np.uint64(3)).astype(np.uint8)
        columns["insn_len"] = (word >> np.uint64(acc.RECORD_LENGTH_SHIFT) & np.uint64(0xFF)).astype(np.uint8)
    columns |= {name: values.copy() for name, values in chunk.carry.items() if name != "value"}
    if "value" in chunk.carry and valued is not None:
        columns["value"] = _values(chunk.carry["value"], columns["size"], valued)
    if chunk.operations is not None:
        columns |= _beside(chunk, len(records))
    return columns


def _values(words: NDArray[np.uint64], size: NDArray[np.uint16], valued: NDArray[np.bool_]) -> pa.Array:
    """Words as the bytes that were accessed, in memory order; null where there is none."""
    lengths = np.where(valued, np.minimum(size, 8), 0).astype(np.int32)
    data = words.astype("<u8").view(np.uint8).reshape(-1, 8)[np.arange(8) < lengths[:, None]]
    offsets = np.append(0, np.cumsum(lengths, dtype=np.int32)).astype(np.int32)
    known = np.packbits(valued, bitorder="little")
    return pa.Array.from_buffers(
        pa.binary(), len(words), [pa.py_buffer(known), pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def _beside(chunk: TraceChunk, count: int) -> dict[str, Any]:
    """The columns of what is between the accesses."""
    operations = chunk.operations
    assert operations is not None
    columns: dict[str, Any] = {}
    spaces = operations.spaces.copy() if len(operations.spaces) else np.full(count, NO_SPACE, dtype=np.uint64)
    columns["address_space"] = spaces
    if len(operations.at):
        op = np.zeros(count, dtype=np.uint8)
        arg: list[bytes | None] = [None] * count
        for item in operations.items:
            op[item.position] = item.op
            arg[item.position] = item.arg
        columns |= {"op": op, "arg": arg}
    return columns


def _absent(name: str, held: dict[str, Any]) -> Any:
    """A column that a chunk does not have, as long as the chunk."""
    count = len(held["gpa"])
    if name == "arg":
        return [None] * count
    if name == "value":
        return pa.nulls(count, pa.binary())
    if name == "address_space":
        return np.full(count, NO_SPACE, dtype=np.uint64)
    return np.full(count, acc.LINEAR_VALID if name == "linear" else 0, dtype=np.uint64)


def _array(name: str, parts: list[Any]) -> pa.Array:
    """The parts of a column in one; no address space is null."""
    if name == "arg":
        return pa.array([item for part in parts for item in part], type=pa.binary())
    if name == "value":
        return pa.concat_arrays(parts)
    joined = np.concatenate(parts)
    return pa.array(joined, mask=joined == NO_SPACE) if name == "address_space" else pa.array(joined)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, which takes its place at the end; what fails, or is interrupted, leaves nothing."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {os.strerror(error.errno) if error.errno else error}") from None
    finally:
        beside.unlink(missing_ok=True)
