"""The dictionaries of an Arrow IPC stream that are of use: sent before what needs them, replaced or grown."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import TraceError
from engine.trace.readers.arrow_batches import WHAT
from engine.trace.readers.arrow_schema import Field
from engine.trace.readers.budget import Budget
from engine.trace.readers.flat import Arguments, IndexedArguments, IndexedNumbers, Numbers, Sort

# What an argument takes besides its bytes, as an object in a list.
OBJECT_BYTES = 64


class Dictionary:
    """One of them. What it takes is kept in the budget."""

    def __init__(self, field: Field, budget: Budget) -> None:
        self.field = field
        self._budget = budget
        self._size = 0
        self._count = -1
        self._values: npt.NDArray[Any] = np.empty(0)
        self._null: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._texts: list[bytes | None] = []

    def add(self, rows: int, column: Any, *, delta: bool) -> None:
        """``rows`` values, instead of what it has or after that. Raises TraceError and ValueError."""
        if delta and self._count < 0:
            raise TraceError("an Arrow dictionary grows before it was there", field=self.field.name)
        if not delta:
            self._budget.keep(-self._size, WHAT)
            self._size, self._count, self._texts = 0, 0, []
        if self.field.stored.kind.sort is Sort.BYTES:
            self._add_texts(rows, column)
        else:
            self._add_numbers(rows, column)
        self._count += rows

    def column(self, indices: Numbers) -> Any:
        """The values at some places."""
        if self._count < 0:
            raise TraceError(f"the dictionary of the column {self.field.name} is missing", field=self.field.name)
        if self.field.stored.kind.sort is Sort.BYTES:
            return IndexedArguments(indices, self._texts)
        null = self._null[: self._count]
        return IndexedNumbers(indices, self._values[: self._count], null if null.any() else None)

    def _add_texts(self, rows: int, column: Arguments) -> None:
        self._keep(OBJECT_BYTES * rows)
        texts = column.texts(0, rows)
        self._keep(sum(len(text) for text in texts if text))
        self._texts += texts

    def _add_numbers(self, rows: int, column: Numbers) -> None:
        count, end = self._count, self._count + rows
        self._budget.check(rows * 8, WHAT)
        values, null = column.part(0, rows)
        if not count:
            self._values = np.empty(0, dtype=values.dtype)
        if end > len(self._values):  # by doubling, so that a thousand deltas do not copy it a thousand times
            room = max(end, 2 * len(self._values) if count else 0)
            self._keep((room - (len(self._values) if count else 0)) * (values.dtype.itemsize + 1))
            self._values, kept = np.empty(room, dtype=values.dtype), self._values
            self._null, kept_null = np.zeros(room, dtype=np.bool_), self._null
            self._values[:count], self._null[:count] = kept[:count], kept_null[:count]
        self._values[count:end] = values
        self._null[count:end] = False if null is None else null

    def _keep(self, size: int) -> None:
        self._budget.keep(size, WHAT)
        self._size += size
