"""Symbols as columns, by address: what every reader makes, and what names and addresses are looked up in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidValue

MAX_SYMBOLS = 1 << 20
MAX_NAME = 4096
# No two neighbours this far apart are of one image: what lies between them belongs to neither.
_APART = 1 << 26

# What a symbol takes of memory while a table is made.
SYMBOL_MEMORY = 200

Words = NDArray[np.uint64]
# Is asked for memory in bytes, and may refuse.
Take = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol. ``size`` is 0 where nothing says it; ``assumed`` where it is the distance to the next symbol."""

    name: str
    address: int
    size: int
    assumed: bool


@dataclass(frozen=True, slots=True)
class SymbolTable:
    """Symbols in ascending order of address; among those of one address the one comes first that names it.

    ``addresses`` and ``sizes`` uint64[n], ``assumed`` bool[n]; the name of symbol i is
    ``names[bounds[i]:bounds[i + 1]]`` (UTF-8; ``bounds`` uint32[n + 1]); ``hashes`` uint64[n] are those of names,
    ascending, and ``by_hash`` uint32[n] the positions of their symbols. Sorting names themselves would keep every
    other thread waiting.
    """

    addresses: Words
    sizes: Words
    assumed: NDArray[np.bool_]
    names: bytes
    bounds: NDArray[np.uint32]
    hashes: Words
    by_hash: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.addresses)

    def name(self, position: int) -> str:
        """Name of a symbol."""
        return self._bytes(position).decode()

    def symbol(self, position: int) -> Symbol:
        """All that is known of a symbol."""
        size, assumed = int(self.sizes[position]), bool(self.assumed[position])
        return Symbol(self.name(position), int(self.addresses[position]), size, assumed)

    def find(self, name: str) -> list[Symbol]:
        """Every symbol of a name, by address."""
        wanted = name.encode(errors="replace")
        first, last = (int(np.searchsorted(self.hashes, _hash(wanted), side)) for side in ("left", "right"))
        candidates = sorted(self.by_hash[first:last].tolist())
        return [self.symbol(position) for position in candidates if self._bytes(position) == wanted]

    def module_of(self, name: str) -> str | None:
        """The first ``name [module]``; None where no module has such a symbol."""
        wanted = name.encode(errors="replace") + b" ["
        at = self.names.find(wanted)
        while at >= 0:
            position = int(np.searchsorted(self.bounds, at))
            if self.bounds[position] == at:
                return self.name(position)
            at = self.names.find(wanted, at + 1)
        return None

    def positions_at(self, addresses: Words) -> NDArray[np.int64]:
        """Position of the symbol that each address lies in, -1 where there is none."""
        if not len(self):
            return np.full(len(addresses), -1, dtype=np.int64)
        # Of several at one address the first has the name.
        below = np.searchsorted(self.addresses, addresses, side="right").astype(np.int64) - 1
        first = np.searchsorted(self.addresses, self.addresses[np.maximum(below, 0)], side="left").astype(np.int64)
        reach = np.maximum(self.sizes[first], np.uint64(1))
        inside = (below >= 0) & (addresses - self.addresses[first] < reach)
        return np.where(inside, first, -1)

    def labels(self, addresses: Words) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """(position in it of each address's text, texts): ``name+0x10``, or "" where no symbol is."""
        known, where = np.unique(addresses, return_inverse=True)
        positions = self.positions_at(known)
        offsets = np.where(positions >= 0, known - self.addresses[positions], 0) if len(self) else known
        texts = [
            label(self.name(position), offset) if position >= 0 else ""
            for position, offset in zip(positions.tolist(), offsets.tolist(), strict=True)
        ]
        return where, np.array(texts, dtype=object)

    def position_at(self, address: int) -> int:
        """Position of the symbol that an address lies in, -1 where there is none."""
        return int(self.positions_at(np.array([address], dtype=np.uint64))[0])

    def label(self, address: int) -> str | None:
        """``name+0x10`` of an address, None where no symbol is."""
        position = self.position_at(address)
        return None if position < 0 else label(self.name(position), address - int(self.addresses[position]))

    def moved(self, first: int, slide: int) -> SymbolTable:
        """The same with everything from ``first`` on moved up by ``slide`` bytes. Raises InvalidValue."""
        if not slide:
            return self
        from_first = self.addresses >= first
        if len(self) and from_first.any() and not 0 <= int(self.addresses[-1]) + slide < 1 << 64:
            raise InvalidValue("moves symbols past 2^64", field="slide", value=slide)
        by = np.where(from_first, np.uint64(slide % (1 << 64)), np.uint64(0))
        return replace(self, addresses=self.addresses + by)

    def _bytes(self, position: int) -> bytes:
        return self.names[self.bounds[position] : self.bounds[position + 1]]


