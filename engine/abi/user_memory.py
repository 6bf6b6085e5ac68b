"""The caller's memory as an ioctl sees it: the bytes at its argument, and what pointers inside structures reach."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class UserBuffer:
    """The bytes at an ioctl argument: None is a NULL pointer, what lies past the end faults.

    ``read_only`` makes every copy to it fault. ``base`` is where in ``data`` the argument points.
    """

    data: bytearray | None
    read_only: bool = False
    base: int = 0

    @classmethod
    def of(cls, data: bytes | None, read_only: bool = False) -> UserBuffer:
        """A buffer with a copy of ``data``."""
        return cls(None if data is None else bytearray(data), read_only)

    def copy_from(self, offset: int, size: int) -> bytes | None:
        """``size`` bytes from ``offset``, None when that faults."""
        first = self.base + offset
        if self.data is None or first + size > len(self.data):
            return None
        return bytes(self.data[first : first + size])

    def copy_into(self, target: bytearray, offset: int, size: int) -> bool:
        """Copy ``size`` bytes from ``offset`` to the start of ``target``, as copy_from_user does.

        False when that faults: what comes before the fault is copied all the same, and the rest of ``size`` is zeros.
        """
        first = self.base + offset
        found = b"" if self.data is None else self.data[first : first + size]
        target[:size] = found.ljust(size, b"\0")
        return len(found) == size

    def copy_to(self, offset: int, data: bytes) -> bool:
        """Store ``data`` at ``offset``. False when that faults; what fits before the fault is stored all the same."""
        if self.data is None or self.read_only:
            return False
        first = self.base + offset
        stored = data[: max(0, len(self.data) - first)]
        self.data[first : first + len(stored)] = stored
        return len(stored) == len(data)


@dataclass
class UserMemory:
    """The caller's other memory, which pointers inside ioctl structures address: segments of bytes.

    ``read_only`` makes every copy to it fault.
    """

    segments: list[tuple[int, bytearray]] = field(default_factory=list)
    read_only: bool = False

    def read(self, address: int, size: int) -> bytes | None:
        """``size`` bytes at ``address``, None when any of them is missing."""
        for start, data in self.segments:
            if start <= address and address + size <= start + len(data):
                return bytes(data[address - start : address - start + size])
        return None

    def write(self, address: int, data: bytes) -> bool:
        """Store ``data`` at ``address``; False, storing nothing, when any byte is missing."""
        if self.read_only:
            return False
        for start, segment in self.segments:
            if start <= address and address + len(data) <= start + len(segment):
                segment[address - start : address - start + len(data)] = data
                return True
        return False

    def buffer(self, address: int) -> UserBuffer:
        """The bytes from ``address`` to the end of its segment, as the argument of a call; NULL where none is."""
        for start, data in self.segments:
            if start <= address < start + len(data):
                return UserBuffer(data, self.read_only, address - start)
        return UserBuffer(None)
