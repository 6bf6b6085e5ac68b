"""The trace of the main job as a file, for clients that send bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TABLE = 0x2000360


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Into the object that the programs protect, beside it, elsewhere in its page, and into another page."""
    gpas = [TABLE, TABLE - 0x40, TABLE - 0x300, 0x1000]
    path = tmp_path / "trace.parquet"
    pq.write_table(pa.table({"gpa": pa.array(gpas, pa.uint64())}), path)
    return path
