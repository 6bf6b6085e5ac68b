"""Chunks of a trace as a compact Arrow stream, whose columns are as narrow as all of their values allow.

That is known at the end: until then they are in a file without a name beside it, as wide as they come.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from service.cli.trace_parquet import TableOut


class ArrowOut(TableOut):
    """A stream of Arrow, made with ``subpage.compact``."""

    def __init__(self, path: Path, compression: str, without: Sequence[str] = ()) -> None:
        super().__init__(path, without)
        self._compression = compression
        self._wide = tempfile.NamedTemporaryFile(dir=path.parent)  # noqa: SIM115 - it goes with the object
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def _write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pa.ipc.new_file(pa.PythonFile(self._wide.file, mode="w"), table.schema)
        self._writer.write_table(table)

    def _end(self) -> None:
        import subpage

        assert self._writer is not None
        self._writer.close()
        self._wide.flush()
        with self._wide, pa.memory_map(self._wide.name) as mapped, self._path.open("wb") as file:
            for piece in subpage.compact(pa.ipc.open_file(mapped).read_all(), self._compression):
                file.write(piece)
