"""Locked TLBs of virtual processors: which flushes wait, and for whom (TLFS, TLB flush; KVM has no such lock).

A flush that is sent to a VP whose TLB is locked suspends its caller until the lock is released, under either policy. A
lock of the caller's own does not: a VP cannot wait for itself, and it flushes before it runs its guest.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.cpu.frames import Machine
from engine.hyperv import flush_execution, notes
from engine.hyperv.flush_execution import Scope, Vp
from engine.hyperv.flush_or_refusal import Flush, SecondLevelFlush


def locked(m: Machine, vps: Sequence[Vp], caller: int) -> frozenset[int]:
    """Positions of the VPs whose TLB is locked, but for the caller's position."""
    others = (vp.position for vp in vps if vp.position != caller)
    return frozenset(position for position in others if notes.flag(m, position, notes.TLB_LOCKED))


def holders(flush: Flush | SecondLevelFlush, scope: Scope, vps: Sequence[Vp], held: frozenset[int]) -> tuple[int, ...]:
    """The vCPUs that a flush is sent to and that hold a lock: its caller waits for them."""
    sent = flush_execution.targets(flush, scope, vps) if isinstance(flush, Flush) else vps
    return tuple(vp.vcpu for vp in sent if vp.position in held)
