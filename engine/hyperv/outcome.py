"""What became of a hypercall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.arch import hypercall as hv
from engine.hyperv.flush_execution import Effect
from engine.hyperv.flush_or_refusal import Flush, SecondLevelFlush
from engine.hyperv.l2_hypercalls import Exit

# ``completed``: the result is in the registers and RIP past the instruction. ``exception``: #UD. ``intercepted``: the
# parent gets a message about memory. ``suspended``: a TLB lock holds the caller at the instruction. ``reflected``: a VM
# exit to L1, RIP unchanged. ``native``: KVM took the call for one of its own.
OUTCOMES = ("completed", "exception", "intercepted", "suspended", "reflected", "native")


@dataclass(frozen=True)
class Outcome:
    """A hypercall, executed.

    ``l0`` is the lowest hypervisor: ``kvm`` or ``hyperv``; ``level`` who called, 1 for a guest of it, 2 for the guest
    of a guest; ``served_by`` the level of the hypervisor that answered, None where none did. ``result`` is the 64-bit
    value, ``registers`` what changes. ``row`` is the row of the decision table for direct flushes. ``exit`` is what L1
    sees. ``waits_for`` are the vCPUs whose TLB lock suspends the caller. ``flush`` is what the call was read
    as, None for one that was not read as any.
    """

    l0: str
    level: int
    outcome: str
    control: hv.Control
    result: int | None = None
    registers: Mapping[str, int] = field(default_factory=dict)
    row: str | None = None
    served_by: int | None = None
    exit: Exit | None = None
    intercepted_gpa: int | None = None
    waits_for: tuple[int, ...] = ()
    effects: tuple[Effect, ...] = ()
    flush: Flush | SecondLevelFlush | None = None

    @property
    def rip_advance(self) -> int:
        """By how much RIP moved."""
        return hv.INSTRUCTION_LENGTH if self.outcome in ("completed", "native") else 0

    @property
    def targeted(self) -> tuple[int, ...]:
        """VP indices that the call was sent to."""
        return tuple(effect.vp.vp_index for effect in self.effects if effect.targeted)

    @property
    def flushed(self) -> tuple[int, ...]:
        """VP indices of those that have done it: all but the ones in whose queue it waits."""
        return tuple(effect.vp.vp_index for effect in self.effects if effect.targeted and not effect.queued)
