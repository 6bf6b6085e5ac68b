"""What every reader offers, and how bytes are taken from a source that may give fewer than asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.trace.columns import TraceChunk
from engine.trace.taken import Taken

# One read never asks for more than this, so that a source that allocates what it is asked for stays small.
PIECE_BYTES = 1 << 18


class Source(Protocol):
    """Anything with a blocking ``read``: a file, a socket file, a queue of received body parts.

    One that has a true ``prompt`` gives what has come, which rows and packed records are made of at once. One that has
    ``waiting`` says by it whether a read would give something at once.
    """

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; nothing means the end."""


class TraceReader(ABC):
    """Iterating yields the chunks of a trace, once. Each chunk is valid until the next one is asked for.

    ``ignored_columns`` names the columns that were neither used nor carried. Columnar bodies know them with the first
    chunk, row bodies when the last row has been read. ``taken`` says what a body of a tool was taken for and which of
    its lines were skipped, and is complete with the last chunk; None for other bodies. ``valued`` says, where a tool's
    column ``value`` is carried, which records of the chunk have one: of their first bytes, little-endian.
    """

    def __init__(self, source: Source, carry: Sequence[str]) -> None:
        self._source = source
        self._carry = tuple(carry)
        self.ignored_columns: tuple[str, ...] = ()
        self.taken: Taken | None = None
        self.valued: npt.NDArray[np.bool_] | None = None

    def __iter__(self) -> Iterator[TraceChunk]:
        return self._chunks()

    @abstractmethod
    def _chunks(self) -> Iterator[TraceChunk]:
        """The chunks, in order."""


def read_up_to(source: Source, size: int) -> bytes | bytearray:
    """``size`` bytes, fewer only at the end of the source. Memory follows what arrives, not what was asked for."""
    first = source.read(min(size, PIECE_BYTES))
    if len(first) == size or not first:
        return first
    gathered = bytearray(first)
    while len(gathered) < size:
        piece = source.read(min(size - len(gathered), PIECE_BYTES))
        if not piece:
            break
        gathered += piece
    return gathered


def read_come(source: Source, size: int) -> bytes | bytearray:
    """What has come, up to ``size`` bytes, if the source is prompt; otherwise so many, fewer only at its end."""
    return source.read(size) if getattr(source, "prompt", False) else read_up_to(source, size)


def read_into(source: Source, target: memoryview, *, come: bool = False) -> int:
    """Fill ``target``; the number of bytes stored is smaller than its length only at the end of the source. With
    ``come`` it is what has come, if the source is prompt, and 0 at the end.

    A source that can store its bytes in place is asked to: a fresh object for every piece costs more, in page faults,
    than the copy.
    """
    in_place = getattr(source, "readinto", None)
    done = 0
    while done < len(target):
        if in_place is not None:
            stored = in_place(target[done:])
        else:
            piece = source.read(min(len(target) - done, PIECE_BYTES))
            stored = len(piece)
            target[done : done + stored] = piece
        if not stored:
            break
        done += stored
        if come and getattr(source, "prompt", False):
            break
    return done
