"""The symbols of a machine's guest: kept with the machine, looked up by name and by address."""

from __future__ import annotations

from engine.cpu import frames
from engine.errors import NotFound
from engine.kvm import state_frame as reg
from engine.machine import kernel_search
from engine.machine.state import Operations, State, register
from engine.state import kept_bytes
from engine.symbols.formats import SymbolFile
from engine.symbols.placement import placed, stated
from engine.symbols.stored import Symbols, packed, unpacked


class SymbolOperations(Operations):
    """The symbols of one machine, none until they are loaded."""

    @property
    def loaded(self) -> bool:
        """Whether there are any."""
        return bool(register(self._published.machine, reg.SYMBOLS))

    def all(self) -> Symbols | None:
        """The symbols, None where there are none. Reads all of them from the machine's frames."""
        machine = self._published.machine
        first = register(machine, reg.SYMBOLS)
        return unpacked(kept_bytes.read(machine, first, register(machine, reg.SYMBOLS_SIZE))) if first else None

    def load(self, file: SymbolFile, slide: int | None = None, phys_base: int | None = None) -> Symbols:
        """Take the symbols of a file in place of those that there are.

        Where the kernel is, is what is given; else what its memory says; else what the addresses themselves say.
        Raises InvalidValue, LimitExceeded.
        """
        now = self._state.current
        placement = stated(file, slide, phys_base)
        if slide is None and phys_base is None:
            placement = kernel_search.find(now.snapshot.machine, file) or placement
        symbols = Symbols(file.format, placed(file.table, placement), placement)
        self._store(now, packed(symbols))
        return symbols

    def drop(self) -> None:
        """Forget them. Raises NotFound where there are none."""
        if not self.loaded:
            raise NotFound("this machine has no symbols: POST them first", field="symbols")
        self._store(self._state.current, b"")

    def _store(self, now: State, data: bytes) -> None:
        before = register(now.snapshot.machine, reg.SYMBOLS)
        with self._state.change(since=now) as change:
            if before:
                kept_bytes.drop(change.machine, before)
            first = kept_bytes.keep(change, frames.SYMBOLS, data) if data else 0
            for word, value in ((reg.SYMBOLS, first), (reg.SYMBOLS_SIZE, len(data))):
                frames.write_word(change.machine, frames.STATE_FRAME, word, value)
