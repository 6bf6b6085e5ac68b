"""What a machine is at one moment, and how it becomes what it is at the next. All groups of operations build on it.

Reads look at the current state, from any thread, without waiting. A change has the machine to itself: it either
publishes its whole effect or leaves the machine as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from engine.cpu import frames
from engine.cpu.frames import Machine
from engine.errors import Busy
from engine.kvm import state_frame as reg
from engine.kvm.protections import Protection
from engine.kvm.slot_map import SlotMap
from engine.machine import address_spaces
from engine.machine.fastpath_choice import fast_path_serves
from engine.machine.nested_states import NestedStates
from engine.state.config import VmConfig
from engine.state.frame_store import Draft, FrameStore, Snapshot
from engine.trace.object_hits import Targets, targets_of


@dataclass(frozen=True)
class State:
    """Everything that is published together. Whoever reads frames keeps the snapshot meanwhile, in a local name: rows
    of a snapshot that nobody keeps are used again."""

    config: VmConfig
    snapshot: Snapshot
    slots: SlotMap = field(default_factory=SlotMap)
    protections: Mapping[str, Protection] = field(default_factory=dict)
    targets: Targets = field(default_factory=lambda: targets_of(()))
    nested: NestedStates = field(default_factory=NestedStates)

    @property
    def spp_active(self) -> bool:
        """Whether sub-page protection is on."""
        return bool(register(self.snapshot.machine, reg.SPP_ACTIVE))

    @property
    def failing(self) -> int | None:
        """Which allocation of the host fails from now, 1 the next; None when none does."""
        return register(self.snapshot.machine, reg.FAIL_ALLOCATION) or None


class Change(Draft):
    """A change under way: frames as a draft has them, and beside them what else will be published."""

    def __init__(self, store: FrameStore, state: State, slots: SlotMap | None = None) -> None:
        self.config = state.config
        self.slots = state.slots if slots is None else slots
        self.protections = state.protections
        self.nested = state.nested
        super().__init__(store, self.slots.table)

    def follow_modes(self) -> None:
        """Put every vCPU in the address space that it is to be in."""
        place = self.config.vcpu_position
        address_spaces.follow(self, (place(vcpu) for vcpu, item in self.nested.vcpus.items() if item.smm))


class MachineState:
    """The state of one machine: what is published, and the one change that may be under way."""

    def __init__(self, store: FrameStore, current: State) -> None:
        self.store = store
        self.current = current
        self.writer = threading.Lock()

    @contextmanager
    def change(self, since: State | None = None, slots: SlotMap | None = None) -> Iterator[Change]:
        """A change, published when the block ends well. ``since`` is the state that its input was checked against,
        ``slots`` are the memory slots from now on. Raises Busy when another change is under way, or came first."""
        change = self.open(since, slots)
        try:
            yield change
        except BaseException:
            self.abandon(change)
            raise
        self.publish(change)

    def open(self, since: State | None = None, slots: SlotMap | None = None) -> Change:
        """Begin a change; whoever does ends it with ``publish`` or ``abandon``."""
        self._acquire()
        try:
            if since is not None and since is not self.current:
                raise Busy("another change of this machine came first")
            self._own()
            change = Change(self.store, self.current, slots)
            if address_spaces.has_smm_slots(change.machine):
                change.follow_modes()  # those of a machine that an earlier release stored
            _choose_path(change)
        except BaseException:
            self.writer.release()
            raise
        return change

    def publish(self, change: Change) -> None:
        """Make a change the current state."""
        try:
            if change.nested is not self.current.nested or change.slots is not self.current.slots:
                change.follow_modes()
            same = change.protections is self.current.protections
            # Before anything is published: there may be too many.
            targets = self.current.targets if same else targets_of_all(change.protections)
            self.store.publish(change)
            self.current = State(
                change.config, self.store.published, change.slots, change.protections, targets, change.nested
            )
        except BaseException:
            self.store.abandon(change)
            raise
        finally:
            self.writer.release()

    def choose_path(self) -> None:
        """Choose whether the fast path serves, for a state that came from elsewhere; nothing else changes."""
        self._acquire()
        change = Change(self.store, self.current)
        _choose_path(change)
        self.publish(change)

    def abandon(self, change: Change) -> None:
        """Forget a change."""
        self.store.abandon(change)
        self.writer.release()

    def twin(self) -> MachineState:
        """The same state, to be changed and thrown away; this one takes no notice of it."""
        current = self.current
        store = self.store.twin(current.snapshot)
        return MachineState(store, replace(current, snapshot=store.published))

    def clone(self, config: VmConfig) -> MachineState:
        """The same state under ``config``, which differs in names alone, for a machine of its own.

        It shares the frames of this one until it is first changed. From any thread, whatever is under way here.
        """
        current = self.current
        store = self.store.lend(current.snapshot)
        return MachineState(store, replace(current, config=config, snapshot=store.published))

    def own(self) -> None:
        """Copy the frames that are borrowed. Raises Busy when a change is under way."""
        self._acquire()
        try:
            self._own()
        finally:
            self.writer.release()

    def _own(self) -> None:
        if self.store.published.loan is not None:
            self.store.own()
            self.current = replace(self.current, snapshot=self.store.published)

    def successor(self) -> MachineState:
        """A state that goes on from this one and takes the changes; this one takes none until it is withdrawn."""
        self._acquire()
        return MachineState(self.store, self.current)

    def withdraw(self, after: MachineState) -> None:
        """Undo what was done to the successor, which takes no changes any more; this state takes them again."""
        after._acquire()
        self.store.revert(self.current.snapshot)
        self.writer.release()

    def _acquire(self) -> None:
        if not self.writer.acquire(blocking=False):
            raise Busy("another change of this machine is under way")


class Operations:
    """A group of operations on one machine."""

    def __init__(self, state: MachineState) -> None:
        self._state = state

    @property
    def _config(self) -> VmConfig:
        return self._state.current.config

    @property
    def _published(self) -> Snapshot:
        return self._state.current.snapshot


def register(machine: Machine, position: np.int64) -> int:
    """A word of the state frame, by its number in ``kvm.state_frame``."""
    return int(machine.rows[machine.row_of[frames.STATE_FRAME], position])


def targets_of_all(protections: Mapping[str, Protection]) -> Targets:
    """The objects of all protections, as a replay looks for them."""
    return targets_of([item for p in protections.values() for item in p.objects])


def _choose_path(change: Change) -> None:
    machine: Machine = change.machine
    serves = fast_path_serves(change.config, machine)
    if bool(machine.caps[frames.CAP_FAST_PATH]) != serves:
        caps = machine.caps.copy()
        caps[frames.CAP_FAST_PATH] = serves
        change.machine = machine.replaced(caps=caps)
