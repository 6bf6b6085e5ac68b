"""Traces in files, and how footprints are made of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.footprint import stored
from engine.footprint.places import SPANS, By, Footprint
from scale.build import Job
from service.cli.footprint_files import Reading, Reducing


def write(path: Path, seed: int, records: int = 3000, groups: int = 1) -> Path:
    """A trace with times, instructions and kinds, in so many row groups."""
    chance = np.random.default_rng(seed)
    columns = {
        "gpa": chance.integers(0, 1 << 20, records).astype(np.uint64),
        "size": np.full(records, 8, np.uint8),
        "access": chance.integers(0, 2, records).astype(np.uint8),
        "pc": chance.integers(0, 16, records).astype(np.uint64),
        "time": np.cumsum(chance.integers(1, 50, records)).astype(np.uint64),
        "source": np.where(chance.integers(0, 9, records) == 0, 1, 0).astype(np.uint8),
    }
    pq.write_table(pa.table(columns), path, row_group_size=-(-records // groups))
    return path


def reducing(level: str = SPANS, by: By | None = None) -> Reducing:
    """As the command line does it without options."""
    return Reducing(level, by or By(), Reading("auto", "record16", None, False, None))


def content(footprint: Footprint) -> bytes:
    """The file of a footprint."""
    sink = io.BytesIO()
    stored.write(footprint, sink)
    return sink.getvalue()


def job(made: Reducing, partials: Path | None = None, split: int = 1 << 40) -> Job:
    """A build."""
    folder = None if partials is None else str(partials)
    return Job(made, made.level, made.by, made.how, folder, split=split)