def label(name: str, offset: int) -> str:
    """``name+0x10``, as the kernel prints an address: the module of a symbol comes last."""
    if not offset:
        return name
    bare, space, module = name.partition(" ")
    return f"{bare}+{offset:#x}{space}{module}"


def table_of(names: Sequence[bytes], addresses: Sequence[int] | Words, sizes: Sequence[int] | Words) -> SymbolTable:
    """The table of symbols in any order; a size of 0 is not known. Raises InvalidValue."""
    count = len(names)
    if not count:
        raise InvalidValue("has no symbol", field="body", value=0)
    check_count(count)
    address, size = np.asarray(addresses, dtype=np.uint64), np.asarray(sizes, dtype=np.uint64)
    order = np.lexsort((np.fromiter(map(_rank, names), np.int16, count), size == 0, address))
    address, size = address[order], size[order]
    ordered = [names[i] for i in order.tolist()]
    bounds = np.zeros(count + 1, dtype=np.uint32)
    np.cumsum([len(name) for name in ordered], out=bounds[1:])
    hashes = np.fromiter(map(_hash, ordered), np.uint64, count)
    by_hash = np.argsort(hashes, kind="stable").astype(np.uint32)
    joined = b"".join(ordered)
    try:
        joined.decode()
    except UnicodeDecodeError as error:
        position = int(np.searchsorted(bounds, error.start, side="right")) - 1
        told = ordered[position].decode(errors="replace")
        raise InvalidValue("has a name that is not UTF-8", field="body", value=told) from None
    assumed = size == 0
    size = np.where(assumed, _up_to_next(address), size)
    return SymbolTable(address, size, assumed & (size > 0), joined, bounds, hashes[by_hash], by_hash)


def check_count(count: int) -> None:
    """Raise InvalidValue for more symbols than a table has."""
    if count > MAX_SYMBOLS:
        raise InvalidValue(f"must have at most {MAX_SYMBOLS} symbols", field="body", value=count)


def check_name(name: bytes, where: str) -> None:
    """Raise InvalidValue for a name that no symbol has; ``where`` says where it was found."""
    if not 1 <= len(name) <= MAX_NAME or min(name) <= 0x20 or 0x7F in name:
        rule = f"{where}: a name has 1 to {MAX_NAME} printable characters and no space"
        raise InvalidValue(rule, field="body", value=name[:100].decode(errors="replace"))


def _hash(name: bytes) -> np.uint64:
    """64 bits of a name, for which nobody finds two names."""
    return np.uint64(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))


def _up_to_next(addresses: Words) -> Words:
    """How far it is from each address to the next other one, 0 where that is too far to mean something."""
    distinct, where = np.unique(addresses, return_inverse=True)
    gaps = np.zeros(len(distinct), dtype=np.uint64)
    gaps[:-1] = np.diff(distinct)
    gaps[gaps >= _APART] = 0
    return gaps[where]


def _rank(name: bytes) -> int:
    """Which of two names at one address says less, as the kernel's own table prefers them (scripts/kallsyms.c):
    what a linker script provides, then what begins with more underscores."""
    provided = name.startswith((b"__start_", b"__stop_", b"__end_")) or name.endswith((b"_start", b"_end"))
    return min(len(name) - len(name.lstrip(b"_")), 1 << 12) + (1 << 13 if provided else 0)


def each(table: SymbolTable) -> Iterator[Symbol]:
    """Every symbol, by address."""
    return map(table.symbol, range(len(table)))
