"""Recorded stores as a file with the columns of a trace: Parquet, or an Arrow stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from service.cli.trace_parquet import ROW_GROUP
from service.platform.failures import Failure

# Names of records in the ring are those of the columns. Addresses compress best with their bytes apart.
WORDS = ("gpa", "gva", "pc")
SMALL = ("size", "vcpu")
SUFFIXES = (".parquet", ".arrow", ".arrows")
# Where the schema says what was recorded, as JSON.
METADATA = b"subpage.recording"

# A stream of 26 bytes a record waits for the disk, and for those who only copy it: LZ4 takes less time than that.
COMPRESSED = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_AT_ONCE = 1 << 16  # values that Parquet's writer takes at once: by its thousand it needs a tenth more


def schema_of(identity: dict[str, Any] | None = None, *, wide: bool = False) -> pa.Schema:
    """Of records in the ring. No column has nulls: to say so of each record anew would cost the writer a third more."""
    fields = [
        *(pa.field(name, pa.uint64(), nullable=False) for name in WORDS),
        *(pa.field(name, pa.uint8(), nullable=False) for name in SMALL),
    ]
    if wide:
        fields += [
            pa.field("cr3", pa.uint64(), nullable=False),
            pa.field("value", pa.binary(), nullable=False),
        ]
    return pa.schema(fields, metadata=None if identity is None else {METADATA: json.dumps(identity)})


class RecordedFile:
    """A file under way. Rows go out in groups of one size, so that equal recordings are equal files."""

    def __init__(self, path: Path, suffix: str, identity: dict[str, Any], *, wide: bool = False) -> None:
        """``wide``: with the column of the CR3, and one of what was stored."""
        self._schema = schema_of(identity, wide=wide)
        self._held: dict[str, NDArray[Any]] = {name: np.empty(ROW_GROUP, dtype=np.uint64) for name in WORDS}
        self._held |= {name: np.empty(ROW_GROUP, dtype=np.uint8) for name in SMALL}
        if wide:
            self._held |= {"cr3": np.empty(ROW_GROUP, dtype=np.uint64), "value": np.empty((ROW_GROUP, 16), np.uint8)}
        self._rows = 0
        self._out: Any
        if suffix == ".parquet":
            self._out = pq.ParquetWriter(
                path,
                self._schema,
                compression="lz4",  # zstd takes a third less room, and half as long again: the guest would wait for it
                use_dictionary=False,
                use_byte_stream_split=list(WORDS),
                write_statistics=False,
                write_batch_size=_AT_ONCE,
            )
        else:
            self._out = pa.ipc.new_stream(path, self._schema, options=COMPRESSED)

    def add(self, records: NDArray[np.void]) -> None:
        """Take records of the ring, which may change afterwards."""
        while len(records):
            count = min(len(records), ROW_GROUP - self._rows)
            for name, held in self._held.items():
                held[self._rows : self._rows + count] = records[name][:count]
            self._rows += count
            records = records[count:]
            if self._rows == ROW_GROUP:
                self._flush()

    def close(self) -> None:
        """Write what is left, and the end."""
        if self._rows:
            self._flush()
        self._out.close()

    def _flush(self) -> None:
        arrays = [pa.array(self._held[name][: self._rows]) for name in (*WORDS, *SMALL)]
        if "cr3" in self._held:
            arrays.append(pa.array(self._held["cr3"][: self._rows]))
            arrays.append(_stored(self._held["value"][: self._rows], self._held["size"][: self._rows]))
        self._out.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows = 0


def _stored(values: NDArray[np.uint8], sizes: NDArray[np.uint8]) -> pa.Array:
    """The first ``sizes`` bytes of each row, as a column of bytes. A store of more than 16 is told by its first 16."""
    sizes = np.minimum(sizes, values.shape[1])
    offsets = np.zeros(len(sizes) + 1, dtype=np.int32)
    np.cumsum(sizes, out=offsets[1:])
    data = values[np.arange(values.shape[1]) < sizes[:, None]]
    return pa.Array.from_buffers(pa.binary(), len(sizes), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def lines_of_sample(path: Path, kind: str) -> list[str]:
    """What is said of a file of this format wherever it is looked at: nothing unless it says that it is a sample."""
    try:
        with path.open("rb") as file:
            count = sample_in(file, kind)
    except OSError:  # a file that is not what it was taken for is told by its reader
        return []
    return [sampled(count)] if count else []


def sample_in(file: Any, kind: str) -> int:
    """Of how many stores an open file of this format has one, where it says that it is a sample; 0 where it does not.

    Raises OSError.
    """
    try:
        if kind == "parquet":
            metadata = pq.read_schema(file).metadata
        elif kind == "arrow":
            with pa.ipc.open_stream(file) as stream:
                metadata = stream.schema.metadata
        else:
            return 0
        identity = json.loads((metadata or {}).get(METADATA, b"{}"))
    except ValueError:
        return 0
    sample = identity.get("sample") if isinstance(identity, dict) else None
    return sample if isinstance(sample, int) and sample > 1 else 0


def sampled(count: int) -> str:
    """What a sample is."""
    return f"A sample: of every {count:,} stores of a vCPU one was recorded, and what is counted is of these alone."


def suffix_of(path: Path) -> str:
    """Of a file that can be written. Raises Failure."""
    if path.suffix not in SUFFIXES:
        raise Failure(f"{path}: the name must end in one of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise Failure(f"{path}: there is no folder {path.absolute().parent}")
    return path.suffix
