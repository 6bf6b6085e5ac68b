"""What a memory slot says of the file behind it. How its bytes are read is ``cpu.memory_files``.

A file is opened by whoever runs the engine, and closed when nobody refers to it any more: the table of slots that
kernels see names its descriptor and keeps it (``with_files``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.cpu.memory_files import GONE
from engine.errors import InvalidValue

# Offsets in files are 63 bits: with a slot behind it, one of these is none that wraps.
_MOST = 1 << 62
_PAGE = 4096
_LONGEST_PATH = 4096


class OpenFile(Protocol):
    """A file that is open for reading for as long as somebody has this object; ``descriptor`` is -1 for one that could
    not be opened."""

    @property
    def descriptor(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A slot's first byte is at ``offset`` of the file ``path``. ``size`` and ``modified`` (ns since 1970) are those of
    the file when it was attached; ``opened`` is None where nobody looked."""

    path: str
    offset: int = 0
    size: int = 0
    modified: int = 0
    opened: OpenFile | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> tuple[str, int]:
        """What a slot keeps for life."""
        return self.path, self.offset

    @property
    def words(self) -> tuple[int, int]:
        """The words of a row of Machine.slots."""
        found = self.opened is not None and self.opened.descriptor >= 0
        return (self.opened.descriptor + 1 if found and self.opened is not None else int(GONE)), self.offset

    def validate(self, size: int) -> None:
        """Refuse a file that has not all bytes of a slot of that size."""
        if not 0 <= self.offset <= _MOST or self.offset % _PAGE:
            raise InvalidValue("must be a multiple of 4096, at most 2^62", field="backing.offset", value=self.offset)
        if self.size < self.offset + size:
            rule = f"must have {self.offset + size:#x} bytes or more, offset and size of the slot together"
            raise InvalidValue(f"{rule}; it has {self.size:#x}", field="backing.file", value=self.path)

    def row(self) -> list[Any]:
        """The durable form."""
        return [self.path, self.offset, self.size, self.modified]

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> SlotFile:
        """Read it back. Raises InvalidValue."""
        path, *numbers = row
        whole = len(numbers) == 3 and all(type(number) is int and abs(number) <= _MOST for number in numbers)
        if type(path) is not str or len(path) > _LONGEST_PATH or not whole or numbers[0] < 0:
            raise InvalidValue("a file behind a slot is its path, offset, size and time", field="slots", value=row)
        return cls(path, *numbers)


class _Kept:
    """What an array is made of, so that whoever has the array has the files as well."""

    def __init__(self, table: NDArray[np.int64], files: tuple[OpenFile, ...]) -> None:
        self.__array_interface__ = table.__array_interface__
        self.table, self.files = table, files


def with_files(table: NDArray[np.int64], files: Iterable[SlotFile]) -> NDArray[np.int64]:
    """The table, which keeps the files that it names open."""
    opened = tuple(file.opened for file in files if file.opened is not None)
    return np.asarray(_Kept(table, opened)) if opened else table
