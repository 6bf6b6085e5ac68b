"""Exit records as an Arrow stream."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.arch.exits import name_of
from engine.kvm.resolutions import RESOLUTION_NAMES
from engine.symbols.stored import Symbols
from engine.trace.results import ExitColumns
from service.api.traces.exit_names import names_of

_BATCH = 1 << 16
_RESOLUTIONS = pa.array(RESOLUTION_NAMES, pa.string())


def stream(exits: ExitColumns, members: Sequence[str], symbols: Symbols | None = None) -> Iterator[bytes]:
    """An Arrow IPC stream; without records, its schema alone. ``members`` and ``symbols`` as in ``exit_batch``."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, exit_batch(exits[:0], members, symbols).schema) as writer:
        for start in range(0, len(exits), _BATCH):
            writer.write_batch(exit_batch(exits[start : start + _BATCH], members, symbols))
            yield sink.getvalue()
            sink.seek(0)
            sink.truncate()
    yield sink.getvalue()


def exit_batch(exits: ExitColumns, members: Sequence[str], symbols: Symbols | None = None) -> pa.RecordBatch:
    """The records as one Arrow batch: a column for each of the ``members`` of an exit record, then names that
    ``symbols`` know, then carried ones."""
    column = exits.columns
    offsets, positions = exits.object_positions()
    objects = pa.array(exits.object_names, pa.string()).take(pa.array(positions))
    no_gva = None if exits.has_gva else np.ones(len(exits), dtype=bool)
    made: dict[str, Any] = {
        "name": _names(column["reason"]),
        "gva": pa.array(column["gva"], mask=no_gva),
        "objects": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), objects),
        "resolution": _RESOLUTIONS.take(pa.array(column["resolution"])),
        "stale": pa.array(column["stale"].astype(bool)),
    }
    arrays = {name: made[name] if name in made else pa.array(column[name]) for name in members}
    for name, (where, texts) in names_of(exits, symbols).items():
        arrays[name] = pa.array([text or None for text in texts], pa.string()).take(pa.array(where))
    arrays |= {name: pa.array(values) for name, values in exits.carry.items()}
    return pa.RecordBatch.from_pydict(arrays)


def _names(reasons: npt.NDArray[np.uint16]) -> pa.Array:
    known, positions = np.unique(reasons, return_inverse=True)
    return pa.array([name_of(reason) for reason in known.tolist()], pa.string()).take(pa.array(positions))
