"""Carrying a flush out, in one of three ways.

exact     removes what the specification requires, and no more
kvm       queues it for each target, as KVM does; a vCPU does what is queued before it enters its guest
paranoid  removes everything from every processor's cache

All three leave nothing behind that is required, but for what a target that is not running will remove before it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch.hypercall import EVERYTHING
from engine.arch.words import signed
from engine.cpu import frames, tlb, tlb_select
from engine.cpu.frames import Machine
from engine.hyperv import flush_ranges, notes, queues
from engine.hyperv.flush_or_refusal import Flush, SecondLevelFlush, no_ranges
from engine.hyperv.flush_ranges import KvmLists
from engine.state.config import VmConfig
from engine.state.profiles import kvm_version

Marks = NDArray[np.int64]


@dataclass(frozen=True)
class Vp:
    """A virtual processor as a flush sees it.

    ``position`` is that of its vCPU; ``running`` says that it executes its guest, and so does at once what it is sent;
    ``nested_ids`` are the VM and VP id that the lower hypervisor last recorded for it; ``in_nested`` that it runs a
    nested guest now.
    """

    position: int
    vcpu: int
    vp_index: int
    running: bool = True
    in_nested: bool = False
    nested_ids: tuple[int, int] | None = None


@dataclass(frozen=True)
class Scope:
    """Whose translations a flush is about: the caller's own partition's, or, from L2, those of its VM id.

    ``tagged`` says that the cache tells L2 from L1; where the machine's guest is L2 itself all it holds is L2's.
    """

    nested_vm: int | None = None
    tagged: bool = True

    @property
    def nested(self) -> bool:
        """The caller is a nested guest."""
        return self.nested_vm is not None


@dataclass(frozen=True)
class Facts:
    """Facts about the machine: the way it executes flushes, how KVM reads its queue of ranges, nested paging."""

    execution: str = "exact"
    lists: KvmLists = field(default_factory=KvmLists)
    ept: bool = True

    @classmethod
    def of(cls, config: VmConfig, width: int) -> Facts:
        """Those of a machine whose host has linear addresses of ``width`` bits.

        Under the specification ranges are read by their pages in every profile: the queue is then only a way.
        """
        by_page = config.flush_policy == "tlfs" or kvm_version(config.profile).hyperv.flushes_each_page
        return cls(config.executes_flushes, KvmLists(width, by_page), config.host.ept)


@dataclass(frozen=True)
class Effect:
    """What a flush did to one VP: rows of the cache as they were, int64[n, ENTRY_WORDS].

    ``required`` is what had to go, ``dropped`` what went, ``over_flushed`` what went without having to, ``left`` what
    had to go and is still there: waiting in the queue (``queued``), or not seen by a hypervisor that reads less into
    the call than the specification. ``flushes`` is what KVM's statistic grew by.
    """

    vp: Vp
    targeted: bool
    queued: bool
    flushes: int
    required: NDArray[np.int64]
    dropped: NDArray[np.int64]
    over_flushed: NDArray[np.int64]
    left: NDArray[np.int64]


def targets(flush: Flush, scope: Scope, vps: Sequence[Vp]) -> list[Vp]:
    """The VPs that a flush is sent to: by VP index, or for a nested guest by the ids recorded for each VP."""
    if not scope.nested:
        return [vp for vp in vps if flush.names(vp.vp_index)]
    found = [vp for vp in vps if vp.nested_ids is not None and vp.nested_ids[0] == scope.nested_vm]
    return [vp for vp in found if vp.nested_ids is not None and flush.names(vp.nested_ids[1])]


def required(m: Machine, flush: Flush, scope: Scope, vps: Sequence[Vp]) -> Marks:
    """Rows that a flush has to remove."""
    marks = np.zeros(len(m.tlb), dtype=np.int64)
    if not len(m.tlb):
        return marks
    by_tag = scope.nested and scope.tagged
    for vp in vps if by_tag else targets(flush, scope, vps):
        tlb_select.virtual(
            m,
            np.int64(vp.position),
            tlb_select.NESTED_GUESTS if by_tag else tlb_select.OWN,
            np.int64(signed(scope.nested_vm or 0)),
            flush.everyone,
            flush.vps,
            tlb.EVERY if flush.space is None else np.int64(signed(flush.space)),
            tlb.GLOBALS_STAY if flush.globals_stay else tlb.GLOBALS_TOO,
            flush.covered is None,
            no_ranges() if flush.covered is None else flush.covered,
            marks,
        )
    return marks


def second_level_required(m: Machine, flush: SecondLevelFlush) -> Marks:
    """Rows that a second-level flush has to remove."""
    marks = np.zeros(len(m.tlb), dtype=np.int64)
    if len(m.tlb):
        covered = no_ranges() if flush.covered is None else flush.covered
        tlb_select.second_level(m, np.int64(flush.root), flush.covered is None, covered, marks)
    return marks


def execute(
    m: Machine, flush: Flush, scope: Scope, vps: Sequence[Vp], facts: Facts, rule: Marks | None = None
) -> list[Effect]:
    """Carry a flush out and say what it did. ``rule`` is what had to go if ``flush`` itself does not say so.

    Carried out exactly, a flush removes what had to go as far as it goes itself.
    """
    before = m.tlb.copy()
    own = required(m, flush, scope, vps)
    sent = targets(flush, scope, vps)
    flushes = dict.fromkeys((vp.position for vp in vps), 0)
    queued: set[int] = set()
    if facts.execution == "exact":
        tlb_select.remove(m, own if rule is None else own & rule)
    elif facts.execution == "paranoid":
        tlb.flush(m)
    else:
        which = queues.NESTED_QUEUE if scope.nested else queues.OWN_QUEUE
        for vp in sent:
            queues.enqueue(m.queues, vp.position, which, flush.words)
            if vp.running:
                flushes[vp.position] = service(m, vp.position, vp.in_nested, facts)
            if queues.contents(m.queues, vp.position, which):
                queued.add(vp.position)
    return _effects(m, before, own if rule is None else rule, vps, sent, flushes, queued)


def execute_second_level(m: Machine, flush: SecondLevelFlush, vps: Sequence[Vp], facts: Facts) -> list[Effect]:
    """Carry a second-level flush out on every VP; nothing of it is ever queued."""
    before = m.tlb.copy()
    own = second_level_required(m, flush)
    if facts.execution == "exact":
        tlb_select.remove(m, own)
    else:
        tlb.flush(m)
    return _effects(m, before, own, vps, list(vps), dict.fromkeys((vp.position for vp in vps), 0), set())


def service(m: Machine, vcpu: int, in_nested: bool, facts: Facts) -> int:
    """What a vCPU does before it enters its guest: the queue of its mode. Returns what its statistic grew by."""
    if not queues.requested(m.queues, vcpu):
        return 0
    queues.acknowledge(m.queues, vcpu)
    which = queues.NESTED_QUEUE if in_nested else queues.OWN_QUEUE
    words = queues.contents(m.queues, vcpu, which)
    if not words:
        return 0
    queues.purge(m.queues, vcpu, which)
    done = 0
    if not facts.ept:
        words = (EVERYTHING,)
    for word in words:
        if word == EVERYTHING:
            done += 1
            _drop(m, vcpu, None)
            break
        if facts.lists.reads(word):
            done += 1
            _drop(m, vcpu, facts.lists.covered((word,)))
    notes.count(m, vcpu, ctl.V_HV_FLUSHES, done)
    return done


def full_flush(m: Machine, vcpu: int, in_nested: bool) -> None:
    """A flush of the whole current context for another reason: what was queued for it is done with."""
    queues.purge(m.queues, vcpu, queues.NESTED_QUEUE if in_nested else queues.OWN_QUEUE)
    _drop(m, vcpu, None)
    notes.count(m, vcpu, ctl.V_HV_FLUSHES)


def drop_nested(m: Machine, vcpu: int) -> None:
    """Remove what a vCPU remembers for nested guests, as the lower hypervisor does when another one comes to run."""
    if len(m.tlb):
        marks = np.zeros(len(m.tlb), dtype=np.int64)
        tlb_select.nested_of_vcpu(m, np.int64(vcpu), marks)
        tlb_select.remove(m, marks)


def _drop(m: Machine, vcpu: int, covered: flush_ranges.Ranges | None) -> None:
    """INVVPID of the current VPID: its whole context, or address by address."""
    if not len(m.tlb):
        return
    marks = np.zeros(len(m.tlb), dtype=np.int64)
    where = no_ranges() if covered is None else covered
    vpid = np.int64(tlb.vpid_of(m, np.int64(vcpu)))
    tlb_select.linear_of_vpid(m, np.int64(vcpu), vpid, covered is None, where, marks)
    tlb_select.remove(m, marks)


def _effects(
    m: Machine,
    before: frames.Words,
    rule: Marks,
    vps: Sequence[Vp],
    sent: Sequence[Vp],
    flushes: dict[int, int],
    queued: set[int],
) -> list[Effect]:
    found = []
    modelled = bool(len(before))
    was = _live(before) if modelled else np.zeros(0, dtype=bool)
    gone = was & ~_live(m.tlb) if modelled else was
    had = rule.astype(bool) & was if modelled else was
    owner = before[:, tlb.E_KIND] >> tlb.VCPU_SHIFT if modelled else np.zeros(0, dtype=np.int64)
    positions = {vp.position for vp in sent}
    for vp in vps:
        own = owner == vp.position
        dropped, needed = own & gone, own & had
        targeted = vp.position in positions
        if targeted or dropped.any() or needed.any():
            found.append(
                Effect(
                    vp=vp,
                    targeted=targeted,
                    queued=vp.position in queued,
                    flushes=flushes[vp.position],
                    required=before[needed],
                    dropped=before[dropped],
                    over_flushed=before[dropped & ~needed],
                    left=before[needed & ~dropped],
                )
            )
    return found


def _live(table: frames.Words) -> NDArray[np.bool_]:
    live: NDArray[np.bool_] = table[:, tlb.E_GENERATION] == table[0, tlb.GENERATION]
    live[0] = False
    return live
