"""Copies between the caller and the model's kernel, as far as the caller's bytes reach."""

from __future__ import annotations

from tests.differential.calls import Answer, Call


class Failed(Exception):
    """The call ends with an errno."""

    def __init__(self, errno: str) -> None:
        super().__init__(errno)
        self.errno = errno


class User:
    """The bytes at the argument of a call."""

    def __init__(self, call: Call) -> None:
        self.data = None if call.data is None else bytearray(call.data)
        self.read_only = call.read_only

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes; EFAULT when any is missing."""
        if self.data is None or offset + size > len(self.data):
            raise Failed("EFAULT")
        return bytes(self.data[offset : offset + size])

    def number(self, offset: int, size: int) -> int:
        return int.from_bytes(self.read(offset, size), "little")

    def reach(self, offset: int, size: int) -> bytes:
        """What of ``size`` bytes can be read."""
        return b"" if self.data is None else bytes(self.data[offset : offset + size])

    def write(self, offset: int, raw: bytes) -> None:
        """Store as far as the bytes reach; EFAULT when they end before ``raw`` does."""
        if self.data is None or self.read_only:
            raise Failed("EFAULT")
        fits = raw[: max(0, len(self.data) - offset)]
        self.data[offset : offset + len(fits)] = fits
        if len(fits) < len(raw):
            raise Failed("EFAULT")

    def answer(
        self,
        returns: int,
        errno: str | None = None,
        segment: bytes | None = None,
        unsaid: tuple[tuple[int, int], ...] = (),
    ) -> Answer:
        """What the caller sees."""
        return Answer(returns, errno, None if self.data is None else bytes(self.data), segment, unsaid)
