"""The input block of a hypercall, in guest memory or in registers, by words of 8 bytes."""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch.hypercall import WORD_BYTES
from engine.kvm.memory_views import ReadsMemory


@dataclass(frozen=True)
class Block:
    """``words`` of a fast call, or memory at ``gpa``."""

    memory: ReadsMemory | None
    gpa: int
    words: tuple[int, ...] = ()

    def read(self, first: int, count: int) -> tuple[int, ...] | None:
        """``count`` words from word ``first``; None where there are none."""
        if self.memory is None:
            found = self.words[first : first + count]
            return found if len(found) == count else None
        if not count:
            return ()
        data = self.memory.read(self.gpa + first * WORD_BYTES, count * WORD_BYTES)
        if data is None:
            return None
        return tuple(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), WORD_BYTES))
