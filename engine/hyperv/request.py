"""What a hypercall comes to before anything is flushed: a flush, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.arch import hypercall as hv
from engine.arch.words import signed
from engine.hyperv import ranges
from engine.hyperv.ranges import Ranges

VpBits = NDArray[np.int64]


@dataclass(frozen=True)
class Refused:
    """A status other than success; ``reps`` were done before it."""

    status: hv.Status
    reps: int = 0

    @property
    def result(self) -> int:
        """The result value."""
        return hv.result_value(self.status, self.reps)


@dataclass(frozen=True)
class Undefined:
    """#UD, with RIP at the instruction."""


@dataclass(frozen=True)
class Intercepted:
    """The input cannot be read: the parent partition gets a message about this GPA, the caller no status."""

    gpa: int


@dataclass(frozen=True)
class Flush:
    """A flush of translations of linear addresses.

    ``space`` is the page tables' address, None for every one; ``globals_stay`` lets global translations be. The
    processors are all, or those of ``vps``, by VP index or, from a nested guest, by VP id. ``covered`` is None for
    every address. ``words`` are the list's words as KVM queues them, None where it queues "everything".
    """

    code: int
    reps: int
    space: int | None
    globals_stay: bool
    everyone: bool
    vps: VpBits
    covered: Ranges | None
    words: tuple[int, ...] | None

    @property
    def result(self) -> int:
        """The result value of its success."""
        return hv.result_value(hv.Status.SUCCESS, self.reps)

    def names(self, number: int) -> bool:
        """Whether a processor is meant. Numbers that a set cannot hold are in none."""
        if self.everyone:
            return True
        return number < hv.SET_VPS and bool(self.vps[number >> 6] >> (number & 63) & 1)


@dataclass(frozen=True)
class SecondLevelFlush:
    """A flush of what was derived from a second-level root (bits 51:12), on every processor."""

    code: int
    reps: int
    root: int
    covered: Ranges | None = field(default=None)

    @property
    def result(self) -> int:
        """The result value of its success."""
        return hv.result_value(hv.Status.SUCCESS, self.reps)


Reading = Flush | SecondLevelFlush | Refused | Undefined | Intercepted


def vp_bits(mask: int, banks: tuple[int, ...]) -> VpBits:
    """A set from its banks: those of ``mask`` in ascending order. Banks that are missing are empty."""
    found = np.zeros(hv.BANKS, dtype=np.int64)
    present = [bank for bank in range(hv.BANKS) if mask >> bank & 1]
    for bank, word in zip(present, banks, strict=False):
        found[bank] = signed(word)
    return found


def no_vps() -> VpBits:
    """The empty set."""
    return np.zeros(hv.BANKS, dtype=np.int64)


def no_ranges() -> Ranges:
    """No range, where an array is needed."""
    return ranges.none()
