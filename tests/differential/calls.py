"""What both sides are given and answer: a host, ioctls with the caller's memory, and bytes as the kernel left them."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 4096
PROFILES = ("kvm-2019", "kvm-latest")
# MAXPHYADDR of the host.
WIDTH = 46


@dataclass(frozen=True)
class World:
    """A kernel and the host below it.

    ``hyperv`` is empty, or how the Hyper-V below KVM does direct flush: "direct", "plain" (not at all), or "full" (it
    has no memory for it).
    """

    profile: str = "kvm-2019"
    vendor: str = "intel"
    nested: bool = True
    ept: bool = True
    spp: bool = True
    hyperv: str = ""
    fail_allocation: int | None = None
    irqchip: bool = True

    @property
    def latest(self) -> bool:
        return self.profile == "kvm-latest"

    @property
    def intel(self) -> bool:
        return self.vendor == "intel"


@dataclass(frozen=True)
class Call:
    """One ioctl: its level, the bytes at its argument, or a scalar, and one segment of memory that pointers reach.

    ``of_last_get`` takes the bytes that the last KVM_GET of the same structure left. Two names are no ioctls: TOUCH is
    a read of the guest's at ``arg``, POKE puts ``data`` to guest memory at ``arg``.
    """

    name: str
    level: str
    data: bytes | None = None
    arg: int = 0
    read_only: bool = False
    segment: tuple[int, bytes] | None = None
    of_last_get: bool = False


@dataclass(frozen=True)
class Answer:
    """``returns`` and errno by name; the bytes at the argument and in the segment, as the call left them.

    ``unsaid`` are ranges of ``data`` that the model has no opinion of: time, and what the sources leave open.
    """

    returns: int
    errno: str | None = None
    data: bytes | None = None
    segment: bytes | None = None
    unsaid: tuple[tuple[int, int], ...] = ()

    def told(self) -> tuple[int | str, bytes | None, bytes | None]:
        """What is compared: the unsaid bytes are zero."""
        data = self.data
        if data is not None and self.unsaid:
            blank = bytearray(data)
            for start, size in self.unsaid:
                end = min(start + size, len(blank))
                blank[start:end] = bytes(max(0, end - start))
            data = bytes(blank)
        return (self.errno or self.returns, data, self.segment)


Sequence = tuple[Call, ...]
