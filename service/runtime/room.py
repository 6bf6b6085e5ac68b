"""What the frames of one machine may take: its own limit, and what is left of its tenant's part of the service's."""

from __future__ import annotations

from engine.errors import LimitExceeded
from engine.machine import FRAME_BYTES, VirtualMachine
from service.runtime.shares import Share, ShareExceeded

_OWN = "max_table_frames"
_IMAGES = "max_image_memory_bytes"


class Room:
    """Counted when a change is committed, in ``memory``; held by the machine, which grows only within it.

    A machine has ``most`` frames at most, and beside them those that memory images have brought, up to ``images``.
    """

    def __init__(self, memory: Share, tenant: str, most: int, images: int = 0) -> None:
        self._memory = memory
        self._tenant = tenant
        self._most = most
        self._most_images = images
        self._images = 0
        self._loading = False
        self._bound = most
        self._frames = self._before = self._held = 0

    @property
    def used(self) -> int:
        """Bytes that the machine takes."""
        return self._frames * FRAME_BYTES

    def open(self, machine: VirtualMachine, *, image: bool = False) -> None:
        """Let a change begin, ``image``: the loading of one. It may grow the machine to its bound. One that is beyond
        it already may change and shrink."""
        self._before = machine.frames_in_use
        self._loading = image
        self._images = self._most_images if image else min(machine.image_frames, self._most_images)
        self._bound = self._limit()
        machine.bound_frames(self._bound)

    def admit(self, machine: VirtualMachine) -> None:
        """Refuse a machine that has just been made if there is no room for it. Raises ShareExceeded."""
        self._images = min(machine.image_frames, self._most_images)
        self.check(machine)

    def check(self, machine: VirtualMachine) -> None:
        """Refuse what a change has made of the machine if that is too large. Raises ShareExceeded."""
        used = machine.frames_in_use
        if used <= self._before:
            return
        self._bound = self._limit()  # others may have grown meanwhile
        if used > self._bound:
            raise self.refusal()

    def _limit(self) -> int:
        shared = self._held + max(0, self._memory.room(self._tenant)) // FRAME_BYTES
        return max(min(self._most + self._images, shared), self._before)

    def hold(self, frames: int) -> None:
        """A long change has come to so many frames: others cannot take them meanwhile. Raises ShareExceeded."""
        if frames > self._held:
            self._memory.take(self._tenant, (frames - self._held) * FRAME_BYTES)
            self._held = frames

    def settle(self, frames: int) -> None:
        """The change is committed: the machine has so many frames."""
        self._memory.count(self._tenant, (frames - self._held) * FRAME_BYTES)
        self._frames = self._held = frames

    def release(self) -> None:
        """The change was given up, and with it what was held for it."""
        self.settle(self._frames)

    def is_refusal(self, error: BaseException) -> bool:
        """Whether it is the engine's refusal to grow, in whose place goes ``refusal``."""
        return isinstance(error, LimitExceeded) and not isinstance(error, ShareExceeded) and error.field == _OWN

    def refusal(self) -> ShareExceeded:
        """That the machine may not grow, and whose limit that is."""
        if self._bound < self._most + self._images:
            return self._memory.exceeded(self._tenant)
        if self._loading:
            most = self._most_images * FRAME_BYTES
            rule = f"the pages that memory images bring a VM take {most} bytes at most, those of zeros left out, beside"
            rule = f"{rule} its {self._most} frames (max_table_frames)"
            return ShareExceeded(rule, field=_IMAGES, value=most, whose="machine")
        rule = f"a VM has {self._most} frames of {FRAME_BYTES} bytes at most, tables, bitmaps and guest memory together"
        return ShareExceeded(rule, field=_OWN, value=self._most, whose="machine")
