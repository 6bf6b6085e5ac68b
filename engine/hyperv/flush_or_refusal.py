"""What a hypercall comes to before anything is flushed: a flush, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.arch import hypercall as hv
from engine.hyperv import flush_ranges, vp_sets
from engine.hyperv.flush_ranges import Ranges
from engine.hyperv.vp_sets import VpBits


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
        return self.everyone or vp_sets.member(self.vps, number)


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


def no_ranges() -> Ranges:
    """No range, where an array is needed."""
    return flush_ranges.none()
