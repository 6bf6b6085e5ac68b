"""Packed little-endian records: the body that needs no decoding.

``record16`` is u64 GPA, u16 size, u8 access, u8 zero, u16 vCPU, u16 zero: exactly a chunk row. ``gpa8`` is a bare u64
GPA and means an 8-byte write by vCPU 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from engine.errors import InvalidValue, TraceError
from engine.trace.columns import CHUNK_RECORDS, ChunkBuffer, TraceChunk
from engine.trace.option_names import RECORD_FORMATS
from engine.trace.readers.base import Source, TraceReader, read_into
from engine.trace.readers.formats import mistaken

_HEAD = 4096

RECORD_BYTES: Mapping[str, int] = MappingProxyType({"gpa8": 8, "record16": 16})


class PackedReader(TraceReader):
    """Reads packed records straight into the chunk. The zero fields are checked by the replay, like the rest."""

    def __init__(self, source: Source, record: str | None, carry: Sequence[str]) -> None:
        super().__init__(source, carry)
        if record is None or record not in RECORD_BYTES:
            names = " or ".join(RECORD_FORMATS)
            raise InvalidValue(
                f"must be {names} for a packed body",
                field="record",
                value=record,
            )
        if carry:
            raise TraceError(
                "packed records have no further column to carry",
                field="carry",
                value=carry[0],
            )
        self._record_bytes = RECORD_BYTES[record]

    def _chunks(self) -> Iterator[TraceChunk]:
        width = self._record_bytes
        buffer = ChunkBuffer(())
        addresses = np.zeros(CHUNK_RECORDS if width == 8 else 0, dtype=np.uint64)
        target = (addresses if width == 8 else buffer.records).data.cast("B")
        done = held = 0
        while True:
            come = read_into(self._source, target[held:], come=True)
            stored = held + come
            length, held = divmod(stored, width)
            if not done and (said := mistaken(bytes(target[: min(stored, _HEAD)]), binary=width == 8)) is not None:
                raise TraceError(said, index=0, field="record")
            if length:
                yield buffer.chunk_of({"gpa": addresses[:length]}, {}) if width == 8 else buffer.chunk(length, {})
                done += length
            if not come:
                if held:
                    raise TraceError(f"the body ends {held} bytes into a record of {width}", index=done)
                return
            target[:held] = bytes(target[stored - held : stored])
