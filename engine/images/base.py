"""What every reader of images offers: blocks of bytes and where they belong, from a source that is read in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidValue

# Bytes of one block at most, and what is asked of a source at one time.
BLOCK = 1 << 22
PIECE = 1 << 18
PAGE = 1 << 12
# Physical addresses have 52 bits at most.
TOP = 1 << 52
# Ranges of one image; those that touch each other count as one.
MOST_RANGES = 4096


class Source(Protocol):
    """Anything with a blocking ``read``: a file, a queue of received body parts. Its ``readinto`` is used if it has
    one."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; nothing means the end."""


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes for ``gpa`` on, from byte ``offset`` of the image. ``data`` is valid until the next block is asked for; its
    whole pages begin at multiples of a word."""

    gpa: int
    data: NDArray[np.uint8]
    offset: int


@dataclass(frozen=True, slots=True)
class VcpuRegisters:
    """What an image says of one vCPU. ``efer`` is not in any format: it is what the others make of it."""

    rip: int
    rsp: int
    rflags: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int


class ImageStream:
    """A source, and how many bytes of it were read. Memory is what is asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._into = getattr(source, "readinto", None)
        seekable = getattr(source, "seekable", None)
        # Where the source has another way than to read on.
        self._seek: Callable[[int, int], int] | None = (
            getattr(source, "seek", None) if seekable and seekable() else None
        )
        self._peeked = b""
        self.offset = 0

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer only at the end; they are read again."""
        while len(self._peeked) < size and (piece := self._source.read(size - len(self._peeked))):
            self._peeked += piece
        return self._peeked[:size]

    def fill(self, target: NDArray[np.uint8]) -> int:
        """Read into ``target``; less than its length only at the end of the source."""
        view = target.data
        done = min(len(self._peeked), len(view))
        view[:done] = self._peeked[:done]
        self._peeked = self._peeked[done:]
        while done < len(view):
            if self._into is not None:
                stored = self._into(view[done:])
            else:
                piece = self._source.read(min(len(view) - done, PIECE))
                stored = len(piece)
                view[done : done + stored] = piece
            if not stored:
                break
            done += stored
        self.offset += done
        return done

    def take(self, size: int, what: str) -> bytes:
        """Exactly ``size`` bytes. Raises InvalidValue where the source ends before."""
        target = np.empty(size, dtype=np.uint8)
        begin = self.offset
        if self.fill(target) < size:
            raise self.ended(what, begin + size)
        return target.tobytes()

    @property
    def seeks(self) -> bool:
        """Whether passing over bytes costs nothing."""
        return self._seek is not None

    def skip(self, size: int, what: str) -> None:
        """Pass over ``size`` bytes, as ``take``."""
        end = self.offset + size
        if self._seek is not None and size > PIECE:
            # All but one, which is read to see that it is there.
            self._seek(end - 1 - self.offset - len(self._peeked), 1)
            self._peeked, self.offset = b"", end - 1
        target = np.empty(min(size, PIECE), dtype=np.uint8)
        while self.offset < end:
            part = target[: min(len(target), end - self.offset)]
            if self.fill(part) < len(part):
                raise self.ended(what, end)

    def drain(self) -> None:
        """Pass over the rest."""
        if self._seek is not None:
            self.offset, self._peeked = self._seek(0, 2), b""
        target = np.empty(PIECE, dtype=np.uint8)
        while self.fill(target):
            pass

    def ended(self, what: str, end: int) -> InvalidValue:
        """That the image ends early."""
        rule = f"must be complete: the image ends at byte {self.offset}; {what} should end at byte {end}"
        return InvalidValue(rule, field="body", value=self.offset)


class Ranges:
    """Bytes of guest memory that an image has, apart from each other, in order of their addresses."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def add(self, gpa: int, size: int, offset: int) -> None:
        """Raises InvalidValue where it overlaps another, lies too high, or there are too many."""
        end = gpa + size
        if end > TOP:
            rule = f"must lie below 2^52; the range that byte {offset} tells of is {gpa:#x} to {end - 1:#x}"
            raise InvalidValue(rule, field="body", value=hex(gpa))
        at = bisect_left(self._ranges, (gpa, end))
        for begin, stop in self._ranges[max(at - 1, 0) : at + 1]:
            if begin < end and gpa < stop:
                rule = f"ranges must not overlap; that which byte {offset} tells of, {gpa:#x} to {end - 1:#x}, overlaps"
                raise InvalidValue(f"{rule} {begin:#x} to {stop - 1:#x}", field="body", value=hex(gpa))
        if at < len(self._ranges) and self._ranges[at][0] == end:
            end = self._ranges.pop(at)[1]
        if at and self._ranges[at - 1][1] == gpa:
            at -= 1
            gpa = self._ranges.pop(at)[0]
        self._ranges.insert(at, (gpa, end))
        if len(self._ranges) > MOST_RANGES:
            raise InvalidValue(f"an image has {MOST_RANGES} ranges at most", field="body", value=hex(gpa))

    def all(self) -> list[tuple[int, int]]:
        """First address and size of each."""
        return [(begin, end - begin) for begin, end in self._ranges]


class Image(ABC):
    """Iterating yields the blocks, once, in the order in which they come.

    ``format`` names what it is. ``ranges`` are those known by now, which after the last block are all; ``vcpus`` what
    it tells of vCPUs.
    """

    format: str

    def __init__(self, stream: ImageStream) -> None:
        self._stream = stream
        self._buffer = np.empty(0, dtype=np.uint8)
        self._passing = False
        self.ranges = Ranges()
        self.vcpus: tuple[VcpuRegisters, ...] = ()

    def __iter__(self) -> Iterator[Block]:
        return self._blocks()

    def survey(self) -> None:
        """Find out ``ranges`` and ``vcpus`` alone, instead of iterating.

        Contents are passed over, by ``seek`` where the source has it; an ELF core from one without is read no further
        than to them.
        """
        self._passing = True
        for _ in self._blocks():
            pass

    @abstractmethod
    def _blocks(self) -> Iterator[Block]:
        """The blocks, in order."""

    def _next(self, gpa: int, most: int) -> Block:
        """A block for ``gpa`` on, of ``most`` bytes or fewer: it ends at a multiple of its largest size, or where the
        image ends."""
        if not len(self._buffer):
            self._buffer = np.empty(BLOCK, dtype=np.uint8)
        begin = gpa % BLOCK
        part = self._buffer[begin : min(BLOCK, begin + most)]
        offset = self._stream.offset
        return Block(gpa, part[: self._stream.fill(part)], offset)

    def _exactly(self, gpa: int, size: int, what: str) -> Iterator[Block]:
        """Blocks for ``size`` bytes at ``gpa``. Raises InvalidValue where the image ends before."""
        if self._passing:
            self._stream.skip(size, what)
            return
        at, end = gpa, gpa + size
        last = self._stream.offset + size
        while at < end:
            wanted = min(end - at, BLOCK - at % BLOCK)
            block = self._next(at, end - at)
            if len(block.data) < wanted:
                raise self._stream.ended(what, last)
            yield block
            at += wanted
