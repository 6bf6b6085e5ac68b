"""Files for the commands that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bodies import FORMATS

SUFFIXES = {"parquet": ".parquet", "arrow": ".arrows", "packed": ".bin", "json": ".json", "ndjson": ".ndjson"}


@pytest.fixture
def write(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Writes ``TRACE`` of the module to a file of the format named."""

    def written(name: str) -> Path:
        path = tmp_path / f"trace{SUFFIXES[name]}"
        path.write_bytes(FORMATS[name](request.module.TRACE).content)
        return path

    return written
