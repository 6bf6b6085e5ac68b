"""Results of replays, and their exit records as dictionaries, tables or arrays."""

from __future__ import annotations

import io
from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar

from subpage.bitmaps import library
from subpage.bodies import ARROW, NDJSON
from subpage.handles import Handle, Member
from subpage.html import Document, of_members, table
from subpage.modes import Awaiting, Blocking, operation, stream
from subpage.wire import document

_TOTALS = ("records", "writes", "violations", "page_granular_violations", "mmio", "exit_records_dropped", "stopped_at")


class TraceOperations(Handle):
    """The result of one replay, as it was when it ended."""

    _names: ClassVar = {"vm": "vm", "trace": "id"}
    records = Member(int, "Accesses that were replayed.")
    violations = Member(int, "Exits that the policy costs.")
    page_granular_violations = Member(int, "Exits that whole pages would have cost.")
    by_object = Member(dict[str, dict[str, int]], "``violations`` and ``collateral`` of each protected object.")

    @stream("getExits")
    async def exits(self, limit: int | None = None) -> AsyncGenerator[Document, None]:
        """Its exit records, in order, as they come. Raises StreamBroken, NotFound once the result is not kept.
        ``[(exit["gpa"], exit["denied"]) for exit in trace.exits(limit=1)]`` is ``[('0x10040', '0x1')]``."""
        options: dict[str, Any] = {"query": {"limit": limit}, "headers": {"Accept": NDJSON}, "patience": None}
        async with aclosing(self._core.lines("getExits", path=self._place, **options)) as lines:
            async for line in lines:
                yield Document(document(line))

    @operation("getExits")
    async def arrow(self, limit: int | None = None) -> Any:
        """A ``pyarrow.Table`` of them. Raises NotInstalled. ``trace.arrow()["gpa"].to_pylist()`` is ``[65600]``."""
        arrow = library("pyarrow")
        return arrow.ipc.open_stream(await self._exits_arrow(limit)).read_all()

    @operation("getExits")
    async def pandas(self, limit: int | None = None) -> Any:
        """Its exit records as a ``pandas.DataFrame``. Raises NotInstalled."""
        pandas = library("pandas")
        return pandas.DataFrame(await TraceOperations.columns(self, limit))

    @operation("getExits")
    async def polars(self, limit: int | None = None) -> Any:
        """Its exit records as a ``polars.DataFrame``. Raises NotInstalled."""
        polars = library("polars")
        return polars.read_ipc_stream(io.BytesIO(await self._exits_arrow(limit)))

    @operation("getExits")
    async def numpy(self, limit: int | None = None) -> dict[str, Any]:
        """Its exit records as arrays of numpy. Raises NotInstalled. ``int(trace.numpy()["gpa"][0])`` is ``65600``."""
        numpy = library("numpy")
        return {name: numpy.asarray(column) for name, column in (await TraceOperations.columns(self, limit)).items()}

    @operation("getExits")
    async def columns(self, limit: int | None = None) -> dict[str, Any]:
        """Its exit records by column, with nothing installed: a ``memoryview`` of 64-bit words where every value is a
        number, else a list. ``trace.columns()["gpa"][0]`` is ``65600``."""
        columns: dict[str, list[Any]] = {}
        count = 0
        async for record in TraceOperations.exits(self, limit):
            for name, value in record.items():
                columns.setdefault(name, [None] * count).append(_number(value))
            count += 1
        return {name: _packed(column) for name, column in columns.items()}

    async def _exits_arrow(self, limit: int | None) -> bytes:
        headers = {"Accept": ARROW}
        return (await self._call("getExits", query={"limit": limit}, headers=headers, patience=None)).content

    def __repr__(self) -> str:
        return f"<trace {self.id}: {self.violations} violations in {self.records} records>"

    def _repr_html_(self) -> str:
        totals = of_members({name: self.document.get(name) for name in _TOTALS}, self.id)
        rows = ((name, hits["violations"], hits["collateral"]) for name, hits in self.by_object.items())
        return totals + table(("object", "violations", "collateral"), rows, len(self.by_object))


class Trace(TraceOperations, Blocking):
    """The result of a replay."""


class AsyncTrace(TraceOperations, Awaiting):
    """The result of a replay, with methods to be awaited."""


def _number(value: Any) -> Any:
    return int(value, 16) if isinstance(value, str) and value.startswith("0x") else value


def _packed(column: list[Any]) -> Any:
    if all(type(value) is int and 0 <= value < 1 << 64 for value in column):
        return memoryview(array("Q", column))
    return column
