"""What the addresses of a trace are: guest-physical, linear ones of the guest, or those of a process without a guest.

``gpa``   the column ``gpa``; ``gva`` is a note.
``gva``   each record goes through the guest's own page tables (``trace.guest_virtual``).
``flat``  a linear address is taken for a GPA: there is no guest that would translate it.

For the last two the address is that of the column ``gva``, or of ``gpa`` where a body has no other, as packed records.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.arch.words import signed
from engine.cpu import access_over_pages, guest_paging, guest_tables
from engine.cpu.ept import TRAIL_ROWS
from engine.cpu.frames import MOST_PAGES, NO_PLACE, Machine
from engine.errors import TraceError
from engine.trace import guest_virtual, record_checks
from engine.trace.columns import TraceChunk, without_gpa
from engine.trace.operations import NO_SPACE
from engine.trace.replay import OPTION_KINDS
from engine.trace.translated import BAD_SPACE

RULES = {
    BAD_SPACE: ("address_space", "must be a value that CR3 can have"),
    guest_virtual.BAD_PLACE: (
        "address",
        "must be gpa for accesses of the host, or to guest paging structures: they have no linear address",
    ),
    guest_virtual.BAD_NESTED: (
        "vcpu",
        "must not be a vCPU in guest mode: with address=gva the page tables are walked of a guest that runs no other",
    ),
}
_NO_OPERATIONS = "must be gpa for a trace with operations: between them, records say where their addresses led"
_NO_MODEL = "must be gpa for a trace with address spaces on a VM with translation_cache model"


class Addresses:
    """Chunks with their addresses where the replay looks for them, for one trace."""

    def __init__(self, address: str, *, modelled: bool) -> None:
        self._address = address
        self._modelled = modelled
        self._records: NDArray[np.uint64] = np.zeros((0, 2), dtype=np.uint64)

    def of(self, chunk: TraceChunk, base: int) -> TraceChunk:
        """The chunk as it is replayed, ``base`` the index of its first record. Raises TraceError.

        Where addresses are linear, ``gva`` has them, and the records are a copy whose word 0 is still to be filled, or
        is the same.
        """
        if self._address == "gpa":
            if not chunk.has_gpa:
                raise without_gpa(base)
            return chunk
        count = len(chunk)
        if len(self._records) < count:
            self._records = np.zeros((count, 2), dtype=np.uint64)
        records = self._records[:count]
        records[:] = chunk.records
        gva = chunk.records[:, 0].copy() if chunk.gva is None else chunk.gva
        records[:, 0] = gva
        if self._address == "gva":
            self._check(chunk, base)
        return chunk.moved(records, gva)

    def _check(self, chunk: TraceChunk, base: int) -> None:
        """Refuse what cannot be between accesses, or beside them, whose addresses are translated now."""
        beside = chunk.operations
        if beside is not None and len(beside.at):
            raise TraceError(_NO_OPERATIONS, index=base + int(beside.at[0]), field="address", value=self._address)
        if beside is not None and self._modelled and not beside.plain:
            at = int(np.argmax(beside.spaces != NO_SPACE))
            raise TraceError(_NO_MODEL, index=base + at, field="address", value=self._address)


class GuestTables:
    """The translation of one trace, record by record: how far the chunk under way is translated, and what follows.

    Records up to ``ready`` have their GPAs. ``why`` is what is known of the one there: SPLIT, with its ``places``, or
    why it is refused; DONE where nothing is known yet.
    """

    def __init__(self) -> None:
        self.ready = 0
        self.why = record_checks.DONE
        self.places: NDArray[np.int64] = np.full(MOST_PAGES, NO_PLACE, dtype=np.int64)
        self._cache = np.zeros((guest_virtual.CACHE_ROWS, guest_virtual.CACHE_WORDS), dtype=np.int64)
        self._trail = np.zeros((TRAIL_ROWS, 4), dtype=np.int64)
        self._steps = np.zeros((guest_paging.STEP_ROWS, 4), dtype=np.int64)
        self.forget()

    def forget(self) -> None:
        """Guest memory or registers may have changed."""
        self._cache[:, guest_virtual.C_VCPU] = guest_virtual.NO_VCPU

    def begin(self, position: int) -> None:
        """The records of a chunk are translated from a position on, as they are reached."""
        self.ready, self.why = position, record_checks.DONE

    def translate(self, m: Machine, chunk: TraceChunk, options: NDArray[np.int64]) -> None:
        """Go on, as far as records can be replayed together."""
        assert chunk.gva is not None
        status, ready = guest_virtual.translate(
            m,
            chunk.records.view(np.int64).reshape(-1),
            frozen(chunk.gva),
            _spaces_of(chunk),
            self.ready,
            options[OPTION_KINDS],
            self._cache,
            self._trail,
            self._steps,
        )
        self.ready, self.why = int(ready), int(status)
        self.places[:] = m.places
        m.places[0] = NO_PLACE

    def blame(self, m: Machine, chunk: TraceChunk, position: int) -> tuple[int, int]:
        """The first address of a record that leads nowhere, and the level of the entry that says so."""
        assert chunk.gva is not None
        gva, word = int(chunk.gva[position]), int(chunk.records[position, 1])
        vcpu = np.int64(m.vcpu_of_id[word >> 32 & 0xFFFF])
        spaces = _spaces_of(chunk)
        space = spaces[position] if len(spaces) else guest_paging.OWN_SPACE
        at, end = gva, gva + (word & 0xFFFF)
        while True:
            found = int(guest_tables.locate(m, vcpu, space, np.int64(signed(at)), self._trail, self._steps))
            following = min(end, at - at % access_over_pages.PAGE + access_over_pages.PAGE)
            if found >= guest_tables.NOWHERE or following >= end:
                return at & (1 << 64) - 1, found >> guest_tables.LEVEL_SHIFT & 0xF
            at = following


def refusal(status: int, chunk: TraceChunk, base: int, position: int) -> TraceError:
    """The error for a record that ``guest_virtual.translate`` does not take."""
    name, rule = RULES[status]
    values: dict[str, Any] = {"address": "gva", "vcpu": int(chunk.records[position, 1]) >> 32 & 0xFFFF}
    if status == BAD_SPACE and chunk.operations is not None:
        values[name] = int(chunk.operations.spaces[position])
    return TraceError(rule, index=base + position, field=name, value=values[name])


def frozen(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A read-only int64 view: bodies may come as read-only memory, and one signature is compiled for all."""
    view = words.view(np.int64)
    view.flags.writeable = False
    return view


def _spaces_of(chunk: TraceChunk) -> NDArray[np.int64]:
    """The address space of each record, or nothing."""
    return frozen(np.zeros(0, dtype=np.uint64) if chunk.operations is None else chunk.operations.spaces)
